//! Jobs in the engine as plain data: who is here, what each holds, and which examples go next.

use super::backlog::Work;
use super::command::{JobEvent, Purpose, Snapshot};
use crate::adapters::layout::AdapterLayout;
use crate::adapters::pages::{PageRuns, Run};
use crate::adapters::registry::Slot;
use crate::model::Batch;
use crate::train::pack::{Budget, Packer, ReadyJob, Waiting};
use crate::train::{Cursor, Item, Kind, Sequence, Slice, Trainer};
use kernels::{Error, Result, Ticket};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::thread::JoinHandle;

/// A job's news that waits for copies from the device. They leave in order.
pub(super) enum Pending {
    Step { norm: Option<Ticket<Vec<f32>>> },
    Snapshot { purpose: Purpose, step: usize, state: JoinHandle<Result<[Vec<f32>; 3]>> },
}

impl Pending {
    /// Whether all it tells has come; a step's losses have where the trainer has its metrics.
    pub(super) fn is_ready(&self, trainer: &Trainer) -> bool {
        match self {
            Self::Step { norm } => {
                trainer.has_metrics() && norm.as_ref().is_none_or(Ticket::is_ready)
            }
            Self::Snapshot { state, .. } => state.is_finished(),
        }
    }

    pub(super) fn into_event(self, trainer: &mut Trainer) -> Result<JobEvent> {
        match self {
            Self::Step { norm } => {
                let mut metrics = trainer.take_metrics().unwrap_or_default();
                if let Some(norm) = norm {
                    let norm = norm.wait()?;
                    metrics.skipped = norm[1] == 0.0;
                    metrics.grad_norm = f64::from(norm[0]);
                }
                Ok(JobEvent::Step(metrics))
            }
            Self::Snapshot { purpose, step, state } => {
                let state = state.join().map_err(|_| ended("the thread of a snapshot panicked"))?;
                let [params, m, v] = state?;
                Ok(JobEvent::Snapshot(Box::new(Snapshot { purpose, step, params, m, v })))
            }
        }
    }
}

/// Waits for a job's state on a thread of its own: it is large, and the loop has other work.
pub(super) fn fetch(
    [params, m, v]: [Ticket<Vec<f32>>; 3],
) -> Result<JoinHandle<Result<[Vec<f32>; 3]>>> {
    let wait = move || Ok([params.wait()?, m.wait()?, v.wait()?]);
    let thread = std::thread::Builder::new().name("snapshot".to_owned());
    thread.spawn(wait).map_err(|error| ended(&format!("no thread for a snapshot: {error}")))
}

fn ended(why: &str) -> Error {
    Error::Device(why.to_owned())
}

/// What a job is doing here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// Trains.
    Active,
    /// Is asked to pause: the step whose update is made is completed first.
    Pausing,
    /// Trains no more; its published weights stay until it is stopped.
    Resting,
    /// Leaves as soon as the micro-batch in flight no longer needs it.
    Leaving,
}

pub(super) struct Job {
    pub(super) id: String,
    pub(super) trainer: Trainer,
    pub(super) layout: Arc<AdapterLayout>,
    /// Run in the training pool, while it trains.
    pub(super) run: Option<Run>,
    /// Slot of the weights that train, likewise.
    pub(super) slot: Option<Slot>,
    /// Slots of published versions; one is current, the other free to be written when unread.
    pub(super) serving: [Slot; 2],
    pub(super) current: usize,
    pub(super) version: usize,
    pub(super) norm: Option<Ticket<Vec<f32>>>,
    pub(super) news: VecDeque<Pending>,
    pub(super) life: Life,
    /// Gives nothing to the next micro-batch until it is let go on.
    pub(super) held: bool,
}

impl Job {
    /// Whether its due examples may go into the next micro-batch. One that is to pause completes
    /// its step.
    fn is_ready(&self) -> bool {
        self.life != Life::Leaving && (!self.held || self.life == Life::Pausing)
    }
}

/// All jobs of the engine.
pub struct Training {
    pub(super) jobs: BTreeMap<u64, Job>,
    pub(super) next: u64,
    pub(super) runs: PageRuns,
    pub(super) packer: Packer,
    pub(super) cursor: Option<Cursor>,
    /// Micro-batches whose work is all enqueued and whose losses have not come, oldest first.
    pub(super) settling: VecDeque<Cursor>,
    pub(super) last_kind: Kind,
}

impl Training {
    /// No job, `pages` pages of training pool.
    pub fn new(pages: usize) -> Self {
        Self {
            jobs: BTreeMap::new(),
            next: 0,
            runs: PageRuns::new(pages),
            packer: Packer::default(),
            cursor: None,
            settling: VecDeque::new(),
            last_kind: Kind::Evaluate,
        }
    }

