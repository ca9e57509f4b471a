//! Jobs in the engine: their memory, the micro-batch in flight, updates, published weights, and
//! the order in which their news leave.

use super::Engine;
use super::command::{AdapterWeights, Event, JobEvent, JobStart, Purpose, Snapshot};
use super::pace::Allowance;
use crate::adapters::layout::AdapterLayout;
use crate::adapters::pages::{PageRuns, Run};
use crate::adapters::registry::Slot;
use crate::model::Batch;
use crate::train::pack::{Budget, Packer, ReadyJob, Waiting};
use crate::train::{
    Cursor, Item, ItemResult, JobSpec, Kind, Next, Sequence, Slice, StepMetrics, Trainer,
};
use kernels::tables::PAGE;
use kernels::{AdamW, AdamWState, Device, In, Out, Result, Ticket};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

/// A job's news that waits for copies from the device. They leave in order.
enum Pending {
    Step { metrics: StepMetrics, norm: Option<Ticket<Vec<f32>>> },
    Snapshot { purpose: Purpose, step: usize, state: [Ticket<Vec<f32>>; 3] },
}

impl Pending {
    fn is_ready(&self) -> bool {
        match self {
            Self::Step { norm, .. } => norm.as_ref().is_none_or(Ticket::is_ready),
            Self::Snapshot { state, .. } => state.iter().all(Ticket::is_ready),
        }
    }

    fn into_event(self) -> Result<JobEvent> {
        match self {
            Self::Step { mut metrics, norm } => {
                if let Some(norm) = norm {
                    let norm = norm.wait()?;
                    metrics.skipped = norm[1] == 0.0;
                    metrics.grad_norm = f64::from(norm[0]);
                }
                Ok(JobEvent::Step(metrics))
            }
            Self::Snapshot { purpose, step, state: [params, m, v] } => {
                let (params, m, v) = (params.wait()?, m.wait()?, v.wait()?);
                Ok(JobEvent::Snapshot(Box::new(Snapshot { purpose, step, params, m, v })))
            }
        }
    }
}

/// What a job is doing here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    /// Trains.
    Active,
    /// Is asked to pause: the step whose update is made is completed first.
    Pausing,
    /// Trains no more; its published weights stay until it is stopped.
    Resting,
    /// Leaves as soon as the micro-batch in flight no longer needs it.
    Leaving,
}

struct Job {
    id: String,
    trainer: Trainer,
    layout: Arc<AdapterLayout>,
    /// Run in the training pool, while it trains.
    run: Option<Run>,
    /// Slot of the weights that train, likewise.
    slot: Option<Slot>,
    /// Slots of published versions; one is current, the other free to be written when unread.
    serving: [Slot; 2],
    current: usize,
    version: usize,
    norm: Option<Ticket<Vec<f32>>>,
    news: VecDeque<Pending>,
    life: Life,
}

