//! One job from its claim to its result: prepares it for the engine, then keeps what comes back.
//! Three things go on side by side: the lease is kept, news are read, and rows are written; an
//! outage that stops one of them does not stop the others.

use super::hold::Hold;
use super::job_keep::{Keeper, Parting};
use super::job_write::{self, Writer};
use super::outbox::Outbox;
use super::{Shared, adapters, examples, lock};
use crate::adapters::{AdapterLayout, Init as AdapterInit, init_adapter};
use crate::dataset::Purpose;
use crate::engine::command::{Command, JobEvent, JobStart};
use crate::train::resume::{self, ResumeState};
use crate::train::{Example, JobSpec, Sequence, auto, spec::Init};
use anyhow::{Context, bail};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use storage::db::{Claim, JobError, JobWrite, StatusChange};
use tokio::sync::Notify;
use tokio::sync::mpsc::Receiver;

/// How long the engine may take to let go of a job; then its news are no longer waited for.
const STOP_WAIT: Duration = Duration::from_secs(30);

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The job is over, paused, or another's.
    Done,
    /// It was given back, for the worker drains.
    Released,
    /// The engine had no memory for it; the claim was given back.
    NoRoom,
}

/// What the parts of a run share.
pub struct Run {
    /// What all tasks share.
    pub shared: Arc<Shared>,
    /// The hold on the job.
    pub claim: Claim,
    /// The same by the owner's clock.
    pub hold: Mutex<Hold>,
    /// What is to be written.
    pub outbox: Mutex<Outbox>,
    /// Rings for the keeper: whether the job may train is to be looked at.
    pub changed: Notify,
    /// Rings for the writer: something is to be written.
    pub filled: Notify,
    firm: Notify,
    started: AtomicBool,
    pause: AtomicBool,
}

impl Run {
    /// The run of a claim whose statement was sent at `asked`.
    pub fn new(shared: Arc<Shared>, claim: Claim, asked: Instant) -> Self {
        let hold = Mutex::new(Hold::new(shared.options.lease, asked));
        Self {
            shared,
            claim,
            hold,
            outbox: Mutex::new(Outbox::new(0)),
            changed: Notify::new(),
            filled: Notify::new(),
            firm: Notify::new(),
            started: AtomicBool::new(false),
            pause: AtomicBool::new(false),
        }
    }

    /// The job's id.
    pub fn id(&self) -> &str {
        &self.claim.job.id
    }

    /// Whether the engine has the job.
    pub fn has_started(&self) -> bool {
        self.started.load(Relaxed)
    }

    /// The client wants the job paused.
    pub fn ask_pause(&self) {
        self.pause.store(true, Relaxed);
    }

    /// Whether the job, once saved, is left to another worker. Not where it is to be paused: there
    /// may be none that could do it.
    pub fn is_left(&self) -> bool {
        self.shared.gives_up(self.id()) && !self.pause.load(Relaxed)
    }

    /// Whether the lease surely is this run's.
    pub fn is_firm(&self) -> bool {
        lock(&self.hold).is_sure(Instant::now())
    }

    /// The lease was renewed in answer to a statement sent at `asked`.
    pub fn renewed(&self, asked: Instant) {
        lock(&self.hold).renewed(asked);
        self.firm.notify_waiters();
    }

    /// Waits until the lease surely is this run's.
    pub async fn firm(&self) {
        loop {
            // Before the look: it hears of every renewal from here on.
            let renewed = self.firm.notified();
            if self.is_firm() {
                return;
            }
            renewed.await;
        }
    }
}

/// Runs a claimed job.
pub async fn run(
    run: &Run,
    mut news: Receiver<JobEvent>,
    bell: Arc<Notify>,
) -> anyhow::Result<End> {
    let ended = {
        let keeper = Keeper::new(run, bell.clone());
        tokio::select! {
            ended = work(run, &mut news, &bell) => ended,
            parting = keeper.keep() => part(run, parting).await,
        }
    };
    lock(&run.shared.runs).set_live(run.id(), false);
    if run.has_started() && !matches!(ended, Ok(End::NoRoom)) {
        run.shared.command(Command::StopJob(run.id().to_owned())).await;
        wait_for_stop(run, &mut news).await;
    }
    if matches!(ended, Ok(End::NoRoom)) {
        run.shared.storage.db.jobs().release(&run.claim).await?;
    }
    ended
}

/// Ends a run whose lease is lost, or whose training has not begun.
async fn part(run: &Run, parting: Parting) -> anyhow::Result<End> {
    let jobs = run.shared.storage.db.jobs();
    match parting {
        Parting::Lost => Ok(End::Done),
        Parting::Pause => {
            let status = Some(StatusChange::Paused);
            jobs.write(&run.claim, &JobWrite { status, ..JobWrite::default() }).await?;
            Ok(End::Done)
        }
        Parting::Drain => {
            jobs.release(&run.claim).await?;
            Ok(End::Released)
        }
    }
}

async fn work(run: &Run, news: &mut Receiver<JobEvent>, bell: &Notify) -> anyhow::Result<End> {
    let jobs = run.shared.storage.db.jobs();
    let start = match prepare(run).await {
        Ok(start) => start,
        Err(examples::Unusable::Fault(error)) => {
            let status = Some(StatusChange::Failed(error));
            job_write::send(run, &JobWrite { status, ..JobWrite::default() }).await;
            return Ok(End::Done);
        }
        Err(examples::Unusable::Later(error)) => {
            jobs.release(&run.claim).await?;
            return Err(error);
        }
    };
    let (spec, layout) = (start.spec.clone(), start.layout.clone());
    if !run.shared.command(Command::StartJob(Box::new(start))).await {
        bail!("the engine is gone");
    }
    run.started.store(true, Relaxed);
    // What the client wanted meanwhile is looked at once more, and so is the lease.
    bell.notify_one();
    run.changed.notify_one();
    let writer = Writer { run, spec: &spec, layout: &layout };
    tokio::select! {
        end = read(run, news) => end,
        end = writer.write() => end,
    }
}

