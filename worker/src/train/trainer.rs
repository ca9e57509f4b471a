//! One job while it trains: which examples are due, what they came to, and what follows.
//!
//! An optimizer step is a barrier: the next step's examples are not due before this step's update,
//! so weights never change under an example. All else is free: examples may run in any micro-batch,
//! beside any other job's.

use super::metrics::StepMetrics;
use super::order::{dropout_seed, step_examples, steps_per_epoch};
use super::schedule::learning_rate;
use super::{Example, Item, ItemResult, JobSpec, Kind, Sequence};
use kernels::AdamW;
use std::collections::VecDeque;
use std::sync::Arc;

/// Optimizer steps from one validation batch to the next.
const VALIDATE_EVERY: usize = 10;

/// What a job is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Examples of the optimizer step.
    Train,
    /// A batch of validation examples.
    ValidateBatch,
    /// All validation examples.
    ValidateAll,
}

/// What follows when a stage's last example is done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Next {
    /// Update the weights, then call [`Trainer::updated`].
    Update(AdamW),
    /// The step is complete: report it, then keep what is due.
    Report,
}

/// What has to be kept after a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// A resume point.
    pub resume: bool,
    /// A listed checkpoint: the epoch is over.
    pub epoch: bool,
    /// The job is over.
    pub finish: bool,
}

/// See the module.
pub struct Trainer {
    /// The job's numbers.
    pub spec: JobSpec,
    examples: Arc<Vec<Example>>,
    validation: Arc<Vec<Example>>,
    step: usize,
    stage: Stage,
    /// Example and sequence of it, in order.
    queue: VecDeque<(u32, u32)>,
    running: usize,
    step_labels: u64,
    sums: ItemResult,
    metrics: StepMetrics,
}

impl Trainer {
    /// A job that has completed `step` optimizer steps.
    pub fn new(
        spec: JobSpec,
        examples: Arc<Vec<Example>>,
        validation: Arc<Vec<Example>>,
        step: usize,
    ) -> Self {
        let mut trainer = Self {
            spec,
            examples,
            validation,
            step,
            stage: Stage::Train,
            queue: VecDeque::new(),
            running: 0,
            step_labels: 0,
            sums: ItemResult::default(),
            metrics: StepMetrics::default(),
        };
        trainer.begin_step();
        trainer
    }

    /// Completed optimizer steps.
    pub fn step(&self) -> usize {
        self.step
    }

    /// All optimizer steps of the job.
    pub fn total_steps(&self) -> usize {
        self.spec.training.total_steps(self.examples.len())
    }

    /// Whether nothing is left to train.
    pub fn is_finished(&self) -> bool {
        self.step >= self.total_steps()
    }

    /// What its due examples are for.
    pub fn kind(&self) -> Kind {
        if self.stage == Stage::Train { Kind::Train } else { Kind::Evaluate }
    }

    /// Rows of the due sequences that no micro-batch has yet, in order.
    pub fn due(&self) -> impl Iterator<Item = usize> {
        self.queue.iter().map(|&(example, part)| self.sequence(example, part).rows())
    }

    fn sequence(&self, example: u32, part: u32) -> &Sequence {
        let examples = match self.stage {
            Stage::Train => &self.examples,
            Stage::ValidateBatch | Stage::ValidateAll => &self.validation,
        };
        &examples[example as usize][part as usize]
    }

    /// Gives the next due sequence to a micro-batch.
    pub fn take(&mut self, job: u64, slot: usize) -> Option<(Item, &Sequence)> {
        let (example, part) = self.queue.pop_front()?;
        self.running += 1;
        let training = self.stage == Stage::Train;
        let seed = dropout_seed(self.spec.training.seed, self.step as u64, example);
        let item = Item {
            job,
            slot,
            rank: self.spec.lora.rank,
            dropout_seed: seed.wrapping_add(u64::from(part)),
            dropout: if training { self.spec.lora.dropout as f32 } else { 0.0 },
            scale: if training { 1.0 / self.step_labels as f32 } else { 0.0 },
        };
        Some((item, self.sequence(example, part)))
    }

