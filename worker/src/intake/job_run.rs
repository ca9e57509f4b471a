//! One job from its claim to its result: prepares it for the engine, then keeps what comes back.

use super::job_write::Ledger;
use super::{Shared, adapters, examples, jobs};
use crate::adapters::{Init as AdapterInit, init_adapter};
use crate::dataset::Purpose;
use crate::engine::command::{Command, JobEvent, JobStart, Purpose as Keep, Snapshot};
use crate::train::resume::{self, ResumeState};
use crate::train::{Example, JobSpec, Sequence, auto, spec::Init};
use anyhow::{Context, bail};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use storage::db::{Claim, Intent, JobError, JobWrite, Renewed, StatusChange};
use tokio::sync::Notify;
use tokio::sync::mpsc::Receiver;

/// How long the engine may take to let go of a job; then its news are no longer waited for.
const STOP_WAIT: Duration = Duration::from_secs(30);

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The job is over, paused, handed back, or another's.
    Done,
    /// The engine had no memory for it; the claim was given back.
    NoRoom,
}

/// Runs a claimed job.
pub async fn run(
    shared: Arc<Shared>,
    claim: Claim,
    news: Receiver<JobEvent>,
    bell: Arc<Notify>,
) -> anyhow::Result<End> {
    let prepared = jobs::with_lease(&shared, &claim, prepare(&shared, &claim)).await?;
    let (ledger, start) = match prepared {
        None => return Ok(End::Done),
        Some(Ok(prepared)) => prepared,
        Some(Err(examples::Unusable::Fault(error))) => {
            let status = Some(StatusChange::Failed(error));
            let write = JobWrite { status, ..JobWrite::default() };
            shared.storage.db.jobs().write(&claim, &write).await?;
            return Ok(End::Done);
        }
        Some(Err(examples::Unusable::Later(error))) => {
            shared.storage.db.jobs().release(&claim).await?;
            return Err(error);
        }
    };
    let id = claim.job.id.clone();
    if !shared.command(Command::StartJob(Box::new(start))).await {
        bail!("the engine is gone");
    }
    let mut runner = Runner { ledger, news, bell, pausing: false };
    let ended = runner.follow().await;
    if matches!(ended, Ok(End::NoRoom)) {
        shared.storage.db.jobs().release(&claim).await?;
        return ended;
    }
    shared.command(Command::StopJob(id)).await;
    runner.drain().await;
    ended
}

/// Everything the engine needs: numbers, examples, weights.
async fn prepare(
    shared: &Arc<Shared>,
    claim: &Claim,
) -> Result<(Ledger, JobStart), examples::Unusable> {
    let job = &claim.job;
    let resolved = job.resolved.as_ref().context("a queued job has resolved numbers")?;
    let spec = auto::spec_of(&job.id, job.seed as u64, resolved).map_err(anyhow::Error::from)?;
    let limit = spec.training.max_sequence_length;
    let training = examples::load(shared, job, Purpose::Training, limit).await?;
    let validation = examples::load(shared, job, Purpose::Validation, limit).await?;
    fits(shared, spec.lora.rank, training.examples.iter().chain(&validation.examples))?;
    let layout = Arc::new(adapters::layout_of(shared, &spec).map_err(anyhow::Error::from)?);
    let total_steps = spec.training.total_steps(training.examples.len());
    let mut ledger =
        Ledger::new(shared.clone(), claim.clone(), spec.clone(), layout.clone(), total_steps);
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
            ledger.resume(&state);
            start.step = state.step;
            start.params = state.params;
            start.moments = Some((state.m, state.v));
        }
        None => match &job.parent {
            Some(parent) => {
                let weights = adapters::read_parent(shared, &parent.object).await?;
                start.params = weights.values.to_vec();
            }
            None => {
                let init = match start.spec.lora.init {
                    Init::Default => AdapterInit::Default,
                    Init::Gaussian => AdapterInit::Gaussian,
                };
                start.params = init_adapter(&layout, start.spec.training.seed, init);
            }
        },
    }
    Ok((ledger, start))
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

