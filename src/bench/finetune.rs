//! Fine-tuning through the engine, timed by its finished optimizer steps.

use super::rig::{Rig, layout};
use anyhow::{bail, ensure};
use kernels::Module;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use worker::adapters::{Init, init_adapter};
use worker::engine::command::{Command, Event, JobEvent, JobStart};
use worker::train::spec::{Init as SpecInit, Scheduler};
use worker::train::{Example, JobSpec, LoraSpec, TrainingSpec};

/// Optimizer steps of each job before the clock starts.
const WARM_STEPS: usize = 2;
/// Epochs: more than any measurement lasts.
const EPOCHS: usize = 50;

/// A job to measure.
#[derive(Clone, Debug)]
pub struct Training {
    /// Rank of its adapter.
    pub rank: usize,
    /// Modules it adapts.
    pub targets: Vec<Module>,
    /// Learning rate.
    pub learning_rate: f64,
    /// Examples per optimizer step.
    pub batch_size: usize,
    /// What it trains on.
    pub examples: Arc<Vec<Example>>,
}

impl Training {
    /// An adapter on all modules.
    pub fn all(rank: usize, batch_size: usize, examples: Arc<Vec<Example>>) -> Self {
        let targets = Module::ALL.to_vec();
        Self { rank, targets, learning_rate: 2e-4, batch_size, examples }
    }

    /// The four unlike jobs of F3 on the same examples.
    pub fn four(batch_size: usize, examples: &Arc<Vec<Example>>) -> Vec<Self> {
        let job = |rank, targets: &[Module], learning_rate| Self {
            rank,
            targets: targets.to_vec(),
            learning_rate,
            batch_size,
            examples: examples.clone(),
        };
        let attention = [Module::Q, Module::K, Module::V, Module::O];
        vec![
            job(8, &Module::ALL, 1e-4),
            job(16, &Module::ALL, 2e-4),
            job(32, &attention, 3e-4),
            job(64, &[Module::Gate, Module::Up, Module::Down], 4e-4),
        ]
    }

    fn start(&self, rig: &Rig, id: &str, seed: u64) -> anyhow::Result<JobStart> {
        let layout = layout(&rig.config, self.rank, &self.targets)?;
        let lora = LoraSpec {
            rank: self.rank,
            alpha: 2.0 * self.rank as f64,
            dropout: 0.0,
            targets: self.targets.clone(),
            use_rslora: false,
            init: SpecInit::Default,
        };
        let training = TrainingSpec {
            n_epochs: EPOCHS,
            batch_size: self.batch_size,
            learning_rate: self.learning_rate,
            scheduler: Scheduler::Linear,
            warmup_ratio: 0.03,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            max_grad_norm: 1.0,
            max_sequence_length: usize::MAX,
            checkpoint_every_steps: usize::MAX,
            seed,
        };
        Ok(JobStart {
            params: init_adapter(&layout, seed, Init::Default),
            spec: JobSpec { job_id: id.to_owned(), lora, training },
            layout,
            examples: self.examples.clone(),
            validation: Arc::default(),
            step: 0,
            moments: None,
        })
    }
}

/// What one job did between its first and its last step on the clock.
#[derive(Clone, Debug)]
pub struct Trained {
    /// Optimizer steps.
    pub steps: usize,
    /// Their template tokens.
    pub tokens: u64,
    /// How long they took.
    pub time: Duration,
    /// Median time of one.
    pub step: Duration,
    /// Loss of the first and the last step seen.
    pub losses: (f64, f64),
}

impl Trained {
    /// Template tokens per second.
    pub fn tokens_per_sec(&self) -> f64 {
        self.tokens as f64 / self.time.as_secs_f64()
    }

    /// Optimizer steps per second.
    pub fn steps_per_sec(&self) -> f64 {
        self.steps as f64 / self.time.as_secs_f64()
    }
}

/// Steps of one job as they were reported.
#[derive(Default)]
struct Record {
    marks: Vec<(Instant, u64)>,
    losses: Vec<f64>,
}

impl Record {
    /// The steps after the clock started; each counts from the step before it.
    fn sum(&self, start: Instant) -> Option<Trained> {
        let first = self.marks.iter().position(|(at, _)| *at >= start)?;
        let marks = &self.marks[first..];
        let (begin, end) = (marks.first()?.0, marks.last()?.0);
        let mut gaps: Vec<Duration> = marks.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
        gaps.sort_unstable();
        Some(Trained {
            steps: gaps.len(),
            tokens: marks[1..].iter().map(|(_, tokens)| tokens).sum(),
            time: end - begin,
            step: super::decode::median(&gaps)?,
            losses: (*self.losses.first()?, *self.losses.last()?),
        })
    }
}

/// Trains all jobs at once for at least `seconds` after all are warm; only whole optimizer steps
/// count, and only while all jobs train.
pub fn train(rig: &mut Rig, jobs: &[Training], seconds: f64) -> anyhow::Result<Vec<Trained>> {
    let mut records = BTreeMap::new();
    for (number, job) in jobs.iter().enumerate() {
        let id = format!("job-{number}");
        let start = job.start(rig, &id, number as u64 + 1)?;
        rig.send(Command::StartJob(Box::new(start)))?;
        records.insert(id, Record::default());
    }
    let enough = Duration::from_secs_f64(seconds);
    let mut start = None;
    loop {
        take_step(rig, &mut records)?;
        let now = Instant::now();
        if records.values().any(|record| record.marks.len() < WARM_STEPS) {
            continue;
        }
        // A job's last warm-up step is its first mark on the clock only for the job that came last.
        let start =
            *start.get_or_insert(records.values().filter_map(last_mark).max().unwrap_or(now));
        let sums: Option<Vec<Trained>> = records.values().map(|record| record.sum(start)).collect();
        if let Some(sums) = sums.filter(|_| now - start >= enough) {
            stop(rig, records.keys())?;
            return Ok(sums);
        }
    }
}

fn last_mark(record: &Record) -> Option<Instant> {
    record.marks.last().map(|(at, _)| *at)
}

/// Waits for one optimizer step of any job.
fn take_step(rig: &mut Rig, records: &mut BTreeMap<String, Record>) -> anyhow::Result<()> {
    loop {
        let (at, event) = rig.next()?;
        let Event::Job(id, event) = event else { continue };
        let Some(record) = records.get_mut(&id) else { continue };
        match event {
            JobEvent::NoRoom => bail!("there is no memory for {id}"),
            JobEvent::Step(metrics) => {
                ensure!(!metrics.skipped, "step {} of {id}: gradient not finite", metrics.step);
                record.marks.push((at, metrics.tokens));
                record.losses.push(metrics.train_loss);
                return Ok(());
            }
            JobEvent::Stopped => bail!("{id} stopped by itself"),
            JobEvent::Started | JobEvent::Snapshot(_) => {}
        }
    }
}

fn stop<'a>(rig: &mut Rig, ids: impl Iterator<Item = &'a String>) -> anyhow::Result<()> {
    let mut left = 0;
    for id in ids {
        rig.send(Command::StopJob(id.clone()))?;
        left += 1;
    }
    while left > 0 {
        if let (_, Event::Job(_, JobEvent::Stopped)) = rig.next()? {
            left -= 1;
        }
    }
    Ok(())
}
