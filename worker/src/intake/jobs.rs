//! Jobs: takes leases, and starts a check or a run for each.

use super::job_check::{self, Checked};
use super::job_run::{self, End, Run};
use super::{Shared, lock};
use futures::FutureExt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use storage::db::{Claim, Claimant};
use tokio::task::JoinSet;

/// Resume points of ended jobs that one look removes.
const LEFTOVERS: u32 = 64;
/// How often they are looked for.
const SWEEP: Duration = Duration::from_secs(30);
/// How long this worker leaves jobs alone after one could not be trained or checked here: others
/// may have the room, or the store is away.
const REST: Duration = Duration::from_secs(2);
/// Between two looks whether an earlier run of the same job is over.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Looks for work whenever the bell rings, and at intervals, until the worker drains and all it
/// had begun is saved.
pub async fn run(shared: Arc<Shared>) {
    let mut sweep = tokio::time::interval(SWEEP);
    let mut desk = Desk {
        shared: shared.clone(),
        runs: JoinSet::new(),
        checks: JoinSet::new(),
        train_after: Instant::now(),
        check_after: Instant::now(),
    };
    loop {
        if sweep.tick().now_or_never().is_some()
            && let Err(error) = remove_leftovers(&shared).await
        {
            tracing::warn!(%error, "removing old resume points failed");
        }
        if let Err(error) = watch(&shared).await {
            tracing::warn!(%error, "looking at claimed jobs failed");
        }
        if let Err(error) = desk.look().await {
            tracing::warn!(%error, "looking for jobs failed");
        }
        if desk.is_done() {
            return;
        }
        tokio::select! {
            () = shared.job_bell.notified() => {}
            () = tokio::time::sleep(shared.options.poll) => {}
            Some(ended) = desk.runs.join_next() => desk.settle(ended.unwrap_or(Step::Rest)),
            Some(ended) = desk.checks.join_next() => {
                desk.settle(ended.unwrap_or(Step::RestChecks));
            },
        }
        if shared.commands.is_closed() {
            return;
        }
    }
}

/// Resume points of cancelled jobs have no owner left to remove them.
async fn remove_leftovers(shared: &Shared) -> storage::Result<()> {
    for key in shared.storage.db.jobs().take_leftover_resume_points(LEFTOVERS).await? {
        shared.storage.objects.delete(&key).await?;
    }
    Ok(())
}

/// Rings for the runs whose row says something new: a nudge may be lost, and with it a wish of
/// the client.
async fn watch(shared: &Shared) -> storage::Result<()> {
    if lock(&shared.running).is_empty() {
        return Ok(());
    }
    let held = shared.storage.db.jobs().held_by(&shared.options.worker_id).await?;
    for (id, running) in lock(&shared.running).iter() {
        let row = held.iter().find(|row| row.id == *id && row.attempt == running.attempt);
        if row.is_none_or(|row| row.intent.is_some()) {
            running.bell.notify_one();
        }
    }
    Ok(())
}

fn claimant(shared: &Shared) -> Claimant {
    Claimant {
        worker: shared.options.worker_id.clone(),
        base: shared.options.base_name.clone(),
        base_fingerprint: shared.base_fingerprint.clone(),
    }
}

/// The lease in the unit of rows.
pub fn lease_ms(shared: &Shared) -> i64 {
    shared.options.lease.as_millis() as i64
}

/// What follows from the end of a run or check.
enum Step {
    /// Look for the next job.
    Look,
    /// Train no other for a while.
    Rest,
    /// Check no other for a while.
    RestChecks,
}

/// The claims of this worker.
struct Desk {
    shared: Arc<Shared>,
    runs: JoinSet<Step>,
    /// At most one: whoever checks files still takes jobs to train.
    checks: JoinSet<Step>,
    train_after: Instant,
    check_after: Instant,
}

impl Desk {
    fn settle(&mut self, step: Step) {
        match step {
            Step::Look => {}
            Step::Rest => self.train_after = Instant::now() + REST,
            Step::RestChecks => self.check_after = Instant::now() + REST,
        }
    }

    fn is_done(&self) -> bool {
        self.drains() && self.runs.is_empty() && self.checks.is_empty()
    }

    fn has_room(&self) -> bool {
        self.runs.len() < self.shared.options.max_jobs
    }

    fn drains(&self) -> bool {
        self.shared.draining.load(Relaxed)
    }

    async fn look(&mut self) -> storage::Result<()> {
        let shared = self.shared.clone();
        let (jobs, claimant) = (shared.storage.db.jobs(), claimant(&shared));
        let asked = Instant::now();
        if !self.drains()
            && self.checks.is_empty()
            && asked >= self.check_after
            && let Some(claim) = jobs.claim_validation(&claimant, lease_ms(&shared)).await?
        {
            self.checks.spawn(check(shared.clone(), claim, asked));
        }
        while !self.drains() && self.has_room() && Instant::now() >= self.train_after {
            let asked = Instant::now();
            let Some(claim) = jobs.claim_training(&claimant, lease_ms(&shared)).await? else {
                break;
            };
            self.runs.spawn(train(Run::new(shared.clone(), claim, asked)));
        }
        Ok(())
    }
}

/// Tells the other workers that a job waits for one of them.
async fn pass_on(shared: &Shared, job: &str) {
    if let Err(error) = shared.storage.queue.nudge_job(job).await {
        tracing::warn!(job.id = job, %error, "other workers could not be told of a job");
    }
}

/// Trains a claimed job as far as this worker goes with it.
async fn train(run: Run) -> Step {
    let shared = &run.shared;
    let (news, bell) = loop {
        match shared.open_run(&run.claim) {
            Some(opened) => break opened,
            // Paused and resumed at once: the engine has not let go of it yet.
            None => tokio::time::sleep(LOOK_AGAIN).await,
        }
    };
    let ended = job_run::run(&run, news, bell).await;
    lock(&shared.running).remove(run.id());
    match ended {
        Ok(End::Done) => Step::Look,
        Ok(End::Released | End::NoRoom) => {
            pass_on(shared, run.id()).await;
            Step::Rest
        }
        Err(error) => {
            tracing::warn!(job.id = run.id(), %error, "a job's run ended early");
            Step::Rest
        }
    }
}

/// Checks a claimed job's files.
async fn check(shared: Arc<Shared>, claim: Claim, asked: Instant) -> Step {
    match job_check::validate(&shared, &claim, asked).await {
        Ok(Checked::Queued) if lock(&shared.running).len() < shared.options.max_jobs => {}
        Ok(Checked::Queued | Checked::Released) => pass_on(&shared, &claim.job.id).await,
        Ok(Checked::Done) => {}
        Err(error) => {
            tracing::warn!(job.id = claim.job.id, %error, "a job's files could not be checked");
            return Step::RestChecks;
        }
    }
    Step::Look
}
