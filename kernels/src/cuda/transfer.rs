//! Copies between host and device. Uploads go through a ring of pinned slots, so that the caller's
//! memory is free at return; downloads land in pinned blocks that are used again.

use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::Pod;
use cudarc::driver::{CudaContext, result, sys};
use rayon::prelude::*;

use super::event::Event;
use super::fault::device_fault;
use super::memory::Pinned;
use crate::{Result, Ticket};

/// Bytes of one slot of the ring.
const SLOT_BYTES: usize = 32 << 20;
/// Slots of the ring: while one travels, others are filled.
const SLOTS: usize = 4;
/// Parts start at multiples of this.
const ALIGNMENT: usize = 256;
/// Elements that one thread converts at a time.
const PART: usize = 1 << 18;

struct Slot {
    memory: Pinned,
    /// The end of its last copy, once the ring has moved on.
    left: Option<Event>,
}

/// See the module.
pub(super) struct Uploads {
    slots: Vec<Slot>,
    current: usize,
    used: usize,
    context: Arc<CudaContext>,
}

impl Uploads {
    pub fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let slot = |_| Ok(Slot { memory: Pinned::new(context, SLOT_BYTES)?, left: None });
        let slots = (0..SLOTS).map(slot).collect::<Result<_>>()?;
        Ok(Self { slots, current: 0, used: 0, context: context.clone() })
    }

    /// Enqueues `dst = convert(src)`. `src` may be reused at return.
    pub fn copy<S: Copy + Sync, T: Pod + Send>(
        &mut self,
        stream: sys::CUstream,
        dst: u64,
        src: &[S],
        convert: impl Fn(S) -> T + Sync,
    ) -> Result<()> {
        let mut done = 0;
        while done < src.len() {
            let room = (SLOT_BYTES - self.used) / size_of::<T>();
            let wanted = (src.len() - done).min(PART);
            if room < wanted {
                self.next_slot(stream)?;
                continue;
            }
            let count = (src.len() - done).min(room);
            let bytes = count * size_of::<T>();
            let slot = &mut self.slots[self.current];
            let part = &mut slot.memory.bytes_mut()[self.used..self.used + bytes];
            let values: &mut [T] = bytemuck::cast_slice_mut(part);
            let source = &src[done..done + count];
            let fill = |(values, source): (&mut [T], &[S])| {
                for (value, source) in values.iter_mut().zip(source) {
                    *value = convert(*source);
                }
            };
            if count > PART {
                values.par_chunks_mut(PART).zip(source.par_chunks(PART)).for_each(fill);
            } else {
                fill((values, source));
            }
            let address = dst + (done * size_of::<T>()) as u64;
            // SAFETY: the part stays as it is until the ring comes round, which waits for the copy.
            unsafe { result::memcpy_htod_async(address, values, stream) }.map_err(device_fault)?;
            self.used = (self.used + bytes).next_multiple_of(ALIGNMENT).min(SLOT_BYTES);
            done += count;
        }
        Ok(())
    }

    fn next_slot(&mut self, stream: sys::CUstream) -> Result<()> {
        self.slots[self.current].left = Some(Event::record(&self.context, stream, false)?);
        self.current = (self.current + 1) % SLOTS;
        self.used = 0;
        match self.slots[self.current].left.take() {
            Some(event) => event.wait(),
            None => Ok(()),
        }
    }
}

/// Pinned blocks that no copy uses.
type Blocks = Arc<Mutex<Vec<Pinned>>>;

/// See the module.
pub(super) struct Downloads {
    blocks: Blocks,
    context: Arc<CudaContext>,
}

/// A copy under way. Dropping it gives the block back, after the copy.
struct Landing {
    event: Event,
    memory: Option<Pinned>,
    blocks: Blocks,
}

impl Drop for Landing {
    fn drop(&mut self) {
        // The device may still write to the block. Where waiting fails, the device is lost.
        if self.event.wait().is_ok()
            && let Some(memory) = self.memory.take()
        {
            self.blocks.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
        }
    }
}

impl Downloads {
    pub fn new(context: &Arc<CudaContext>) -> Self {
        Self { blocks: Arc::default(), context: context.clone() }
    }

    /// Enqueues a copy of `len` elements from `src`, converted when they are waited for.
    pub fn copy<T: Pod, R: Send + 'static>(
        &self,
        stream: sys::CUstream,
        src: u64,
        len: usize,
        convert: impl Fn(T) -> R + Send + 'static,
    ) -> Result<Ticket<Vec<R>>> {
        if len == 0 {
            return Ok(Ticket::ready(Vec::new()));
        }
        let bytes = len * size_of::<T>();
        let mut memory = self.block(bytes)?;
        let part = &mut memory.bytes_mut()[..bytes];
        // SAFETY: the block is owned by the landing until the copy has ended.
        unsafe { result::memcpy_dtoh_async(part, src, stream) }.map_err(device_fault)?;
        let event = Event::record(&self.context, stream, false)?;
        let blocks = self.blocks.clone();
        let landing = Arc::new(Landing { event, memory: Some(memory), blocks });
        let watched = landing.clone();
        let wait = move || {
            landing.event.wait()?;
            let memory = landing.memory.as_ref().expect("a landing holds its block until dropped");
            let values: &[T] = bytemuck::cast_slice(&memory.bytes()[..bytes]);
            Ok(values.iter().map(|value| convert(*value)).collect())
        };
        Ok(Ticket::pending(wait, move || watched.event.is_passed()))
    }

    /// The smallest free block that is large enough, or a new one.
    fn block(&self, bytes: usize) -> Result<Pinned> {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = blocks.iter().enumerate().filter(|(_, block)| block.len() >= bytes);
        match fits.min_by_key(|(_, block)| block.len()).map(|(index, _)| index) {
            Some(index) => Ok(blocks.swap_remove(index)),
            None => Pinned::new(&self.context, bytes.next_power_of_two().max(4096)),
        }
    }
}
