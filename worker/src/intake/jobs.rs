//! Jobs: takes leases, and starts a check or a run for each.

use super::job_check::{self, Checked};
use super::job_run::{self, End, Run};
use super::{Shared, lock};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use storage::db::{Claim, Claimant, JobStatus};
use storage::queue::message::ToWorker;
use tokio::task::JoinSet;

/// How long this worker leaves jobs alone after one could not be trained or checked here: others
/// may have the room, or the store is away.
const REST: Duration = Duration::from_secs(2);
/// A look at the rows that took so long was an outage. What has lapsed meanwhile is left to its
/// owners for a while: they renew as soon as the database answers.
const SLOW: Duration = Duration::from_secs(1);
/// Between two looks whether an earlier run of the same job is over.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Looks for work whenever the bell rings, and at intervals, until the worker drains and all it
/// had begun is saved.
pub async fn run(shared: Arc<Shared>) {
    let mut desk = Desk {
        shared: shared.clone(),
        runs: JoinSet::new(),
        held: Vec::new(),
        checks: JoinSet::new(),
        train_after: Instant::now(),
        check_after: Instant::now(),
    };
    loop {
        let began = Instant::now();
        let watched = watch(&shared).await;
        if let Err(error) = &watched {
            tracing::warn!(%error, "looking at claimed jobs failed");
        }
        if watched.is_err() || began.elapsed() > SLOW {
            desk.train_after = Instant::now() + REST;
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

/// Rings for the runs whose row says something new: a nudge may be lost, and with it a wish of
/// the client.
async fn watch(shared: &Shared) -> storage::Result<()> {
    let held = shared.storage.db.jobs().held_by(&shared.options.worker_id).await?;
    for (id, running) in lock(&shared.runs).iter() {
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
    held: Vec<Weak<Run>>,
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

    /// Whether a job may be taken to train. Not while a lease of this worker may have lapsed: the
    /// job would be taken from its own run.
    fn may_train(&self) -> bool {
        let lapsed = |held: &Weak<Run>| held.upgrade().is_some_and(|run| !run.is_firm());
        !self.drains()
            && self.runs.len() < self.shared.options.max_jobs
            && !lock(&self.shared.runs).moves()
            && Instant::now() >= self.train_after
            && !self.held.iter().any(lapsed)
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
        forget_moved(&shared).await?;
        while self.may_train() {
            let asked = Instant::now();
            let Some(claim) = jobs.claim_training(&claimant, lease_ms(&shared)).await? else {
                break;
            };
            let run = Arc::new(Run::new(shared.clone(), claim, asked));
            self.held.retain(|held| held.strong_count() > 0);
            self.held.push(Arc::downgrade(&run));
            self.runs.spawn(train(run));
        }
        Ok(())
    }
}

/// Tells the workers that may go on with a job that this one has let go of it. One that was moved
/// is left alone here for a while.
async fn pass_on(shared: &Shared, job: &str) {
    let to = lock(&shared.runs).let_go(job, Instant::now());
    let queue = &shared.storage.queue;
    let told = match to {
        Some(worker) => {
            let nudge = ToWorker::JobNudge { job_id: job.to_owned() };
            queue.control(&worker, nudge).await.map(|_| ())
        }
        None => queue.nudge_job(job).await,
    };
    if let Err(error) = told {
        tracing::warn!(job.id = job, %error, "other workers could not be told of a job");
    }
}

/// Moved jobs that somebody has, that ended, or that nobody wants.
async fn forget_moved(shared: &Shared) -> storage::Result<()> {
    let moved = lock(&shared.runs).left_alone(Instant::now());
    for (id, long_enough) in moved {
        let row = shared.storage.db.jobs().of_anyone(&id).await?;
        let free = row.is_some_and(|job| job.status == JobStatus::Running && job.owner.is_none());
        if !free || long_enough {
            lock(&shared.runs).forget(&id);
        }
    }
    Ok(())
}

/// Trains a claimed job as far as this worker goes with it.
async fn train(run: Arc<Run>) -> Step {
    let shared = &run.shared;
    let (news, bell) = loop {
        let opened = lock(&shared.runs).open(run.id(), run.claim.attempt);
        match opened {
            Some(opened) => break opened,
            // Paused and resumed at once: the engine has not let go of it yet.
            None => tokio::time::sleep(LOOK_AGAIN).await,
        }
    };
    let ended = job_run::run(&run, news, bell).await;
    let others_may = matches!(ended, Ok(End::Released | End::NoRoom));
    if others_may || lock(&shared.runs).is_moved(run.id()) {
        pass_on(shared, run.id()).await;
    }
    lock(&shared.runs).close(run.id(), Instant::now());
    match ended {
        Ok(End::Done) => Step::Look,
        Ok(End::Released | End::NoRoom) => Step::Rest,
        Err(error) => {
            tracing::warn!(job.id = run.id(), %error, "a job's run ended early");
            Step::Rest
        }
    }
}

/// Whether this worker itself may train what it has checked; otherwise the others are told.
fn may_follow(shared: &Shared) -> bool {
    !shared.draining.load(Relaxed) && lock(&shared.runs).len() < shared.options.max_jobs
}

/// Checks a claimed job's files.
async fn check(shared: Arc<Shared>, claim: Claim, asked: Instant) -> Step {
    match job_check::validate(&shared, &claim, asked).await {
        Ok(Checked::Queued) if may_follow(&shared) => {}
        Ok(Checked::Queued | Checked::Released) => pass_on(&shared, &claim.job.id).await,
        Ok(Checked::Done) => {}
        Err(error) => {
            tracing::warn!(job.id = claim.job.id, %error, "a job's files could not be checked");
            return Step::RestChecks;
        }
    }
    Step::Look
}