    /// Jobs that hold training memory.
    pub fn jobs(&self) -> usize {
        self.jobs.values().filter(|job| job.run.is_some()).count()
    }

    /// Whether there is nothing to compute and nothing to tell.
    pub fn is_idle(&self) -> bool {
        self.cursor.is_none()
            && self.settling.is_empty()
            && self.jobs.values().all(|job| {
                job.news.is_empty()
                    && job.life != Life::Leaving
                    && (!job.is_ready() || job.trainer.due().next().is_none())
            })
    }

    /// Holds a job, or lets it go on.
    pub(super) fn hold(&mut self, id: &str, held: bool) {
        if let Some(job) = self.jobs.values_mut().find(|job| job.id == id) {
            job.held = held;
        }
    }

    /// Slot and step of the weights under which a job answers now.
    pub fn published(&self, id: &str) -> Option<(Slot, usize)> {
        let job = self.jobs.values().find(|job| job.id == id && job.life != Life::Leaving)?;
        Some((job.serving[job.current], job.version))
    }

    /// Step of the published weights in a slot, if a job answers with it now.
    pub fn version_in(&self, slot: Slot) -> Option<usize> {
        let current = |job: &&Job| job.serving[job.current] == slot;
        self.jobs.values().find(current).map(|job| job.version)
    }

    /// The next piece of work after forward, of the micro-batch in flight.
    pub(super) fn slice(&self, loss_rows: usize) -> Option<Slice> {
        self.cursor.as_ref()?.slice(loss_rows)
    }

    /// What the device has to do for a slice; none: nothing.
    pub(super) fn work(&self, slice: Slice) -> Option<Work> {
        match slice {
            Slice::Loss { count, .. } => Some(Work::Loss { rows: count }),
            Slice::Layer(_) => Some(Work::Layer { rows: self.cursor.as_ref()?.rows() }),
            Slice::Settle => None,
        }
    }

    /// Rows of the micro-batch that have not gone forward.
    pub fn forward_left(&self) -> usize {
        self.cursor.as_ref().map_or(0, Cursor::forward_left)
    }

    /// Puts the next rows of the micro-batch into an empty batch.
    pub fn fill(&self, batch: &mut Batch, rows: usize) {
        if let Some(cursor) = &self.cursor {
            cursor.fill(batch, rows);
        }
    }

    /// Those rows went forward.
    pub fn advance(&mut self, rows: usize) {
        if let Some(cursor) = &mut self.cursor {
            cursor.advance(rows);
        }
    }

    pub(super) fn find(&self, id: &str) -> Option<u64> {
        self.jobs.iter().find(|(_, job)| job.id == id).map(|(number, _)| *number)
    }

    /// Which examples go next: of jobs that train, then of jobs that evaluate, in turn.
    pub(super) fn compose(&mut self, budget: &Budget) -> Option<(Kind, Vec<(Item, Sequence)>)> {
        let other = if self.last_kind == Kind::Train { Kind::Evaluate } else { Kind::Train };
        let kind = [other, self.last_kind].into_iter().find(|kind| {
            self.jobs.values().any(|job| {
                job.is_ready() && job.trainer.kind() == *kind && job.trainer.due().next().is_some()
            })
        })?;
        self.last_kind = kind;
        let due = |job: &Job| -> Vec<Waiting> {
            let mut rows_left = budget.arena_rows;
            let within = |rows: &usize| {
                let fits = rows_left > 0;
                rows_left = rows_left.saturating_sub(*rows);
                fits
            };
            let due = job.trainer.due().take_while(within).enumerate();
            due.map(|(at, rows)| Waiting { example: at as u32, rows }).collect()
        };
        let ready: Vec<(u64, usize, Vec<Waiting>)> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.is_ready() && job.trainer.kind() == kind)
            .map(|(number, job)| (*number, job.layout.shape().rank, due(job)))
            .collect();
        let ready: Vec<ReadyJob<'_>> = ready
            .iter()
            .map(|(number, rank, waiting)| ReadyJob { job: *number as usize, rank: *rank, waiting })
            .collect();
        // Examples are cut to the arena before a job starts, so none is too large.
        let placed = self.packer.pack(&ready, budget).expect("examples fit the arena");
        let mut items = Vec::with_capacity(placed.len());
        for place in placed {
            let Some(job) = self.jobs.get_mut(&(place.job as u64)) else { continue };
            let Some(slot) = job.slot else { continue };
            let Some((item, sequence)) = job.trainer.take(place.job as u64, slot) else {
                continue;
            };
            items.push((item, sequence.clone()));
        }
        Some((kind, items))
    }
}
