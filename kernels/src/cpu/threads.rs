//! Splits an operation into numbered tasks for a few threads. Which thread runs a task is left
//! open; what a task computes must not depend on it, and no two tasks write the same element.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::{Error, Result};

/// Below this many scalar operations, waking another thread costs more than it saves.
const WORTH_SHARING: usize = 1 << 19;

/// The calling thread and the helpers that join it for large operations.
pub(super) struct Threads {
    /// Helpers: one fewer than threads, since the caller works too.
    pool: Option<rayon::ThreadPool>,
    count: usize,
}

impl Threads {
    /// `count` threads with the caller; 0 takes one per core.
    pub fn new(count: usize) -> Result<Self> {
        let count = match count {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            given => given,
        };
        let pool = (count > 1).then(|| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(count - 1)
                .thread_name(|index| format!("kernel-{index}"))
                .build()
                .map_err(|error| Error::Device(format!("threads of the cpu device: {error}")))
        });
        Ok(Self { pool: pool.transpose()?, count })
    }

    /// Runs `body(0) … body(tasks - 1)`, in any order; `work` is the total in scalar operations.
    #[inline]
    pub fn each(&self, tasks: usize, work: usize, body: impl Fn(usize) + Sync) {
        let next = AtomicUsize::new(0);
        let run = || run_tasks(&next, tasks, &body);
        match &self.pool {
            Some(pool) if tasks > 1 && work >= WORTH_SHARING => pool.in_place_scope(|scope| {
                for _ in 1..self.count.min(tasks) {
                    scope.spawn(|_| run());
                }
                run();
            }),
            _ => run(),
        }
    }

    /// Runs `body(index, chunk)` over consecutive chunks of `width` elements of `out`.
    #[inline]
    pub fn each_chunk<T: Send>(
        &self,
        out: &mut [T],
        width: usize,
        work: usize,
        body: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let len = out.len();
        let shared = Shared::new(out);
        self.each(
            len.div_ceil(width.max(1)),
            work,
            #[inline(always)]
            |index| {
                let start = index * width;
                // SAFETY: chunks of different tasks are disjoint.
                body(index, unsafe { shared.slice(start, width.min(len - start)) });
            },
        );
    }
}

/// Runs tasks until none is left, compiled for wide vectors where the processor has them: the
/// same operations in the same order, hence the same bits.
#[inline]
fn run_tasks(next: &AtomicUsize, tasks: usize, body: &impl Fn(usize)) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn run_wide(next: &AtomicUsize, tasks: usize, body: &impl Fn(usize)) {
            run_plain(next, tasks, body);
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the feature.
            return unsafe { run_wide(next, tasks, body) };
        }
    }
    run_plain(next, tasks, body);
}

#[inline(always)]
fn run_plain(next: &AtomicUsize, tasks: usize, body: &impl Fn(usize)) {
    loop {
        let task = next.fetch_add(1, Ordering::Relaxed);
        if task >= tasks {
            return;
        }
        body(task);
    }
}

/// A slice that several tasks write, each its own parts.
pub(super) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `slice`, whose callers keep parts disjoint.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), owner: PhantomData }
    }

    /// `len` elements from `start`.
    ///
    /// # Safety
    /// No two live slices of the same `Shared` overlap.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "disjoint parts, see Safety")]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start + len <= self.len, "part {start}+{len} of {}", self.len);
        // SAFETY: within the slice borrowed mutably for 'a; disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}
