//! One job while it trains: which examples are due, what they came to, and what follows.
//!
//! An optimizer step is a barrier: the next step's examples are not due before this step's update,
//! so weights never change under an example. All else is free: examples may run in any micro-batch,
//! beside any other job's.
//!
//! What follows depends on which examples are *enqueued*, never on what they came to: the device
//! may be behind. Losses come later, and a step's metrics leave when all of them have.

use super::metrics::StepMetrics;
use super::order::{dropout_seed, step_examples, steps_per_epoch};
use super::schedule::learning_rate;
use super::tally::OpenStep;
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

/// What follows when a stage's last example is enqueued.
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
    /// Steps that wait for their losses, then the step under way.
    open: VecDeque<OpenStep>,
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
            open: VecDeque::new(),
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

    /// All work of a sequence is enqueued. `Some` when it was the stage's last.
    pub fn enqueued(&mut self) -> Option<Next> {
        self.running -= 1;
        if self.running > 0 || !self.queue.is_empty() {
            return None;
        }
        Some(match self.stage {
            Stage::Train => Next::Update(self.optimizer()),
            stage => self.after(stage),
        })
    }

    /// What a sequence came to; in the order in which they were enqueued.
    pub fn result(&mut self, result: &ItemResult) {
        if let Some(step) = self.open.iter_mut().find(|step| step.waits()) {
            step.add(result);
        }
    }

    /// Whether all losses of the oldest complete step have come.
    pub fn has_metrics(&self) -> bool {
        self.open.len() > 1 && !self.open[0].waits()
    }

    /// Metrics of the oldest complete step.
    pub fn take_metrics(&mut self) -> Option<StepMetrics> {
        if !self.has_metrics() {
            return None;
        }
        self.open.pop_front().map(|step| step.metrics)
    }

    /// Metrics of the step under way.
    fn metrics(&mut self) -> Option<&mut StepMetrics> {
        self.open.back_mut().map(|step| &mut step.metrics)
    }

    fn expect(&mut self, stage: Stage) {
        let sequences = self.queue.len();
        if let Some(step) = self.open.back_mut() {
            step.expect(stage, sequences);
        }
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
        let (step, total_steps) = (self.step, self.total_steps());
        if let Some(metrics) = self.metrics() {
            (metrics.step, metrics.total_steps) = (step, total_steps);
            metrics.learning_rate = learning_rate;
        }
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
                self.expect(Stage::ValidateBatch);
                return Next::Report;
            }
            if stage != Stage::ValidateAll && self.epoch_over() {
                self.stage = Stage::ValidateAll;
                self.queue = parts(&self.validation, 0..self.validation.len() as u32);
                self.expect(Stage::ValidateAll);
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

    /// What has to be kept of the complete step; the next step begins.
    pub fn report(&mut self) -> Due {
        let due = Due {
            resume: self.step.is_multiple_of(self.spec.training.checkpoint_every_steps),
            epoch: self.epoch_over(),
            finish: self.is_finished(),
        };
        self.begin_step();
        due
    }

    fn epoch_over(&self) -> bool {
        let steps = steps_per_epoch(self.examples.len(), self.spec.training.batch_size);
        self.step.is_multiple_of(steps)
    }

    fn begin_step(&mut self) {
        self.stage = Stage::Train;
        self.queue.clear();
        self.open.push_back(OpenStep::default());
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
        if let Some(metrics) = self.metrics() {
            metrics.tokens = tokens;
        }
        self.expect(Stage::Train);
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
