//! Leases: a worker takes a job, keeps it by renewing, and gives it back. All times are the
//! database's; no transaction stays open while a job runs.

use super::status::{By, from_states, may_change};
use super::{COLUMNS, Intent, JobError, JobRow, JobStatus, Jobs, read, read_intent};
use crate::db::row::{get, to_json};
use crate::db::{Level, NewEvent, event_kind, patiently, sql};
use crate::error::Result;
use sqlx::any::AnyRow;

/// Candidates another worker may take from under a claim before it gives up until the next poll.
const CLAIM_RUNS: u32 = 32;

/// Claims without progress after which a job fails: it may be what ends its workers.
const FRUITLESS_CLAIMS: i64 = 3;

/// Who claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimant {
    /// Worker id.
    pub worker: String,
    /// Base model name it serves.
    pub base: String,
    /// Fingerprint of that base's weights; jobs made for other weights are left alone.
    pub base_fingerprint: String,
}

/// Hold of a job. Writes name (id, owner, attempt); after another claim they find nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Claim {
    /// The job as claimed.
    pub job: JobRow,
    /// Fencing number of this claim.
    pub attempt: i64,
    /// Worker id.
    pub owner: String,
}

/// Outcome of a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewed {
    /// Still held, for the lease's length from now.
    Kept {
        /// What the client wants of the owner.
        intent: Option<Intent>,
    },
    /// Cancelled, ended, or claimed by another: stop, write nothing more.
    Lost,
}

/// A job that a worker holds, as its row says now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// `ftjob-…`
    pub id: String,
    /// Number of the claim.
    pub attempt: i64,
    /// What the client wants of the owner.
    pub intent: Option<Intent>,
}

