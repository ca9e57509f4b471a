//! Device memory: owned blocks, addresses of ranges, and pinned host memory for copies.

use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};

use super::fault::device_fault;
use crate::{Buffer, Error, In, Out, Result};

/// A block of device memory that holds `len` elements of `T`. Freed when dropped.
#[derive(Debug)]
pub struct Buf<T> {
    address: u64,
    len: usize,
    context: Arc<CudaContext>,
    element: PhantomData<T>,
}

impl<T> Buf<T> {
    /// Takes memory, zeroed.
    pub(super) fn zeroed(context: &Arc<CudaContext>, len: usize) -> Result<Self> {
        // Empty buffers own an address as well, so that every range has a valid one.
        let bytes = (len * size_of::<T>()).max(1);
        // SAFETY: plain allocation; the result is checked.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let free = result::mem_get_info().map_or(0, |(free, _)| free as u64);
                Error::OutOfMemory { wanted: bytes as u64, free }
            }
            _ => device_fault(error),
        })?;
        let buffer = Self { address, len, context: context.clone(), element: PhantomData };
        // Filling device memory does not wait, and other streams do not wait for it.
        let stream = result::stream::null();
        // SAFETY: the block was just taken and is `bytes` long.
        unsafe { result::memset_d8_async(address, 0, bytes, stream) }.map_err(device_fault)?;
        // SAFETY: the default stream always exists.
        unsafe { result::stream::synchronize(stream) }.map_err(device_fault)?;
        Ok(buffer)
    }
}

impl<T> Drop for Buf<T> {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the block is owned; freeing waits for work that uses it. A failure means the
            // device is lost, and its memory with it.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

impl<T> Buffer for Buf<T> {
    fn len(&self) -> usize {
        self.len
    }
}

/// Where a range lies in device memory.
pub(super) trait Address {
    /// Address of the first element.
    fn address(&self) -> u64;
    /// Length in bytes.
    fn bytes(&self) -> usize;
}

impl<T> Address for In<'_, Buf<T>> {
    fn address(&self) -> u64 {
        self.buffer.address + (self.start * size_of::<T>()) as u64
    }
    fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

impl<T> Address for Out<'_, Buf<T>> {
    fn address(&self) -> u64 {
        self.buffer.address + (self.start * size_of::<T>()) as u64
    }
    fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

/// Page-locked host memory: the only kind that copies read and write while the host goes on.
pub(super) struct Pinned {
    pointer: *mut u8,
    len: usize,
    context: Arc<CudaContext>,
}

// SAFETY: plain memory with one owner; shared references only read.
unsafe impl Send for Pinned {}
unsafe impl Sync for Pinned {}

impl Pinned {
    pub fn new(context: &Arc<CudaContext>, len: usize) -> Result<Self> {
        // SAFETY: plain allocation; the result is checked.
        let pointer = unsafe { result::malloc_host(len.max(1), 0) }.map_err(device_fault)?;
        Ok(Self { pointer: pointer.cast(), len, context: context.clone() })
    }
    pub fn len(&self) -> usize {
        self.len
    }
    /// The bytes. The caller sees to it that no copy is under way.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: owned, `len` bytes.
        unsafe { std::slice::from_raw_parts(self.pointer, self.len) }
    }
    /// The bytes, writable, likewise.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: owned, `len` bytes.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: owned memory of `malloc_host`.
            let _ = unsafe { result::free_host(self.pointer.cast()) };
        }
    }
}
