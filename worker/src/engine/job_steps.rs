//! What a job computes: micro-batches in slices, the optimizer step, published weights, snapshots.

use super::Engine;
use super::command::Purpose;
use super::pace::Allowance;
use super::training::{Life, Pending};
use crate::adapters::registry::Slot;
use crate::train::pack::Budget;
use crate::train::{Cursor, ItemResult, Kind, Next, Slice};
use kernels::tables::PAGE;
use kernels::{AdamW, AdamWState, Device, In, Out, Result};
use std::time::Instant;

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

    pub(super) fn snapshot(&mut self, number: u64, purpose: Purpose) -> Result<()> {
        let Some(job) = self.training.jobs.get_mut(&number) else { return Ok(()) };
        let Some(run) = job.run else { return Ok(()) };
        let (start, len) = (run.page * PAGE, job.layout.len());
        let (device, train) = (&self.model.device, &self.model.train);
        let copy = |buffer: &D::Wide| device.download_wide(In::range(buffer, start, len));
        let state = [copy(&train.params)?, copy(&train.m)?, copy(&train.v)?];
        job.news.push_back(Pending::Snapshot { purpose, step: job.trainer.step(), state });
        Ok(())
    }
}
