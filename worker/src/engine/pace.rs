//! How much training a step may carry. Training gets what the objective for the time per token
//! leaves over; it always gets a little, so that a job ends; with nobody chatting it gets all.

use super::backlog::Work;
use std::time::Duration;

/// Weight of the newest sample in the running averages.
const FRESH: f64 = 0.2;
/// Slack of comparisons between sums of times, in seconds.
const EPSILON: f64 = 1e-9;

/// Running costs of this device, and the objective.
#[derive(Clone, Debug)]
pub struct Pace {
    target: f64,
    least_rows: usize,
    step: Curve,
    loss_row: f64,
    layer_row: f64,
}

impl Pace {
    /// `target` is the objective for the time between two tokens of a stream; `least_rows` the
    /// smallest training chunk worth a step.
    pub fn new(target: Duration, least_rows: usize) -> Self {
        let (target, step) = (target.as_secs_f64(), Curve::default());
        Self { target, least_rows, step, loss_row: 0.0, layer_row: 0.0 }
    }

    /// Training rows that a step may carry which also has `inference_rows`, of at most `room`.
    pub fn allow(&self, inference_rows: usize, room: usize) -> usize {
        if inference_rows == 0 {
            return room;
        }
        let fits = |rows: usize| self.step.secs(inference_rows + rows) <= self.target + EPSILON;
        let (mut low, mut high) = (0, room);
        while self.step.is_known() && low < high {
            let middle = (low + high).div_ceil(2);
            if fits(middle) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        low.max(self.least_rows).min(room)
    }

    /// Time for loss and backward slices beside a step of `rows`, in seconds.
    pub fn slice_budget(&self, rows: usize) -> f64 {
        (self.target - self.step.secs(rows)).max(0.0)
    }

    /// Whether another slice fits, having planned `spent` seconds for earlier ones of this step.
    pub fn fits(&self, slice: &Work, spent: f64, budget: f64) -> bool {
        spent + self.expect(slice) <= budget + EPSILON
    }

    /// Seconds that a piece of work will take; 0 where none of its kind was seen.
    pub fn expect(&self, work: &Work) -> f64 {
        match *work {
            Work::Step { inference, micro } => self.step.secs(inference + micro),
            Work::Loss { rows } => self.loss_row * rows as f64,
            Work::Layer { rows } => self.layer_row * rows as f64,
            Work::Update | Work::Copy { .. } => 0.0,
        }
    }

    /// Learns from a piece of work.
    pub fn saw(&mut self, work: &Work, secs: f64) {
        match *work {
            Work::Step { inference, micro } => self.step.saw(inference + micro, secs),
            Work::Loss { rows } if rows > 0 => blend(&mut self.loss_row, secs / rows as f64),
            Work::Layer { rows } if rows > 0 => blend(&mut self.layer_row, secs / rows as f64),
            _ => {}
        }
    }
}

/// Time of a step by its rows: one averaged point per power of two, straight lines between them,
/// from nothing at no row. A processor's points lie on one line; a GPU takes about as long for one
/// row as for a hundred.
#[derive(Clone, Debug, Default)]
struct Curve {
    /// Average rows and seconds of the steps of a class; none seen: zeros.
    points: [(f64, f64); 32],
}

impl Curve {
    fn is_known(&self) -> bool {
        self.points.iter().any(|point| point.0 > 0.0)
    }

    fn saw(&mut self, rows: usize, secs: f64) {
        if rows > 0 {
            let point = &mut self.points[(rows.ilog2() as usize).min(31)];
            blend(&mut point.0, rows as f64);
            blend(&mut point.1, secs);
        }
    }

    fn secs(&self, rows: usize) -> f64 {
        let rows = rows as f64;
        let (mut from, mut slope) = ((0.0, 0.0), 0.0);
        for &point in self.points.iter().filter(|point| point.0 > 0.0) {
            // More rows never take less: where samples say so, they are noise.
            let to = (point.0, point.1.max(from.1));
            slope = (to.1 - from.1) / (to.0 - from.0);
            if rows <= to.0 {
                break;
            }
            from = to;
        }
        from.1 + slope * (rows - from.0)
    }
}

fn blend(average: &mut f64, sample: f64) {
    *average = if *average == 0.0 { sample } else { *average + FRESH * (sample - *average) };
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn step(rows: usize) -> Work {
        Work::Step { inference: rows, micro: 0 }
    }

    #[test]
    fn leaves_what_the_objective_does_not_need() {
        let mut pace = Pace::new(40 * MS, 8);
        assert_eq!(pace.allow(10, 64), 8, "nothing is known");
        pace.saw(&step(100), 0.1);
        assert_eq!(pace.allow(0, 64), 64, "nobody chats: all");
        assert_eq!(pace.allow(10, 64), 30);
        assert_eq!(pace.allow(39, 64), 8, "a little always");
        assert_eq!(pace.allow(10, 4), 4, "never past the room");
    }

    #[test]
    fn knows_that_few_rows_take_a_gpu_as_long_as_many() {
        let mut pace = Pace::new(45 * MS, 16);
        pace.saw(&step(64), 0.005);
        pace.saw(&step(1), 0.0045);
        pace.saw(&step(1000), 0.020);
        pace.saw(&step(2048), 0.042);
        assert!((pace.expect(&step(32)) - 0.00475).abs() < 1e-4);
        assert!((pace.expect(&step(4096)) - 0.085).abs() < 1e-3);
        let rows = pace.allow(64, 4000);
        assert!((2000..2200).contains(&rows), "{rows}");
        pace.saw(&step(4), 0.003);
        assert!(pace.expect(&step(3)) >= 0.0045, "never less than fewer rows");
    }

    #[test]
    fn stops_slices_at_the_bound() {
        let mut pace = Pace::new(40 * MS, 8);
        let slice = Work::Layer { rows: 30 };
        pace.saw(&slice, 0.015);
        pace.saw(&step(10), 0.010);
        let budget = pace.slice_budget(10);
        assert!((budget - 0.030).abs() < 1e-9);
        assert!(pace.fits(&slice, 0.015, budget));
        assert!(!pace.fits(&slice, 0.016, budget));
        assert!(pace.fits(&Work::Layer { rows: 15 }, 0.020, budget));
        assert_eq!(pace.slice_budget(100), 0.0);
    }
}