/// Notes the engine's news as they come, until it has nothing more to tell.
async fn read(run: &Run, news: &mut Receiver<JobEvent>) -> anyhow::Result<End> {
    loop {
        let Some(news) = news.recv().await else { bail!("the engine is gone") };
        let mut outbox = lock(&run.outbox);
        match news {
            JobEvent::Started => outbox.begin(),
            JobEvent::NoRoom => return Ok(End::NoRoom),
            JobEvent::Stopped => return Ok(End::Done),
            JobEvent::Step(metrics) => outbox.step(metrics),
            JobEvent::Snapshot(snapshot) => outbox.save(*snapshot),
        }
        if outbox.is_full() {
            run.changed.notify_one();
        }
        drop(outbox);
        run.filled.notify_one();
    }
}

/// Everything the engine needs: numbers, examples, weights.
async fn prepare(run: &Run) -> Result<JobStart, examples::Unusable> {
    let (shared, job) = (&run.shared, &run.claim.job);
    let resolved = job.resolved.as_ref().context("a queued job has resolved numbers")?;
    let spec = auto::spec_of(&job.id, job.seed as u64, resolved).map_err(anyhow::Error::from)?;
    let limit = spec.training.max_sequence_length;
    let training = examples::load(shared, job, Purpose::Training, limit).await?;
    let validation = examples::load(shared, job, Purpose::Validation, limit).await?;
    fits(shared, spec.lora.rank, training.examples.iter().chain(&validation.examples))?;
    let layout = Arc::new(adapters::layout_of(shared, &spec).map_err(anyhow::Error::from)?);
    let mut outbox = Outbox::new(spec.training.total_steps(training.examples.len()));
    let mut start = JobStart {
        spec,
        layout: layout.clone(),
        examples: Arc::new(training.examples),
        validation: Arc::new(validation.examples),
        step: 0,
        params: Vec::new(),
        moments: None,
    };
    match newest_state(shared, &start.spec).await? {
        Some(state) => {
            outbox.resume(state.step, state.trained_tokens, &state.step_metrics);
            start.step = state.step;
            start.params = state.params;
            start.moments = Some((state.m, state.v));
        }
        None => start.params = first_values(run, &start.spec, &layout).await?,
    }
    *lock(&run.outbox) = outbox;
    Ok(start)
}

/// Weights of a job that has not trained yet: its parent's, or fresh ones.
async fn first_values(
    run: &Run,
    spec: &JobSpec,
    layout: &AdapterLayout,
) -> anyhow::Result<Vec<f32>> {
    if let Some(parent) = &run.claim.job.parent {
        let weights = adapters::read_parent(&run.shared, &parent.object).await?;
        return Ok(weights.values.to_vec());
    }
    let init = match spec.lora.init {
        Init::Default => AdapterInit::Default,
        Init::Gaussian => AdapterInit::Gaussian,
    };
    Ok(init_adapter(layout, spec.training.seed, init))
}

/// A job whose limits were set on a worker with more training memory cannot run here.
fn fits<'a>(
    shared: &Shared,
    rank: usize,
    examples: impl Iterator<Item = &'a Example>,
) -> Result<(), examples::Unusable> {
    let longest = examples.flatten().map(Sequence::rows).max().unwrap_or(0);
    let bounds = shared.bounds;
    if longest <= bounds.arena_rows && longest * rank <= bounds.arena_rank_rows {
        return Ok(());
    }
    Err(examples::Unusable::Fault(JobError {
        code: "insufficient_memory".to_owned(),
        message: format!(
            "An example of {longest} tokens at rank {rank} does not fit the worker's training \
             memory, which holds {} tokens. Create the job again: its limits are set anew.",
            bounds.arena_rows.min(bounds.arena_rank_rows / rank)
        ),
        param: Some("training.max_sequence_length".to_owned()),
    }))
}

/// The newest resume point that can be read; an unreadable one is passed over with a warning.
async fn newest_state(shared: &Shared, spec: &JobSpec) -> anyhow::Result<Option<ResumeState>> {
    for point in shared.storage.db.jobs().resume_points(&spec.job_id).await? {
        let bytes = match shared.storage.objects.get(&point.key()).await {
            Ok(bytes) => bytes,
            Err(error @ storage::Error::ObjectMissing(_)) => {
                tracing::warn!(job.id = spec.job_id, %error, "a resume point is missing");
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        match resume::decode(&bytes) {
            Ok(state) if state.spec == *spec => return Ok(Some(state)),
            Ok(_) => tracing::warn!(job.id = spec.job_id, "a resume point is of another run"),
            Err(error) => {
                tracing::warn!(job.id = spec.job_id, %error, "a resume point is unreadable");
            }
        }
    }
    Ok(None)
}

/// Waits until the engine has let go, so that a later claim finds the memory free.
async fn wait_for_stop(run: &Run, news: &mut Receiver<JobEvent>) {
    let stopped = async {
        while let Some(news) = news.recv().await {
            if news == JobEvent::Stopped {
                return;
            }
        }
    };
    if tokio::time::timeout(STOP_WAIT, stopped).await.is_err() {
        tracing::error!(job.id = run.id(), "the engine did not let go");
    }
}
