//! Small jobs: random examples, every number chosen so that runs are short and steps visible.

use super::{Adapter, Random};
use kernels::Module;
use std::sync::Arc;
use worker::engine::command::{JobStart, Snapshot};
use worker::train::spec::{Init, Scheduler};
use worker::train::{Example, JobSpec, LoraSpec, Sequence, TrainingSpec};

/// A job with its data.
#[derive(Clone)]
pub struct Job {
    /// Its numbers.
    pub spec: JobSpec,
    /// Where it starts.
    pub adapter: Adapter,
    /// Training examples.
    pub examples: Arc<Vec<Example>>,
    /// Validation examples.
    pub validation: Arc<Vec<Example>>,
    /// Where it goes on.
    pub from: Option<Snapshot>,
}

impl Job {
    /// On a golden base; 3 epochs of 6 examples, 2 at a time: 9 steps.
    pub fn new(id: &str, base: &str, rank: usize, targets: &[Module]) -> Self {
        let seed = id.bytes().map(u64::from).sum();
        let mut random = Random::new(seed);
        let lora = LoraSpec {
            rank,
            alpha: 2.0 * rank as f64,
            dropout: 0.1,
            targets: targets.to_vec(),
            use_rslora: false,
            init: Init::Default,
        };
        let training = TrainingSpec {
            n_epochs: 3,
            batch_size: 2,
            learning_rate: 0.02,
            scheduler: Scheduler::Linear,
            warmup_ratio: 0.1,
            weight_decay: 0.01,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            max_grad_norm: 1.0,
            max_sequence_length: 64,
            checkpoint_every_steps: 100,
            seed,
        };
        Self {
            spec: JobSpec { job_id: id.to_owned(), lora, training },
            adapter: Adapter::random(base, rank, targets, seed),
            examples: Arc::new((0..6).map(|_| example(&mut random)).collect()),
            validation: Arc::new(Vec::new()),
            from: None,
        }
    }

    /// The same job, going on from a state it handed out.
    pub fn resumed(&self, from: &Snapshot) -> Self {
        Self { from: Some(from.clone()), ..self.clone() }
    }

    /// The command's content.
    pub fn start(&self) -> JobStart {
        let from = self.from.clone();
        JobStart {
            spec: self.spec.clone(),
            layout: self.adapter.layout.clone(),
            examples: self.examples.clone(),
            validation: self.validation.clone(),
            step: from.as_ref().map_or(0, |from| from.step),
            params: from.as_ref().map_or(self.adapter.values.to_vec(), |from| from.params.clone()),
            moments: from.map(|from| (from.m, from.v)),
        }
    }
}

/// One sequence, now and then two.
fn example(random: &mut Random) -> Example {
    let parts = if random.below(4) == 0 { 2 } else { 1 };
    let sequence = |random: &mut Random| {
        let length = 3 + random.below(18);
        let trained = (0..length).map(|at| at % 3 != 0).collect();
        Sequence { tokens: random.tokens(length), trained }
    };
    (0..parts).map(|_| sequence(random)).collect()
}

/// Validation examples of their own.
pub fn validation(count: usize) -> Arc<Vec<Example>> {
    let mut random = Random::new(99);
    Arc::new((0..count).map(|_| example(&mut random)).collect())
}
