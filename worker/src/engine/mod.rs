//! The engine: one loop that serves and trains in the same batches.
//!
//! One thread, at its own pace: take commands, plan, run, hand out. No await, no input or output,
//! no device allocation after start. It waits for nothing but a step's sampled tokens, for the
//! device to come near the end of what it was given, and for a command when there is nothing to do.

mod assemble;
pub mod backlog;
pub mod blocks;
pub mod command;
mod draw;
pub mod gauges;
mod handout;
mod job_life;
mod job_steps;
mod leaving;
mod pace;
mod scheduler;
mod sequence;
mod serving;
pub mod trace;
mod training;

use crate::adapters::registry::Registry;
use crate::model::{Batch, Model, SampleRows, Sampled, bucket};
use backlog::{Backlog, Work};
use blocks::BlockPool;
use command::{Command, Event, Output, RequestKey};
use gauges::Gauges;
use handout::{Flight, Taken};
use kernels::{Device, Result, Ticket};
use pace::Pace;
use scheduler::{Plan, Scheduler, StepLimits};
use serving::Serving;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{Receiver, Sender};
use trace::Trace;
use training::Training;

/// Pause of a loop that waits for the device alone.
const NAP: Duration = Duration::from_micros(50);

/// Bounds and objectives of the loop.
#[derive(Clone, Debug)]
pub struct Options {
    /// Sequences that may be queued or running; more are refused.
    pub max_queue: usize,
    /// Jobs that may train at once.
    pub max_jobs: usize,
    /// Rows that a micro-batch aims at.
    pub target_rows: usize,
    /// Objective for the time between two tokens of a stream.
    pub tpot: Duration,
    /// Training rows that every step may carry whatever the objective says.
    pub least_rows: usize,
    /// Treat the device as one that records graphs and works while the host goes on, whatever it
    /// says: tests prove with it that this changes no result.
    pub graphs: bool,
    /// Records what the device did and when.
    pub trace: Option<Trace>,
    /// Fill freed memory with NaN: tests prove with it that nothing reads what it did not write.
    pub poison: bool,
}

/// See the module.
pub struct Engine<D: Device> {
    model: Model<D>,
    options: Options,
    commands: Receiver<Command>,
    events: Sender<Event>,
    gauges: Arc<Gauges>,
    scheduler: Scheduler,
    blocks: BlockPool,
    registry: Registry,
    serving: Serving,
    training: Training,
    pace: Pace,
    batch: Batch,
    sample_rows: SampleRows,
    backlog: Backlog,
    flight: Option<Flight>,
    taken: Vec<Taken>,
    outputs: Vec<(RequestKey, Output)>,
    open: bool,
    graphs: bool,
}

impl<D: Device> Engine<D> {
    /// An idle engine over a model.
    pub fn new(
        model: Model<D>,
        options: Options,
        commands: Receiver<Command>,
        events: Sender<Event>,
        gauges: Arc<Gauges>,
    ) -> Self {
        let sizes = &model.sizes;
        let blocks = BlockPool::new(sizes.blocks, sizes.block_size);
        Self {
            registry: Registry::new(sizes.slots, sizes.pool_pages),
            training: Training::new(sizes.train_pages),
            pace: Pace::new(options.tpot, options.least_rows),
            scheduler: Scheduler::default(),
            serving: Serving::default(),
            batch: Batch::default(),
            sample_rows: SampleRows::default(),
            backlog: Backlog::default(),
            flight: None,
            taken: Vec::new(),
            outputs: Vec::new(),
            open: true,
            graphs: options.graphs || model.device.graphs(),
            blocks,
            model,
            options,
            commands,
            events,
            gauges,
        }
    }

    /// Runs until [`Command::Shutdown`] or until all senders of commands are gone. A fault of the
    /// device ends the loop with [`Event::Broken`]; leases and presence do the rest.
    pub fn run(mut self) {
        if let Err(fault) = self.work() {
            tracing::error!(error = %fault, "the device failed, the engine stops");
            self.emit(Event::Broken(fault.to_string()));
        }
    }

    fn work(&mut self) -> Result<()> {
        if self.graphs {
            self.model.record_decodes()?;
        }
        while self.open {
            self.turn()?;
        }
        Ok(())
    }

    fn turn(&mut self) -> Result<()> {
        self.take_commands()?;
        if self.open {
            self.step()?;
        }
        self.flush();
        Ok(())
    }

    /// One step: everything that is due gets rows, training fills what the objective leaves. Where
    /// the device works while the host goes on, this step is launched before the last one's tokens
    /// are handed out.
    fn step(&mut self) -> Result<()> {
        self.learn()?;
        self.take()?;
        let limits = self.limits();
        let plan = self.scheduler.plan(&mut self.blocks, limits);
        let inference = plan.rows();
        self.begin_micro()?;
        let micro_rows = match inference {
            0 if self.backlog.is_full() => 0,
            _ => self.pace.allow(inference, limits.rows - inference),
        };
        let micro_rows = self.training.forward_left().min(micro_rows);
        self.build(&plan, micro_rows);
        let mut worked = self.launch(plan)?;
        if !self.graphs {
            self.take()?;
        }
        self.hand_out()?;
        worked |= match inference {
            0 => self.train_alone()?,
            _ => self.train_beside(inference + micro_rows)?,
        };
        self.settle_jobs()?;
        if !worked {
            std::thread::sleep(NAP);
        }
        Ok(())
    }