struct Runner {
    ledger: Ledger,
    news: Receiver<JobEvent>,
    bell: Arc<Notify>,
    pausing: bool,
}

impl Runner {
    /// Keeps what the engine reports, until the job ends here.
    async fn follow(&mut self) -> anyhow::Result<End> {
        let mut renew = tokio::time::interval(self.ledger.shared.options.lease / 3);
        loop {
            let bell = self.bell.clone();
            tokio::select! {
                news = self.news.recv() => {
                    let Some(news) = news else { bail!("the engine is gone") };
                    if let Some(end) = self.heard(news).await? {
                        return Ok(end);
                    }
                }
                _ = renew.tick() => if !self.renew().await? { return Ok(End::Done) },
                () = bell.notified() => if !self.renew().await? { return Ok(End::Done) },
            }
        }
    }

    async fn heard(&mut self, news: JobEvent) -> anyhow::Result<Option<End>> {
        let end = |kept: bool| (!kept).then_some(End::Done);
        match news {
            JobEvent::Started => {
                self.ledger.began.0 = Instant::now();
                Ok(None)
            }
            JobEvent::NoRoom => Ok(Some(End::NoRoom)),
            JobEvent::Stopped => Ok(Some(End::Done)),
            JobEvent::Step(metrics) => {
                self.ledger.note(metrics);
                if self.news.is_empty() {
                    return Ok(end(self.ledger.flush().await?));
                }
                Ok(None)
            }
            JobEvent::Snapshot(snapshot) => self.keep(*snapshot).await,
        }
    }

    async fn keep(&mut self, snapshot: Snapshot) -> anyhow::Result<Option<End>> {
        let kept = match snapshot.purpose {
            Keep::Resume => self.ledger.keep_resume_point(snapshot, None).await?,
            Keep::Epoch => self.ledger.keep_checkpoint(snapshot).await?,
            Keep::Finish => {
                self.ledger.finish(&snapshot).await?;
                false
            }
            Keep::Pause if self.ledger.shared.draining.load(Relaxed) => {
                if self.ledger.keep_resume_point(snapshot, None).await? {
                    self.ledger.shared.storage.db.jobs().release(&self.ledger.claim).await?;
                }
                false
            }
            Keep::Pause => {
                let status = Some(StatusChange::Paused);
                self.ledger.keep_resume_point(snapshot, status).await?;
                false
            }
        };
        Ok((!kept).then_some(End::Done))
    }

    /// Renews the lease and obeys what the client wants. False: the claim is lost.
    async fn renew(&mut self) -> anyhow::Result<bool> {
        let lease = jobs::lease_ms(&self.ledger.shared);
        let renewed = self.ledger.shared.storage.db.jobs().renew(&self.ledger.claim, lease).await;
        let pause = match renewed {
            Ok(Renewed::Lost) => return Ok(false),
            Ok(Renewed::Kept { intent }) => {
                self.ledger.renewed = Instant::now();
                intent == Some(Intent::Pause)
            }
            Err(error) if self.ledger.renewed.elapsed() > self.lease_bound() => {
                return Err(error).context("the lease could not be renewed");
            }
            Err(error) => {
                tracing::warn!(job.id = self.ledger.claim.job.id, %error, "renewing failed");
                return Ok(true);
            }
        };
        let draining = self.ledger.shared.draining.load(Relaxed);
        if (pause || draining) && !self.pausing {
            self.pausing = true;
            let id = self.ledger.claim.job.id.clone();
            self.ledger.shared.command(Command::PauseJob(id)).await;
        }
        Ok(true)
    }

    /// An owner stops at two thirds of its lease.
    fn lease_bound(&self) -> Duration {
        self.ledger.shared.options.lease * 2 / 3
    }

    /// Waits until the engine has let go, so that a later claim finds the memory free.
    async fn drain(&mut self) {
        let stopped = async {
            while let Some(news) = self.news.recv().await {
                if news == JobEvent::Stopped {
                    return;
                }
            }
        };
        if tokio::time::timeout(STOP_WAIT, stopped).await.is_err() {
            tracing::error!(job.id = self.ledger.claim.job.id, "the engine did not let go");
        }
    }
}
