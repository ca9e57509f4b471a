//! What a job computes: micro-batches in slices, the optimizer step, published weights, snapshots.

use super::backlog::Work;
use super::command::Purpose;
use super::handout::Flight;
use super::training::{Life, Pending, fetch};
use super::{Engine, NAP};
use crate::adapters::registry::Slot;
use crate::train::pack::Budget;
use crate::train::{Cursor, Kind, Next, Slice};
use kernels::tables::PAGE;
use kernels::{AdamW, AdamWState, Device, In, Out, Result};

impl<D: Device> Engine<D> {
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

    /// One slice while nobody chats, unless the device has enough to do. False: nothing was done.
    pub(super) fn train_alone(&mut self) -> Result<bool> {
        if self.backlog.is_full() {
            return Ok(false);
        }
        match self.training.slice(self.model.sizes.loss_rows) {
            Some(slice) => self.train_slice(slice).map(|()| true),
            None => Ok(false),
        }
    }

    /// Loss and backward slices beside a step of `rows` rows, as many as the objective leaves time
    /// for and always one; each when the one before the last has ended, so that what is due next
    /// never waits for more than one slice that waits itself.
    pub(super) fn train_beside(&mut self, rows: usize) -> Result<bool> {
        let budget = self.pace.slice_budget(rows);
        let (mut spent, mut done) = (0.0, 0);
        while let Some(slice) = self.training.slice(self.model.sizes.loss_rows) {
            if let Some(work) = self.training.work(slice) {
                if done > 0 && !self.pace.fits(&work, spent, budget) {
                    break;
                }
                self.wait_for_slices()?;
                spent += self.pace.expect(&work);
            }
            self.train_slice(slice)?;
            done += 1;
        }
        Ok(true)
    }

    /// Waits until one slice at most has not ended. Tokens that come meanwhile leave at once: the
    /// device has work.
    fn wait_for_slices(&mut self) -> Result<()> {
        loop {
            self.learn()?;
            if self.flight.as_ref().is_some_and(Flight::is_ready) {
                self.take()?;
                self.hand_out()?;
            }
            if self.backlog.slices() <= 1 {
                return Ok(());
            }
            std::thread::sleep(NAP);
        }
    }

    fn train_slice(&mut self, slice: Slice) -> Result<()> {
        let work = self.training.work(slice);
        let Some(cursor) = &mut self.training.cursor else { return Ok(()) };
        let start = self.model.device.mark()?;
        match slice {
            Slice::Loss { first, count } => {
                let gradient = cursor.kind() == Kind::Train;
                let ticket = self.model.loss_slice(first, count, gradient)?;
                cursor.loss_enqueued(count, ticket);
            }
            Slice::Layer(layer) => {
                self.model.backward_layer(layer, cursor.extent())?;
                cursor.layer_enqueued();
            }
            Slice::Settle => return self.settle_micro(),
        }
        match work {
            Some(work) => self.enqueued(work, start),
            None => Ok(()),
        }
    }

    /// All work of the micro-batch is enqueued: the next one may begin, optimizer steps that are
    /// due are enqueued, and losses are looked at when they have come.
    fn settle_micro(&mut self) -> Result<()> {
        let Some(cursor) = self.training.cursor.take() else { return Ok(()) };
        let jobs = cursor.jobs();
        self.training.settling.push_back(cursor);
        for job in jobs {
            self.sequence_enqueued(job)?;
        }
        Ok(())
    }

    fn sequence_enqueued(&mut self, number: u64) -> Result<()> {
        let Some(job) = self.training.jobs.get_mut(&number) else { return Ok(()) };
        if matches!(job.life, Life::Leaving | Life::Resting) {
            return Ok(());
        }
        match job.trainer.enqueued() {
            None => return Ok(()),
            Some(Next::Report) => {}
            Some(Next::Update(step)) => {
                let start = self.model.device.mark()?;
                self.update(number, step)?;
                self.publish(number)?;
                self.enqueued(Work::Update, start)?;
            }
        }
        let Some(job) = self.training.jobs.get_mut(&number) else { return Ok(()) };
        if job.trainer.step_complete() {
            self.report(number)?;
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
        self.tell_residents();
        Ok(())
    }

    /// A step is complete: its metrics leave, then the states that are due.
    fn report(&mut self, number: u64) -> Result<()> {
        let Some(job) = self.training.jobs.get_mut(&number) else { return Ok(()) };
        let due = job.trainer.report();
        let norm = job.norm.take();
        let pausing = job.life == Life::Pausing;
        job.news.push_back(Pending::Step { norm });
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

    pub(super) fn snapshot(&mut self, number: u64, purpose: Purpose) -> Result<()> {
        let Some(job) = self.training.jobs.get_mut(&number) else { return Ok(()) };
        let Some(run) = job.run else { return Ok(()) };
        let (start, len) = (run.page * PAGE, job.layout.len());
        let (device, train) = (&self.model.device, &self.model.train);
        let copy = |buffer: &D::Wide| device.download_wide(In::range(buffer, start, len));
        let mark = device.mark()?;
        let state = fetch([copy(&train.params)?, copy(&train.m)?, copy(&train.v)?])?;
        job.news.push_back(Pending::Snapshot { purpose, step: job.trainer.step(), state });
        self.enqueued(Work::Copy { bytes: 12 * len }, mark)
    }
}
