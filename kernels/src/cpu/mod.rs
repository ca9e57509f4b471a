//! The CPU device: the readable specification of every operation, generic over f32 and f64.
//!
//! One file per family of operations, forward beside backward, over plain slices. Results depend
//! neither on the number of threads nor on what else is in the batch, bit for bit:
//! - each row is computed alone, sums in an order given by its length ([`lanes`]) or its keys;
//! - matrix products go through one function with a constant shape ([`matmul`]);
//! - gradients add one partial per tile of an example in canonical order ([`smlm_gradients`]).

mod attention;
mod attention_paged;
mod attention_train;
mod device;
mod float;
mod lanes;
mod linear;
mod loss;
mod matmul;
mod norm;
mod optimizer;
mod random;
mod rope;
mod rows;
mod sample;
mod segments;
mod silu;
mod smlm;
mod smlm_gradients;
mod threads;

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

pub use float::Float;

use crate::{Buffer, Device, In, Out, Result, Ticket};
use threads::Threads;

/// A device whose memory is plain vectors and which has done everything when a call returns.
pub struct Cpu<T> {
    threads: Threads,
    opened: Instant,
    taken: [AtomicUsize; 3],
    late: usize,
    precision: PhantomData<fn() -> T>,
}

impl<T: Float> Cpu<T> {
    /// Computes on `threads` threads, the calling one among them; 0: one per core. Errors when the
    /// system refuses threads.
    pub fn new(threads: usize) -> Result<Self> {
        let threads = Threads::new(threads)?;
        let (opened, taken) = (Instant::now(), Default::default());
        Ok(Self { threads, opened, taken, late: 0, precision: PhantomData })
    }

    /// The same device, whose tickets say that they are ready only when they were asked `polls`
    /// times: tests prove with it that results may come late.
    pub fn late(self, polls: usize) -> Self {
        Self { late: polls, ..self }
    }

    fn ticket<V: Send + 'static>(&self, value: V) -> Ticket<V> {
        if self.late == 0 {
            return Ticket::ready(value);
        }
        let left = AtomicUsize::new(self.late);
        let ask = move || left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_err();
        Ticket::pending(move || Ok(value), ask)
    }

    fn count(&self, kind: usize, len: usize) {
        self.taken[kind].fetch_add(len, Relaxed);
    }

    /// Activations, wide values and integers that were ever allocated, in elements: what a memory
    /// plan is held against.
    pub fn taken(&self) -> [usize; 3] {
        self.taken.each_ref().map(|count| count.load(Relaxed))
    }
}

/// Any device whose memory is plain vectors, so that operations take its arguments.
trait Host<T>: Device<Act = Vec<T>, Wide = Vec<T>, Int = Vec<i32>> {}

impl<T, D: Device<Act = Vec<T>, Wide = Vec<T>, Int = Vec<i32>>> Host<T> for D {}

impl<T> Buffer for Vec<T> {
    fn len(&self) -> usize {
        Vec::len(self)
    }
}

impl<'a, T> In<'a, Vec<T>> {
    /// The elements.
    pub fn slice(self) -> &'a [T] {
        &self.buffer[self.start..][..self.len]
    }
}

impl<'a, T> Out<'a, Vec<T>> {
    /// The elements.
    pub fn slice_mut(self) -> &'a mut [T] {
        &mut self.buffer[self.start..][..self.len]
    }
}
