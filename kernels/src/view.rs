//! Borrowed ranges of device buffers: what operations read and write.

use crate::Buffer;

/// A readable range of a buffer, in elements.
#[derive(Debug)]
pub struct In<'a, B> {
    /// The whole buffer.
    pub buffer: &'a B,
    /// First element.
    pub start: usize,
    /// Number of elements.
    pub len: usize,
}

impl<B> Clone for In<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B> Copy for In<'_, B> {}

/// A writable (and readable) range of a buffer, in elements.
#[derive(Debug)]
pub struct Out<'a, B> {
    /// The whole buffer.
    pub buffer: &'a mut B,
    /// First element.
    pub start: usize,
    /// Number of elements.
    pub len: usize,
}

impl<'a, B: Buffer> In<'a, B> {
    /// All of `buffer`.
    pub fn all(buffer: &'a B) -> Self {
        Self { buffer, start: 0, len: buffer.len() }
    }
    /// `len` elements from `start`. Panics when the range leaves the buffer: a bug, not a fault.
    pub fn range(buffer: &'a B, start: usize, len: usize) -> Self {
        assert!(start + len <= buffer.len(), "range {start}+{len} of {}", buffer.len());
        Self { buffer, start, len }
    }
}

impl<'a, B: Buffer> Out<'a, B> {
    /// All of `buffer`.
    pub fn all(buffer: &'a mut B) -> Self {
        let len = buffer.len();
        Self { buffer, start: 0, len }
    }
    /// `len` elements from `start`. Panics when the range leaves the buffer: a bug, not a fault.
    pub fn range(buffer: &'a mut B, start: usize, len: usize) -> Self {
        assert!(start + len <= buffer.len(), "range {start}+{len} of {}", buffer.len());
        Self { buffer, start, len }
    }
    /// Reborrows as readable.
    pub fn as_in(&self) -> In<'_, B> {
        In { buffer: self.buffer, start: self.start, len: self.len }
    }
    /// Reborrows for a shorter time.
    pub fn reborrow(&mut self) -> Out<'_, B> {
        Out { buffer: self.buffer, start: self.start, len: self.len }
    }
}
