//! Keeps a job's lease while it is prepared and trained, beside everything else a run does: renews
//! it, obeys what the client wants, and holds the engine back while the lease may have run out or
//! more waits to be written than may wait.

use super::hold::Hold;
use super::job_run::Run;
use super::{Shared, jobs, lock};
use crate::engine::command::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use storage::db::{Claim, Intent, Renewed};
use tokio::sync::Notify;
use tokio::time::{sleep, sleep_until};

/// First pause after a failed renewal; doubled each time.
const RETRY_FIRST: Duration = Duration::from_millis(50);
/// Longest pause between two tries.
const RETRY_LONGEST: Duration = Duration::from_secs(1);
/// How often a short piece of work asks whether the job is still this worker's: a cancelled one
/// shall not keep others waiting.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// Why a run has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parting {
    /// Cancelled, ended, or claimed by another: write nothing more.
    Lost,
    /// To be paused before its training began.
    Pause,
    /// The worker drains, and training has not begun.
    Drain,
}

/// See the module.
pub struct Keeper<'a> {
    run: &'a Run,
    bell: Arc<Notify>,
    held: bool,
    late: bool,
    pausing: bool,
}

impl<'a> Keeper<'a> {
    /// The keeper of a run; `bell` rings when the job's row may have changed.
    pub fn new(run: &'a Run, bell: Arc<Notify>) -> Self {
        Self { run, bell, held: false, late: false, pausing: false }
    }

    /// Keeps the lease until the run has to end.
    pub async fn keep(mut self) -> Parting {
        let mut pause = RETRY_FIRST;
        let mut away = false;
        loop {
            let asked = Instant::now();
            let next = match self.ask().await {
                Ok(Renewed::Lost) => return Parting::Lost,
                Ok(Renewed::Kept { intent }) => {
                    self.run.renewed(asked);
                    if std::mem::take(&mut away) {
                        tracing::info!(job.id = self.run.id(), "the lease is kept again");
                    }
                    pause = RETRY_FIRST;
                    if let Some(parting) = self.obey(intent).await {
                        return parting;
                    }
                    lock(&self.run.hold).due()
                }
                Err(error) => {
                    if !std::mem::replace(&mut away, true) {
                        tracing::warn!(job.id = self.run.id(), %error, "renewing a lease failed");
                    }
                    let next = Instant::now() + pause;
                    pause = (pause * 2).min(RETRY_LONGEST);
                    next
                }
            };
            self.rest(next).await;
        }
    }

    /// One renewal, however long its answer takes.
    async fn ask(&mut self) -> storage::Result<Renewed> {
        let run = self.run;
        let lease = jobs::lease_ms(&run.shared);
        let rows = run.shared.storage.db.jobs();
        let renewal = rows.renew(&run.claim, lease);
        tokio::pin!(renewal);
        loop {
            self.steer().await;
            let ends = lock(&run.hold).ends();
            tokio::select! {
                answer = &mut renewal => return answer,
                () = run.changed.notified() => {}
                () = sleep_until(ends.into()), if self.may_end() => {}
            }
        }
    }

    /// Waits until `next`, or the bell.
    async fn rest(&mut self, next: Instant) {
        loop {
            self.steer().await;
            let ends = lock(&self.run.hold).ends();
            tokio::select! {
                () = sleep_until(next.into()) => return,
                () = self.bell.notified() => return,
                () = self.run.changed.notified() => {}
                () = sleep_until(ends.into()), if self.may_end() => {}
            }
        }
    }

    /// Whether the end of the lease's first two thirds is still to come, or to be acted on.
    fn may_end(&self) -> bool {
        !self.late && self.run.has_started()
    }

    /// Tells the engine whether the job may train, where that has changed.
    async fn steer(&mut self) {
        if !self.run.has_started() {
            return;
        }
        let late = !self.run.is_firm();
        if late && !self.late {
            tracing::warn!(job.id = self.run.id(), "training waits: the lease may be over");
        }
        self.late = late;
        let held = late || lock(&self.run.outbox).is_full();
        if held != self.held {
            self.held = held;
            let id = self.run.id().to_owned();
            self.run.shared.command(Command::HoldJob(id, held)).await;
        }
    }

    async fn obey(&mut self, intent: Option<Intent>) -> Option<Parting> {
        let draining = self.run.shared.gives_up(self.run.id());
        let pause = intent == Some(Intent::Pause);
        if pause {
            self.run.ask_pause();
        }
        if !self.run.has_started() {
            return match (pause, draining) {
                (true, _) => Some(Parting::Pause),
                (false, true) => Some(Parting::Drain),
                (false, false) => None,
            };
        }
        if (pause || draining) && !self.pausing {
            self.pausing = true;
            let id = self.run.id().to_owned();
            self.run.shared.command(Command::PauseJob(id)).await;
        }
        None
    }
}

/// Does a short piece of work while renewing the lease; the work is dropped where that fails or
/// the worker drains.
pub async fn with_lease<T>(
    shared: &Shared,
    claim: &Claim,
    asked: Instant,
    work: impl Future<Output = T>,
) -> Result<T, Parting> {
    tokio::select! {
        done = work => Ok(done),
        parting = keep_alone(shared, claim, asked) => Err(parting),
        () = shared.drains() => Err(Parting::Drain),
    }
}

async fn keep_alone(shared: &Shared, claim: &Claim, mut asked: Instant) -> Parting {
    let mut hold = Hold::new(shared.options.lease, asked);
    loop {
        sleep_until(hold.due().min(asked + ASK_EVERY).into()).await;
        asked = Instant::now();
        match shared.storage.db.jobs().renew(claim, jobs::lease_ms(shared)).await {
            Ok(Renewed::Lost) => return Parting::Lost,
            Ok(Renewed::Kept { .. }) => hold.renewed(asked),
            Err(error) => {
                tracing::warn!(job.id = claim.job.id, %error, "renewing a lease failed");
                sleep(RETRY_LONGEST).await;
            }
        }
    }
}