/// All jobs of the engine.
pub struct Training {
    jobs: BTreeMap<u64, Job>,
    next: u64,
    runs: PageRuns,
    packer: Packer,
    cursor: Option<Cursor>,
    last_kind: Kind,
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
            && self.jobs.values().all(|job| {
                job.news.is_empty()
                    && job.life != Life::Leaving
                    && job.trainer.due().next().is_none()
            })
    }

    /// Slot and step of the weights under which a job answers now.
    pub fn published(&self, id: &str) -> Option<(Slot, usize)> {
        let job = self.jobs.values().find(|job| job.id == id && job.life != Life::Leaving)?;
        Some((job.serving[job.current], job.version))
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

    fn find(&self, id: &str) -> Option<u64> {
        self.jobs.iter().find(|(_, job)| job.id == id).map(|(number, _)| *number)
    }

    /// Which examples go next: of jobs that train, then of jobs that evaluate, in turn.
    fn compose(&mut self, budget: &Budget) -> Option<(Kind, Vec<(Item, Sequence)>)> {
        let other = if self.last_kind == Kind::Train { Kind::Evaluate } else { Kind::Train };
        let kind = [other, self.last_kind].into_iter().find(|kind| {
            self.jobs.values().any(|job| {
                job.life != Life::Leaving
                    && job.trainer.kind() == *kind
                    && job.trainer.due().next().is_some()
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
            .filter(|(_, job)| job.life != Life::Leaving && job.trainer.kind() == kind)
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

impl<D: Device> Engine<D> {
    pub(super) fn start_job(&mut self, start: JobStart) -> Result<()> {
        let id = start.spec.job_id.clone();
        let event = match self.place_job(start)? {
            true => JobEvent::Started,
            false => JobEvent::NoRoom,
        };
        self.emit(Event::Job(id, event));
        Ok(())
    }

    /// Takes a job's memory: a run of the training pool, a slot that trains and two that serve.
    fn place_job(&mut self, start: JobStart) -> Result<bool> {
        let JobStart { spec, layout, examples, validation, step, params, moments } = start;
        if self.training.jobs() >= self.options.max_jobs
            || self.training.find(&spec.job_id).is_some()
        {
            return Ok(false);
        }
        let Some(run) = self.training.runs.take(layout.pages()) else { return Ok(false) };
        let weights = AdapterWeights { layout: layout.clone(), values: Arc::new(params) };
        let Some(slots) = self.attach_job(&spec, &weights, run)? else {
            self.training.runs.give(run);
            return Ok(false);
        };
        let moments = moments.as_ref().map(|(m, v)| (m.as_slice(), v.as_slice()));
        let model = &mut self.model;
        model.train.load(&model.device, run.page, &weights.values, moments)?;
        let [slot, serving @ ..] = slots;
        let job = Job {
            id: spec.job_id.clone(),
            trainer: Trainer::new(spec, examples, validation, step),
            layout,
            run: Some(run),
            slot: Some(slot),
            serving,
            current: 0,
            version: step,
            norm: None,
            news: VecDeque::new(),
            life: Life::Active,
        };
        let number = self.training.next;
        self.training.next += 1;
        let finished = job.trainer.is_finished();
        self.training.jobs.insert(number, job);
        if finished {
            self.snapshot(number, Purpose::Finish)?;
            self.rest(number)?;
        }
        Ok(true)
    }

    fn attach_job(
        &mut self,
        spec: &JobSpec,
        weights: &AdapterWeights,
        run: Run,
    ) -> Result<Option<[Slot; 3]>> {
        let mut slots = Vec::with_capacity(3);
        for part in ["train", "a", "b"] {
            let grad_page = (part == "train").then_some(run.page as u32);
            let key = format!("{}#{part}", spec.job_id);
            let Some(slot) = self.attach(&key, weights, grad_page)? else {
                for slot in slots {
                    self.retire(slot)?;
                }
                return Ok(None);
            };
            self.registry.pin(slot, true);
            slots.push(slot);
        }
        Ok(slots.try_into().ok())
    }

    pub(super) fn pause_job(&mut self, id: &str) -> Result<()> {
        let Some(number) = self.training.find(id) else { return Ok(()) };
        let Some(job) = self.training.jobs.get_mut(&number) else { return Ok(()) };
        if job.life != Life::Active {
            return Ok(());
        }
        if job.trainer.kind() == Kind::Evaluate {
            job.life = Life::Pausing;
            return Ok(());
        }
        // In the middle of a step the masters and moments still are those of its start.
        self.snapshot(number, Purpose::Pause)?;
        self.rest(number)
    }

    pub(super) fn stop_job(&mut self, id: &str) -> Result<()> {
        let Some(number) = self.training.find(id) else {
            self.emit(Event::Job(id.to_owned(), JobEvent::Stopped));
            return Ok(());
        };
        if let Some(job) = self.training.jobs.get_mut(&number) {
            job.life = Life::Leaving;
            job.news.clear();
            job.trainer.abandon();
        }
        Ok(())
    }

    /// Starts a micro-batch when none is in flight and examples are due.
    pub(super) fn begin_micro(&mut self) -> Result<()> {
        if self.training.cursor.is_some() {
            return Ok(());
        }
        let sizes = &self.model.sizes;
        let budget = Budget {
            target_rows: self.options.target_rows.min(sizes.arena_rows),
            arena_rows: sizes.arena_rows,
            arena_rank_rows: sizes.arena_rank_rows,
        };
        let Some((kind, items)) = self.training.compose(&budget) else { return Ok(()) };
        if items.is_empty() {
            return Ok(());
        }
        if self.options.poison {
            self.model.poison_arena()?;
        }
        let items = items.iter().map(|(item, sequence)| (item.clone(), sequence)).collect();
        let cursor = Cursor::new(kind, self.model.config.layers, items);
        self.model.begin_micro(cursor.tables())?;
        self.training.cursor = Some(cursor);
        Ok(())
    }

    /// Loss and backward slices, as many as the allowance holds.
    pub(super) fn train_slices(&mut self, allowance: Allowance) -> Result<()> {
        let start = Instant::now();
        let mut done = 0;
        while self.pace.another_slice(allowance, start.elapsed(), done) {
            let before = start.elapsed();
            if !self.train_slice()? {
                break;
            }
            self.pace.saw_slice(start.elapsed() - before);
            done += 1;
        }
        Ok(())
    }

    /// One slice. False: there is none now.
    fn train_slice(&mut self) -> Result<bool> {
        let Some(cursor) = &mut self.training.cursor else { return Ok(false) };
        match cursor.slice(self.model.sizes.loss_rows) {
            None => return Ok(false),
            Some(Slice::Loss { first, count }) => {
                let gradient = cursor.kind() == Kind::Train;
                let ticket = self.model.loss_slice(first, count, gradient)?;
                cursor.loss_enqueued(count, ticket);
            }
            Some(Slice::Layer(layer)) => {
                self.model.backward_layer(layer, cursor.extent())?;
                cursor.layer_enqueued();
            }
            Some(Slice::Settle) => {
                let Some(results) = cursor.settle()? else { return Ok(false) };
                self.training.cursor = None;
                for result in results {
                    self.sequence_done(&result)?;
                }
            }
        }
        Ok(true)
    }

    fn sequence_done(&mut self, result: &ItemResult) -> Result<()> {
        let Some(job) = self.training.jobs.get_mut(&result.job) else { return Ok(()) };
        if matches!(job.life, Life::Leaving | Life::Resting) {
            return Ok(());
        }
        match job.trainer.done(result) {
            None => return Ok(()),
            Some(Next::Report) => {}
            Some(Next::Update(step)) => {
                self.update(result.job, step)?;
                self.publish(result.job)?;
            }
        }
        let Some(job) = self.training.jobs.get_mut(&result.job) else { return Ok(()) };
        if job.trainer.step_complete() {
            self.report(result.job)?;
        }
        Ok(())
    }

    /// The optimizer step of one job: clip, AdamW, fresh gradients.
    fn update(&mut self, number: u64, step: AdamW) -> Result<()> {
        let Some(job) = self.training.jobs.get_mut(&number) else { return Ok(()) };
        let (Some(run), Some(slot)) = (job.run, job.slot) else { return Ok(()) };
        let Some(resident) = self.registry.get(slot) else { return Ok(()) };
        let (start, len) = (run.page * PAGE, job.layout.len());
        let weights = resident.run.page * PAGE;
        let device = &self.model.device;
        let (train, pool) = (&mut self.model.train, &mut self.model.pool);
        device.grad_norm(Out::all(&mut train.norm), In::range(&train.grads, start, len))?;
        let state = AdamWState {
            params: Out::range(&mut train.params, start, len),
            grads: In::range(&train.grads, start, len),
            m: Out::range(&mut train.m, start, len),
            v: Out::range(&mut train.v, start, len),
            weights: Out::range(&mut pool.weights, weights, len),
            norm: In::all(&train.norm),
        };
        device.adamw(state, step)?;
        device.fill_wide(Out::range(&mut train.grads, start, len), 0.0)?;
        job.norm = Some(device.download_wide(In::all(&train.norm))?);
        job.trainer.updated(step.learning_rate);
        Ok(())
    }

    /// Copies the trained weights into the serving slot that is not current, if nobody reads it.
    fn publish(&mut self, number: u64) -> Result<()> {
        let Some(job) = self.training.jobs.get_mut(&number) else { return Ok(()) };
        let other = 1 - job.current;
        let page = |slot: Slot| self.registry.get(slot).map(|resident| resident.run.page);
        let (Some(from), Some(to)) = (job.slot.and_then(page), page(job.serving[other])) else {
            return Ok(());
        };
        if self.registry.readers(job.serving[other]) > 0 {
            return Ok(());
        }
        self.model.pool.copy(&self.model.device, from, to, job.layout.len())?;
        job.current = other;
        job.version = job.trainer.step();
        Ok(())
    }

    /// A step is complete: its metrics leave, then the states that are due.
    fn report(&mut self, number: u64) -> Result<()> {
        let Some(job) = self.training.jobs.get_mut(&number) else { return Ok(()) };
        let (metrics, due) = job.trainer.report();
        let norm = job.norm.take();
        let pausing = job.life == Life::Pausing;
        job.news.push_back(Pending::Step { metrics, norm });
        if due.finish {
            self.snapshot(number, Purpose::Finish)?;
            return self.rest(number);
        }
        if due.epoch {
            self.snapshot(number, Purpose::Epoch)?;
        } else if due.resume && !pausing {
            self.snapshot(number, Purpose::Resume)?;
        }
        if pausing {
            self.snapshot(number, Purpose::Pause)?;
            return self.rest(number);
        }
        Ok(())
    }

    fn snapshot(&mut self, number: u64, purpose: Purpose) -> Result<()> {
        let Some(job) = self.training.jobs.get_mut(&number) else { return Ok(()) };
        let Some(run) = job.run else { return Ok(()) };
        let (start, len) = (run.page * PAGE, job.layout.len());
        let (device, train) = (&self.model.device, &self.model.train);
        let copy = |buffer: &D::Wide| device.download_wide(In::range(buffer, start, len));
        let state = [copy(&train.params)?, copy(&train.m)?, copy(&train.v)?];
        job.news.push_back(Pending::Snapshot { purpose, step: job.trainer.step(), state });
        Ok(())
    }

    /// Ends a job's training; what it published stays. Memory that the micro-batch in flight
    /// still reads goes with it.
    fn rest(&mut self, number: u64) -> Result<()> {
        if let Some(job) = self.training.jobs.get_mut(&number) {
            job.life = Life::Resting;
            job.trainer.abandon();
        }
        self.free_training(number)
    }

    /// Gives back the training slot and run of a job, unless a micro-batch still uses them.
    fn free_training(&mut self, number: u64) -> Result<()> {
        if self.training.cursor.as_ref().is_some_and(|cursor| cursor.uses(number)) {
            return Ok(());
        }
        let Some(job) = self.training.jobs.get_mut(&number) else { return Ok(()) };
        let (run, slot) = (job.run.take(), job.slot.take());
        if let Some(run) = run {
            self.training.runs.give(run);
        }
        match slot {
            Some(slot) => self.retire(slot),
            None => Ok(()),
        }
    }

    /// Sends news whose copies have come, and lets go of jobs that end.
    pub(super) fn settle_jobs(&mut self) -> Result<()> {
        let numbers: Vec<u64> = self.training.jobs.keys().copied().collect();
        for number in numbers {
            while let Some(event) = self.next_news(number)? {
                self.emit(event);
            }
            let Some(job) = self.training.jobs.get(&number) else { continue };
            if matches!(job.life, Life::Leaving | Life::Resting) {
                self.free_training(number)?;
            }
            self.let_go(number)?;
        }
        Ok(())
    }

    fn next_news(&mut self, number: u64) -> Result<Option<Event>> {
        let Some(job) = self.training.jobs.get_mut(&number) else { return Ok(None) };
        if !job.news.front().is_some_and(Pending::is_ready) {
            return Ok(None);
        }
        let Some(news) = job.news.pop_front() else { return Ok(None) };
        Ok(Some(Event::Job(job.id.clone(), news.into_event()?)))
    }

    fn let_go(&mut self, number: u64) -> Result<()> {
        let gone = |job: &Job| job.life == Life::Leaving && job.run.is_none();
        if !self.training.jobs.get(&number).is_some_and(gone) {
            return Ok(());
        }
        if let Some(job) = self.training.jobs.remove(&number) {
            for slot in job.serving {
                self.retire(slot)?;
            }
            self.emit(Event::Job(job.id, JobEvent::Stopped));
        }
        Ok(())
    }
}
