//! Losses of a step that come after its work was enqueued.

use super::ItemResult;
use super::metrics::StepMetrics;
use super::trainer::Stage;
use std::collections::VecDeque;

/// A step whose metrics are not complete.
#[derive(Debug, Default)]
pub(super) struct OpenStep {
    /// What is known.
    pub(super) metrics: StepMetrics,
    /// Its stages that wait for losses, in order.
    tallies: VecDeque<Tally>,
}

/// Losses of one stage.
#[derive(Debug)]
struct Tally {
    stage: Stage,
    /// Sequences whose losses have not come.
    left: usize,
    sums: ItemResult,
}

impl OpenStep {
    /// A stage of so many sequences begins.
    pub(super) fn expect(&mut self, stage: Stage, sequences: usize) {
        self.tallies.push_back(Tally { stage, left: sequences, sums: ItemResult::default() });
    }

    /// Whether losses are missing.
    pub(super) fn waits(&self) -> bool {
        !self.tallies.is_empty()
    }

    /// Adds what a sequence came to; the last one of a stage makes its metrics.
    pub(super) fn add(&mut self, result: &ItemResult) {
        let Some(tally) = self.tallies.front_mut() else { return };
        tally.left -= 1;
        tally.sums.loss += result.loss;
        tally.sums.correct += result.correct;
        tally.sums.labels += result.labels;
        if tally.left > 0 {
            return;
        }
        let Tally { stage, sums, .. } = *tally;
        self.tallies.pop_front();
        let loss = sums.loss / sums.labels as f64;
        let accuracy = sums.correct as f64 / sums.labels as f64;
        let metrics = &mut self.metrics;
        match stage {
            Stage::Train => (metrics.train_loss, metrics.train_accuracy) = (loss, accuracy),
            Stage::ValidateBatch => {
                (metrics.valid_loss, metrics.valid_accuracy) = (Some(loss), Some(accuracy));
            }
            Stage::ValidateAll => {
                metrics.full_valid_loss = Some(loss);
                metrics.full_valid_accuracy = Some(accuracy);
            }
        }
    }
}
