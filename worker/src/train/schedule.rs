//! The learning rate of each optimizer step: a pure function of step, total and spec.
//!
//! After warm-up the values are those of transformers' `get_scheduler` at scheduler index
//! `step − 1`, so the last step still moves the weights. Warm-up differs on purpose: there it
//! starts at index 0 with a rate of exactly zero, which wastes a whole batch of a small job; here
//! `warmup` steps climb in `warmup + 1` equal parts, so that the first step already learns and
//! the peak is reached once, at step `warmup + 1`.

use super::spec::{Scheduler, TrainingSpec};

/// Steps that warm up: the ratio of all steps, rounded up.
pub fn warmup_steps(total: usize, ratio: f64) -> usize {
    ((total as f64 * ratio).ceil() as usize).min(total)
}

/// Learning rate of `step` (from 1) of `total`; positive for every step within `total`.
pub fn learning_rate(step: usize, total: usize, spec: &TrainingSpec) -> f64 {
    let warmup = warmup_steps(total, spec.warmup_ratio);
    spec.learning_rate * factor(step, total, warmup, spec.scheduler)
}

fn factor(step: usize, total: usize, warmup: usize, scheduler: Scheduler) -> f64 {
    if step <= warmup {
        return step as f64 / (warmup + 1) as f64;
    }
    let falling = total.saturating_sub(warmup).max(1) as f64;
    let fallen = (step - 1 - warmup) as f64;
    match scheduler {
        Scheduler::Constant => 1.0,
        Scheduler::Linear => ((falling - fallen) / falling).max(0.0),
        Scheduler::Cosine => {
            let progress = (fallen / falling).min(1.0);
            0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(total: usize, warmup_ratio: f64, scheduler: Scheduler) -> Vec<f64> {
        let mut spec = super::super::spec::tests::awkward_spec().training;
        (spec.learning_rate, spec.warmup_ratio, spec.scheduler) = (2.0, warmup_ratio, scheduler);
        (1..=total).map(|step| learning_rate(step, total, &spec)).collect()
    }

    fn close(actual: &[f64], expected: &[f64]) {
        assert_eq!(actual.len(), expected.len());
        for (a, e) in actual.iter().zip(expected) {
            assert!((a - e).abs() < 1e-12, "{actual:?} is not {expected:?}");
        }
    }

    #[test]
    fn linear_without_warm_up_is_that_of_transformers() {
        close(&rates(4, 0.0, Scheduler::Linear), &[2.0, 1.5, 1.0, 0.5]);
    }

    #[test]
    fn cosine_without_warm_up_is_that_of_transformers() {
        let root = std::f64::consts::FRAC_1_SQRT_2;
        close(&rates(4, 0.0, Scheduler::Cosine), &[2.0, 1.0 + root, 1.0, 1.0 - root]);
    }

    #[test]
    fn warm_up_climbs_from_the_first_step_and_peaks_once() {
        let third = 2.0 / 3.0;
        close(&rates(5, 0.4, Scheduler::Linear), &[third, 2.0 * third, 2.0, 4.0 / 3.0, third]);
        close(&rates(5, 0.4, Scheduler::Constant), &[third, 2.0 * third, 2.0, 2.0, 2.0]);
    }

    #[test]
    fn warm_up_steps_round_up_and_stay_within_the_job() {
        assert_eq!(warmup_steps(100, 0.03), 3);
        assert_eq!(warmup_steps(101, 0.03), 4);
        assert_eq!(warmup_steps(1, 0.03), 1);
        assert_eq!(warmup_steps(7, 0.0), 0);
        assert_eq!(warmup_steps(7, 1.0), 7);
    }

    #[test]
    fn every_step_of_any_job_learns() {
        for scheduler in [Scheduler::Linear, Scheduler::Cosine, Scheduler::Constant] {
            for total in 1..40 {
                for ratio in [0.0, 0.03, 0.5, 1.0] {
                    for rate in rates(total, ratio, scheduler) {
                        assert!(rate > 0.0 && rate <= 2.0, "{scheduler:?} {total} {ratio} {rate}");
                    }
                }
            }
        }
    }

    #[test]
    fn past_the_end_nothing_moves_back_up() {
        let spec = super::super::spec::tests::awkward_spec().training;
        assert!(learning_rate(1000, 10, &spec).abs() < 1e-18);
    }
}
