//! How much training a step may carry. Training gets what the objective for the time per token
//! leaves over; it always gets a little, so that a job ends; with nobody chatting it gets all.

use std::time::Duration;

/// Weight of the newest sample in the running averages.
const FRESH: f64 = 0.2;

/// Running costs of this device, and the objective.
#[derive(Clone, Debug)]
pub struct Pace {
    target: Duration,
    row_secs: f64,
    slice_secs: f64,
    least_rows: usize,
}

/// What the step at hand may spend on training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Allowance {
    /// Rows of forward.
    pub rows: usize,
    /// Time for loss and backward slices, after the forward; `None`: no bound but one slice.
    pub slices: Option<Duration>,
}

impl Pace {
    /// `target` is the objective for the time between two tokens of a stream; `least_rows` the
    /// smallest training chunk worth a step.
    pub fn new(target: Duration, least_rows: usize) -> Self {
        Self { target, row_secs: 0.0, slice_secs: 0.0, least_rows }
    }

    /// What training may take in a step that also has `inference_rows`.
    pub fn allow(&self, inference_rows: usize, room: usize) -> Allowance {
        if inference_rows == 0 {
            return Allowance { rows: room, slices: None };
        }
        let left = self.target.as_secs_f64() - inference_rows as f64 * self.row_secs;
        let rows = if self.row_secs > 0.0 { (left / self.row_secs).max(0.0) as usize } else { 0 };
        Allowance {
            rows: rows.max(self.least_rows).min(room),
            slices: Some(Duration::from_secs_f64(left.max(0.0))),
        }
    }

    /// Whether another slice fits, having spent `spent` on `done` slices.
    pub fn another_slice(&self, allowance: Allowance, spent: Duration, done: usize) -> bool {
        match allowance.slices {
            _ if done == 0 => true,
            None => false,
            Some(bound) => spent.as_secs_f64() + self.slice_secs <= bound.as_secs_f64(),
        }
    }

    /// Learns from a forward of `rows`.
    pub fn saw_forward(&mut self, rows: usize, took: Duration) {
        if rows > 0 {
            blend(&mut self.row_secs, took.as_secs_f64() / rows as f64);
        }
    }

    /// Learns from a slice.
    pub fn saw_slice(&mut self, took: Duration) {
        blend(&mut self.slice_secs, took.as_secs_f64());
    }
}

fn blend(average: &mut f64, sample: f64) {
    *average = if *average == 0.0 { sample } else { *average + FRESH * (sample - *average) };
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn leaves_what_the_objective_does_not_need() {
        let mut pace = Pace::new(40 * MS, 8);
        pace.saw_forward(100, 100 * MS);
        assert_eq!(pace.allow(0, 64).rows, 64, "nobody chats: all");
        assert_eq!(pace.allow(10, 64).rows, 30);
        assert_eq!(pace.allow(39, 64).rows, 8, "a little always");
        assert_eq!(pace.allow(10, 4).rows, 4, "never past the room");
    }

    #[test]
    fn stops_slices_at_the_bound_but_always_takes_one() {
        let mut pace = Pace::new(40 * MS, 8);
        pace.saw_slice(15 * MS);
        let allowance = pace.allow(1, 0);
        assert!(pace.another_slice(allowance, 100 * MS, 0));
        assert!(pace.another_slice(allowance, 15 * MS, 1));
        assert!(!pace.another_slice(allowance, 30 * MS, 2));
    }
}
