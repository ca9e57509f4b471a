//! How a job enters and leaves the engine: its memory, pause, stop, and the order of its news.

use super::Engine;
use super::command::{AdapterWeights, Event, JobEvent, JobStart, Purpose};
use super::training::{Job, Life};
use crate::adapters::pages::Run;
use crate::adapters::registry::Slot;
use crate::train::{JobSpec, Kind, Sequence, Trainer};
use kernels::{Device, Result};
use std::collections::VecDeque;
use std::sync::Arc;

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
        if self.training.jobs() >= self.options.max_jobs
            || self.training.find(&start.spec.job_id).is_some()
            || !self.holds(&start)
        {
            return Ok(false);
        }
        let JobStart { spec, layout, examples, validation, step, params, moments } = start;
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
            held: false,
        };
        let number = self.training.next;
        self.training.next += 1;
        let finished = job.trainer.is_finished();
        self.training.jobs.insert(number, job);
        self.tell_residents();
        if finished {
            self.snapshot(number, Purpose::Finish)?;
            self.rest(number)?;
        }
        Ok(true)
    }

    /// Whether the model's buffers hold the job's rank and its longest example: a job may have
    /// been cut to the larger arena of another worker.
    fn holds(&self, start: &JobStart) -> bool {
        let (sizes, rank) = (&self.model.sizes, start.layout.shape().rank);
        let examples = start.examples.iter().chain(start.validation.iter()).flatten();
        let longest = examples.map(Sequence::rows).max().unwrap_or(0);
        rank <= sizes.max_rank && longest <= sizes.arena_rows.min(sizes.arena_rank_rows / rank)
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

    /// Ends a job's training; what it published stays. Memory that the micro-batch in flight
    /// still reads goes with it.
    pub(super) fn rest(&mut self, number: u64) -> Result<()> {
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
        self.collect_results()?;
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

    /// Gives jobs the losses that have come.
    fn collect_results(&mut self) -> Result<()> {
        while let Some(cursor) = self.training.settling.front_mut() {
            let Some(results) = cursor.settle()? else { return Ok(()) };
            self.training.settling.pop_front();
            for result in results {
                if let Some(job) = self.training.jobs.get_mut(&result.job) {
                    job.trainer.result(&result);
                }
            }
        }
        Ok(())
    }

    fn next_news(&mut self, number: u64) -> Result<Option<Event>> {
        let Some(job) = self.training.jobs.get_mut(&number) else { return Ok(None) };
        if !job.news.front().is_some_and(|news| news.is_ready(&job.trainer)) {
            return Ok(None);
        }
        let Some(news) = job.news.pop_front() else { return Ok(None) };
        Ok(Some(Event::Job(job.id.clone(), news.into_event(&mut job.trainer)?)))
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