impl Jobs<'_> {
    /// Takes the oldest job whose files are to be checked: unclaimed or with a lapsed lease.
    pub async fn claim_validation(
        &self,
        claimant: &Claimant,
        lease_ms: i64,
    ) -> Result<Option<Claim>> {
        self.claim(claimant, lease_ms, JobStatus::ValidatingFiles).await
    }

    /// Takes the oldest job to train: queued, or running with a lapsed lease. The first claim adds
    /// the event "Fine-tuning job started".
    pub async fn claim_training(
        &self,
        claimant: &Claimant,
        lease_ms: i64,
    ) -> Result<Option<Claim>> {
        self.claim(claimant, lease_ms, JobStatus::Running).await
    }

    async fn claim(
        &self,
        claimant: &Claimant,
        lease_ms: i64,
        to: JobStatus,
    ) -> Result<Option<Claim>> {
        let free = free_for(to, self.db.now_ms());
        for _ in 0..CLAIM_RUNS {
            let oldest = sqlx::query(sql(format!(
                "SELECT id, fruitless_claims FROM jobs
                 WHERE base = $1 AND base_fingerprint = $2 AND {free}
                 ORDER BY sequence LIMIT 1"
            )))
            .bind(&claimant.base)
            .bind(&claimant.base_fingerprint)
            .fetch_optional(&self.db.pool)
            .await?;
            let Some(row) = oldest else { return Ok(None) };
            let id: String = get(&row, "id")?;
            if get::<i64>(&row, "fruitless_claims")? >= FRUITLESS_CLAIMS {
                let given_up: Result<()> = patiently!(self.try_give_up(&id, to));
                given_up?;
                continue;
            }
            let claim: Result<_> = patiently!(self.try_take(&id, claimant, lease_ms, to));
            if let Some(claim) = claim? {
                return Ok(Some(claim));
            }
        }
        Ok(None)
    }

    /// The compare-and-set: takes the job if it is still free.
    async fn try_take(
        &self,
        id: &str,
        claimant: &Claimant,
        lease_ms: i64,
        to: JobStatus,
    ) -> Result<Option<Claim>> {
        let mut write = self.db.begin().await?;
        let now = write.now_ms();
        let free = free_for(to, now);
        let started = match to {
            JobStatus::Running => format!("COALESCE(started_at, {now} / 1000)"),
            _ => "started_at".to_owned(),
        };
        let taken = sqlx::query(sql(format!(
            "UPDATE jobs SET owner = $2, attempt = attempt + 1, lease_until = {now} + $3,
                 status = $4, started_at = {started}, event_sequence = event_sequence + 1,
                 fruitless_claims = fruitless_claims + 1
             WHERE id = $1 AND {free} RETURNING {COLUMNS}, event_sequence"
        )))
        .bind(id)
        .bind(&claimant.worker)
        .bind(lease_ms)
        .bind(to.as_str())
        .fetch_optional(write.connection())
        .await?;
        let Some(row) = taken else { return Ok(None) };
        if to == JobStatus::Running {
            let event = NewEvent::info(event_kind::STARTED, 0, "Fine-tuning job started");
            write.insert_events(id, get(&row, "event_sequence")?, &[event]).await?;
        }
        write.commit().await?;
        let job = read(&row)?;
        Ok(Some(Claim { attempt: job.attempt, owner: claimant.worker.clone(), job }))
    }

    /// Fails a job whose last claims all ended with their worker, unless somebody took it.
    async fn try_give_up(&self, id: &str, to: JobStatus) -> Result<()> {
        let mut write = self.db.begin().await?;
        let now = write.now_ms();
        let (free, may_fail) = (free_for(to, now), from_states(JobStatus::Failed, By::Claimant));
        let what = match to {
            JobStatus::ValidatingFiles => "checking its files",
            _ => "training",
        };
        let message = format!(
            "The job failed: {what} was tried {FRUITLESS_CLAIMS} times, and each time its worker \
             was lost before it came any further."
        );
        let error = JobError { code: "worker_lost".to_owned(), message, param: None };
        let failed = sqlx::query(sql(format!(
            "UPDATE jobs SET status = 'failed', error = $2, finished_at = {now} / 1000,
                 owner = NULL, lease_until = 0, intent = NULL, estimated_finish = NULL,
                 event_sequence = event_sequence + 1
             WHERE id = $1 AND {free} AND {may_fail} AND fruitless_claims >= $3
             RETURNING event_sequence"
        )))
        .bind(id)
        .bind(to_json("error", &error)?)
        .bind(FRUITLESS_CLAIMS)
        .fetch_optional(write.connection())
        .await?;
        let Some(row) = failed else { return Ok(()) };
        let event = NewEvent {
            level: Level::Error,
            ..NewEvent::info(event_kind::FAILED, 0, error.message)
        };
        write.insert_events(id, get(&row, "event_sequence")?, &[event]).await?;
        write.commit().await
    }

    /// The jobs that a worker holds, lapsed leases nobody took among them.
    pub async fn held_by(&self, worker: &str) -> Result<Vec<Held>> {
        let held = super::status::owned_states();
        let rows = sqlx::query(sql(format!(
            "SELECT id, attempt, intent FROM jobs WHERE owner = $1 AND {held}"
        )))
        .bind(worker)
        .fetch_all(&self.db.pool)
        .await?;
        let held = |row: &AnyRow| {
            Ok(Held {
                id: get(row, "id")?,
                attempt: get(row, "attempt")?,
                intent: read_intent(row)?,
            })
        };
        rows.iter().map(held).collect()
    }

    /// Extends the lease to `lease_ms` from now, also a lapsed one that nobody else has taken.
    pub async fn renew(&self, claim: &Claim, lease_ms: i64) -> Result<Renewed> {
        patiently!(self.try_renew(claim, lease_ms))
    }

    async fn try_renew(&self, claim: &Claim, lease_ms: i64) -> Result<Renewed> {
        let mut write = self.db.begin().await?;
        let now = write.now_ms();
        let held = super::status::owned_states();
        let row = sqlx::query(sql(format!(
            "UPDATE jobs SET lease_until = {now} + $4
             WHERE id = $1 AND owner = $2 AND attempt = $3 AND {held} RETURNING intent"
        )))
        .bind(&claim.job.id)
        .bind(&claim.owner)
        .bind(claim.attempt)
        .bind(lease_ms)
        .fetch_optional(write.connection())
        .await?;
        write.commit().await?;
        match row {
            Some(row) => Ok(Renewed::Kept { intent: read_intent(&row)? }),
            None => Ok(Renewed::Lost),
        }
    }

    /// Ends the lease now, the state unchanged, so that any worker may go on at once. Harmless
    /// when the claim is lost already.
    pub async fn release(&self, claim: &Claim) -> Result<()> {
        patiently!(self.try_release(claim))
    }

    /// Ends all leases of a worker that is known to be dead: the embedded form, which holds the
    /// lock of its data folder, calls it at start so that no job waits for its lease to lapse.
    pub async fn release_all(&self, worker: &str) -> Result<()> {
        patiently!(self.try_release_all(worker))
    }

    async fn try_release_all(&self, worker: &str) -> Result<()> {
        let mut write = self.db.begin().await?;
        sqlx::query("UPDATE jobs SET lease_until = 0, owner = NULL WHERE owner = $1")
            .bind(worker)
            .execute(write.connection())
            .await?;
        write.commit().await
    }

    async fn try_release(&self, claim: &Claim) -> Result<()> {
        let mut write = self.db.begin().await?;
        sqlx::query(
            "UPDATE jobs SET lease_until = 0, owner = NULL, fruitless_claims =
                 CASE WHEN fruitless_claims > 0 THEN fruitless_claims - 1 ELSE 0 END
             WHERE id = $1 AND owner = $2 AND attempt = $3",
        )
        .bind(&claim.job.id)
        .bind(&claim.owner)
        .bind(claim.attempt)
        .execute(write.connection())
        .await?;
        write.commit().await
    }
}

/// The condition under which a job may be taken into state `to`: a state one may come from, and
/// no lease that still runs (`lease_until` is 0 where nobody holds one).
fn free_for(to: JobStatus, now: &str) -> String {
    let states: Vec<_> = JobStatus::ALL
        .into_iter()
        .filter(|from| may_change(*from, to, By::Claimant))
        .map(|from| format!("'{}'", from.as_str()))
        .collect();
    format!("status IN ({}) AND lease_until <= {now}", states.join(", "))
}
