//! Work that was enqueued and that the device may not have finished. Its marks say how long each
//! piece really took; its length keeps training from running ahead of what is due.

use kernels::{Result, Ticket};
use std::collections::VecDeque;

/// Pieces that wait or run while nobody chats: enough that the device never runs dry.
const PIECES_MAX: usize = 8;
/// Fewer are enough where they are long: a request that comes now waits for all of them.
const LONG_SECS: f64 = 0.06;
/// So many always: one that runs and two that wait.
const PIECES_MIN: usize = 3;

/// A piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// A forward step.
    Step {
        /// Prefill and decode rows.
        inference: usize,
        /// Rows of the micro-batch.
        micro: usize,
    },
    /// Loss of labelled rows.
    Loss {
        /// How many.
        rows: usize,
    },
    /// Backward of one layer.
    Layer {
        /// Rows of the micro-batch.
        rows: usize,
    },
    /// Optimizer step and publication of one job.
    Update,
    /// Weights on their way to the device, or a snapshot on its way back.
    Copy {
        /// Bytes.
        bytes: usize,
    },
}

impl Work {
    fn is_slice(&self) -> bool {
        matches!(self, Self::Loss { .. } | Self::Layer { .. })
    }
}

/// A piece that has ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Done {
    /// What it was.
    pub work: Work,
    /// When it began, in the device's seconds.
    pub start: f64,
    /// How long it took.
    pub secs: f64,
    /// How long it was expected to take.
    pub planned: f64,
}

struct Piece {
    work: Work,
    planned: f64,
    start: Ticket<f64>,
    end: Ticket<f64>,
}

/// See the module.
#[derive(Default)]
pub struct Backlog {
    pieces: VecDeque<Piece>,
}

impl Backlog {
    /// A piece was enqueued between two marks.
    pub fn push(&mut self, work: Work, planned: f64, start: Ticket<f64>, end: Ticket<f64>) {
        self.pieces.push_back(Piece { work, planned, start, end });
    }

    /// The oldest piece, once it has ended.
    pub fn pop(&mut self) -> Result<Option<Done>> {
        if !self.pieces.front().is_some_and(|piece| piece.end.is_ready()) {
            return Ok(None);
        }
        let Some(Piece { work, planned, start, end }) = self.pieces.pop_front() else {
            return Ok(None);
        };
        let start = start.wait()?;
        let secs = (end.wait()? - start).max(0.0);
        Ok(Some(Done { work, start, secs, planned }))
    }

    /// Loss and backward slices that have not ended.
    pub fn slices(&self) -> usize {
        self.pieces.iter().filter(|piece| piece.work.is_slice()).count()
    }

    /// Whether training that nobody waits for should wait itself.
    pub fn is_full(&self) -> bool {
        let waiting = self.pieces.len();
        let secs: f64 = self.pieces.iter().map(|piece| piece.planned).sum();
        waiting >= PIECES_MAX || (waiting >= PIECES_MIN && secs >= LONG_SECS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    fn at(clock: &Arc<AtomicUsize>, secs: usize) -> Ticket<f64> {
        let clock = clock.clone();
        Ticket::pending(move || Ok(secs as f64), move || clock.load(Relaxed) >= secs)
    }

    #[test]
    fn ends_in_order_and_is_full_in_time() {
        let clock = Arc::new(AtomicUsize::new(0));
        let mut backlog = Backlog::default();
        let slice = Work::Layer { rows: 5 };
        backlog.push(Work::Step { inference: 1, micro: 0 }, 0.0, at(&clock, 0), at(&clock, 2));
        for second in 2..9 {
            assert!(!backlog.is_full());
            backlog.push(slice, 0.001, at(&clock, second), at(&clock, second + 1));
        }
        assert!(backlog.is_full());
        assert_eq!((backlog.pop().unwrap(), backlog.slices()), (None, 7));
        clock.store(3, Relaxed);
        let done = backlog.pop().unwrap().unwrap();
        assert_eq!((done.start, done.secs), (0.0, 2.0));
        let done = backlog.pop().unwrap().unwrap();
        assert_eq!((done.work, done.start, done.secs, done.planned), (slice, 2.0, 1.0, 0.001));
        assert_eq!((backlog.pop().unwrap(), backlog.slices()), (None, 6));
        clock.store(9, Relaxed);
        while backlog.pop().unwrap().is_some() {}
        for _ in 0..PIECES_MIN {
            assert!(!backlog.is_full());
            backlog.push(slice, 0.03, at(&clock, 20), at(&clock, 21));
        }
        assert!(backlog.is_full(), "few long pieces are enough");
    }
}