    fn limits(&self) -> StepLimits {
        let sizes = &self.model.sizes;
        StepLimits {
            rows: sizes.step_rows,
            sample_rows: sizes.sample_rows,
            sequences: sizes.sequences,
            history: sizes.history,
        }
    }

    fn build(&mut self, plan: &Plan, micro_rows: usize) {
        self.batch.clear();
        self.training.fill(&mut self.batch, micro_rows);
        assemble::append(&mut self.batch, plan, &self.scheduler, self.model.sizes.block_size);
        draw::fill(&mut self.sample_rows, plan, &self.scheduler);
        Gauges::count(&self.gauges.inference_rows, plan.rows());
        Gauges::count(&self.gauges.training_rows, micro_rows);
        Gauges::count(&self.gauges.displaced, plan.displaced);
    }

    /// Enqueues the step's forward and drawing. False: there is nothing to compute.
    fn launch(&mut self, plan: Plan) -> Result<bool> {
        if self.options.poison {
            self.model.poison_blocks(&plan.freed)?;
        }
        if self.batch.rows() == 0 {
            return Ok(false);
        }
        let micro = self.batch.micro.rows;
        let work = Work::Step { inference: plan.rows(), micro };
        let start = self.model.device.mark()?;
        let sampled = self.forward()?;
        self.enqueued(work, start)?;
        self.training.advance(micro);
        if !plan.shares.is_empty() {
            self.flight = Some(Flight { plan, sampled, top: self.sample_rows.top });
        }
        Gauges::count(&self.gauges.steps, 1);
        Ok(true)
    }

    fn forward(&mut self) -> Result<Option<Sampled>> {
        let due = self.batch.sample_rows.len();
        if self.graphs && self.batch.is_decode() {
            let rows = bucket(due, self.model.decode_rows_max());
            self.batch.pad(rows, self.model.sizes.max_rank);
            self.model.decode(&self.batch)?;
        } else {
            self.model.forward(&self.batch)?;
            if due > 0 {
                self.model.head(due)?;
            }
        }
        if due == 0 {
            return Ok(None);
        }
        self.model.sample(&self.sample_rows).map(Some)
    }

    /// A piece of work was enqueued since `start`.
    fn enqueued(&mut self, work: Work, start: Ticket<f64>) -> Result<()> {
        let end = self.model.device.mark()?;
        self.backlog.push(work, self.pace.expect(&work), start, end);
        self.learn()
    }

    /// Learns from the work that has ended.
    fn learn(&mut self) -> Result<()> {
        while let Some(done) = self.backlog.pop()? {
            self.pace.saw(&done.work, done.secs);
            if let Some(trace) = &self.options.trace {
                trace.add(done);
            }
        }
        Ok(())
    }

    /// Takes what has come; blocks only when there is nothing else to do.
    fn take_commands(&mut self) -> Result<()> {
        loop {
            let command = match self.commands.try_recv() {
                Ok(command) => command,
                Err(TryRecvError::Disconnected) => Command::Shutdown,
                Err(TryRecvError::Empty) if !self.is_idle() => return Ok(()),
                Err(TryRecvError::Empty) => {
                    self.show();
                    self.commands.blocking_recv().unwrap_or(Command::Shutdown)
                }
            };
            self.obey(command)?;
            if !self.open {
                return Ok(());
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.scheduler.is_empty()
            && self.training.is_idle()
            && self.outputs.is_empty()
            && self.flight.is_none()
    }

    fn obey(&mut self, command: Command) -> Result<()> {
        match command {
            Command::Admit(admission) => self.admit(*admission)?,
            Command::Refuse(request, fault) => {
                self.outputs.push((request, Output::Failed(fault)));
            }
            Command::Cancel(request) => self.cancel(request)?,
            Command::AdapterReady(key, weights) => self.adapter_ready(key, weights)?,
            Command::AdapterFailed(key, fault) => self.adapter_failed(&key, &fault),
            Command::ForgetAdapter(key) => self.forget_adapter(&key)?,
            Command::HandOver(leaving) => self.hand_over(&leaving)?,
            Command::Preload(key, weights) => self.preload(key, weights)?,
            Command::EvictAdapter(key) => self.evict_adapter(&key)?,
            Command::PinAdapter(key, pinned) => self.pin_adapter(&key, pinned)?,
            Command::StartJob(start) => self.start_job(*start)?,
            Command::PauseJob(job) => self.pause_job(&job)?,
            Command::HoldJob(job, held) => self.training.hold(&job, held),
            Command::StopJob(job) => self.stop_job(&job)?,
            Command::Shutdown => self.open = false,
        }
        Ok(())
    }

    /// Sends the step's outputs and brings the gauges up to date.
    fn flush(&mut self) {
        if !self.outputs.is_empty() {
            let outputs = std::mem::take(&mut self.outputs);
            self.emit(Event::Outputs(outputs));
        }
        self.show();
    }

    /// Brings the gauges up to date: also before a wait, for a command may have changed them.
    fn show(&self) {
        let gauges = &self.gauges;
        gauges.requests.store(self.serving.requests(), Relaxed);
        gauges.free_blocks.store(self.blocks.free(), Relaxed);
        gauges.training_jobs.store(self.training.jobs(), Relaxed);
    }

    /// Hands an event out. A full channel makes the engine wait: its reader only forwards.
    fn emit(&mut self, event: Event) {
        if self.events.blocking_send(event).is_err() {
            self.open = false;
        }
    }
}