    /// A sequence is done. `Some` when it was the stage's last.
    pub fn done(&mut self, result: &ItemResult) -> Option<Next> {
        self.running -= 1;
        self.sums.loss += result.loss;
        self.sums.correct += result.correct;
        self.sums.labels += result.labels;
        if self.running > 0 || !self.queue.is_empty() {
            return None;
        }
        let sums = std::mem::take(&mut self.sums);
        let loss = sums.loss / sums.labels as f64;
        let accuracy = sums.correct as f64 / sums.labels as f64;
        match self.stage {
            Stage::Train => {
                self.metrics.train_loss = loss;
                self.metrics.train_accuracy = accuracy;
                return Some(Next::Update(self.optimizer()));
            }
            Stage::ValidateBatch => {
                self.metrics.valid_loss = Some(loss);
                self.metrics.valid_accuracy = Some(accuracy);
            }
            Stage::ValidateAll => {
                self.metrics.full_valid_loss = Some(loss);
                self.metrics.full_valid_accuracy = Some(accuracy);
            }
        }
        Some(self.after(self.stage))
    }

    fn optimizer(&self) -> AdamW {
        let training = &self.spec.training;
        let step = self.step + 1;
        AdamW {
            learning_rate: learning_rate(step, self.total_steps(), training),
            beta1: training.adam_beta1,
            beta2: training.adam_beta2,
            eps: super::spec::ADAM_EPS,
            weight_decay: training.weight_decay,
            max_grad_norm: training.max_grad_norm,
            step: step as u64,
        }
    }

    /// The weights were updated: counts the step and says what follows.
    pub fn updated(&mut self, learning_rate: f64) -> Next {
        self.step += 1;
        self.metrics.step = self.step;
        self.metrics.total_steps = self.total_steps();
        self.metrics.learning_rate = learning_rate;
        self.after(Stage::Train)
    }

    /// Starts the stage that follows `stage`, or says that the step is complete.
    fn after(&mut self, stage: Stage) -> Next {
        if !self.validation.is_empty() {
            let batch_due = self.step.is_multiple_of(VALIDATE_EVERY) || self.is_finished();
            if stage == Stage::Train && batch_due {
                self.stage = Stage::ValidateBatch;
                let n = self.validation.len();
                let size = self.spec.training.batch_size.min(n);
                let first = self.step / VALIDATE_EVERY * size;
                let due = (first..first + size).map(|i| (i % n) as u32);
                self.queue = parts(&self.validation, due);
                return Next::Report;
            }
            if stage != Stage::ValidateAll && self.epoch_over() {
                self.stage = Stage::ValidateAll;
                self.queue = parts(&self.validation, 0..self.validation.len() as u32);
                return Next::Report;
            }
        }
        self.stage = Stage::Train;
        Next::Report
    }

    /// Whether the step at hand is complete: nothing is due and nothing runs.
    pub fn step_complete(&self) -> bool {
        self.queue.is_empty() && self.running == 0
    }

    /// The complete step's metrics, and what has to be kept; the next step begins.
    pub fn report(&mut self) -> (StepMetrics, Due) {
        let metrics = std::mem::take(&mut self.metrics);
        let due = Due {
            resume: self.step.is_multiple_of(self.spec.training.checkpoint_every_steps),
            epoch: self.epoch_over(),
            finish: self.is_finished(),
        };
        self.begin_step();
        (metrics, due)
    }

    fn epoch_over(&self) -> bool {
        let steps = steps_per_epoch(self.examples.len(), self.spec.training.batch_size);
        self.step.is_multiple_of(steps)
    }

    fn begin_step(&mut self) {
        self.stage = Stage::Train;
        self.queue.clear();
        if self.is_finished() {
            return;
        }
        let training = &self.spec.training;
        let n = self.examples.len() as u32;
        let due = step_examples(training.seed, self.step, n, training.batch_size);
        self.queue = parts(&self.examples, due);
        let (mut labels, mut tokens) = (0, 0);
        for (example, part) in &self.queue {
            let sequence = &self.examples[*example as usize][*part as usize];
            labels += sequence.labels() as u64;
            tokens += sequence.tokens.len() as u64;
        }
        self.step_labels = labels;
        self.metrics.tokens = tokens;
    }

    /// Takes nothing more; what runs is finished without effect.
    pub fn abandon(&mut self) {
        self.queue.clear();
    }
}

/// All sequences of some examples, in order.
fn parts(examples: &[Example], due: impl IntoIterator<Item = u32>) -> VecDeque<(u32, u32)> {
    let of = |example: u32| {
        (0..examples[example as usize].len() as u32).map(move |part| (example, part))
    };
    due.into_iter().flat_map(of).collect()
}
