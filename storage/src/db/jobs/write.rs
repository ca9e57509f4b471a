//! Everything an owner says about its job, as one transaction that begins with the fenced update
//! of the job's row and stops there when the claim is lost.

use serde_json::Value;

use super::resume_points::ResumePointRow;
use super::status::{By, from_states, owned_states};
use super::{Claim, JobError, JobStatus, Jobs};
use crate::db::adapters::check as check_adapter;
use crate::db::events::escape_nul;
use crate::db::row::{get, to_json};
use crate::db::{Level, NewCheckpoint, NewEvent, NewFile, Write, event_kind, patiently, sql};
use crate::error::Result;
use crate::objects::ObjectKey;

/// How far training is; shown, never judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Optimizer steps done.
    pub step: i64,
    /// Optimizer steps in all.
    pub total_steps: i64,
    /// Unix seconds, if it can be told.
    pub estimated_finish: Option<i64>,
}

/// A change of state by the owner; it ends the claim.
#[derive(Clone, Debug, PartialEq)]
pub enum StatusChange {
    /// The files are fine: `validating_files` → `queued`.
    Queued,
    /// Saved as the resume point in this or an earlier write: `running` → `paused`.
    Paused,
    /// Ended by a fault.
    Failed(JobError),
    /// Trained; all objects are stored.
    Succeeded {
        /// The final model, listed as the last checkpoint; its adapter's name is the job's
        /// `fine_tuned_model`.
        checkpoint: Box<NewCheckpoint>,
        /// `step_metrics.csv`.
        result_file: NewFile,
        /// Tokens seen by training over all epochs.
        trained_tokens: i64,
    },
}

/// What to write; empty parts change nothing. The messages of the contract for changes of state
/// and checkpoints are added here, after `events`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JobWrite {
    /// How far it is.
    pub progress: Option<Progress>,
    /// Events, in order.
    pub events: Vec<NewEvent>,
    /// Step of a resume point whose object ([`ObjectKey::ResumePoint`] with the claim's attempt)
    /// is stored.
    pub resume_point: Option<i64>,
    /// A checkpoint to list.
    pub checkpoint: Option<NewCheckpoint>,
    /// Hyperparameters as numbers.
    pub resolved: Option<Value>,
    /// A change of state.
    pub status: Option<StatusChange>,
}

/// Outcome of a write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Written {
    /// All of it is written.
    Done {
        /// Objects no row names any more; delete them now.
        pruned: Vec<ObjectKey>,
    },
    /// Cancelled, ended, or claimed by another; nothing was written.
    Lost,
}

impl Jobs<'_> {
    /// Writes about a claimed job, all or nothing. Repeating a write changes nothing.
    /// [`crate::Error::NameTaken`] if a new adapter's name exists: nothing was written.
    pub async fn write(&self, claim: &Claim, write: &JobWrite) -> Result<Written> {
        for checkpoint in write.checkpoint.iter().chain(write.final_checkpoint()) {
            check_adapter(&checkpoint.adapter)?;
        }
        patiently!(self.try_write(claim, write))
    }

    async fn try_write(&self, claim: &Claim, job_write: &JobWrite) -> Result<Written> {
        let (job, attempt) = (claim.job.id.as_str(), claim.attempt);
        let mut events = job_write.events.clone();
        events.extend(job_write.own_events(attempt));
        let mut write = self.db.begin().await?;
        let Some(held) = write.fenced_update(claim, job_write, events.len() as i64).await? else {
            return Ok(Written::Lost);
        };
        let mut pruned = Vec::new();
        if let Some(step) = job_write.resume_point {
            let point = ResumePointRow { job: job.to_owned(), step, attempt };
            pruned.extend(write.insert_resume_point(&point).await?);
        }
        if let Some(checkpoint) = &job_write.checkpoint {
            write.insert_checkpoint(&held.org, job, checkpoint).await?;
        }
        match &job_write.status {
            Some(StatusChange::Succeeded { checkpoint, result_file, .. }) => {
                write.insert_final_checkpoint(&held.org, job, checkpoint).await?;
                write.insert_file(&held.org, result_file).await?;
                pruned.extend(write.keep_resume_points(job, 0).await?);
            }
            Some(StatusChange::Failed(_)) => {
                pruned.extend(write.keep_resume_points(job, 0).await?);
            }
            Some(StatusChange::Queued | StatusChange::Paused) | None => {}
        }
        write.insert_events(job, held.first_event, &events).await?;
        write.commit().await?;
        Ok(Written::Done { pruned })
    }
}

/// What the fenced update gives the rest of the transaction.
struct Held {
    org: String,
    first_event: i64,
}

impl Write {
    /// Updates the claimed job's row and reserves event numbers; None if the claim is lost.
    async fn fenced_update(
        &mut self,
        claim: &Claim,
        write: &JobWrite,
        events: i64,
    ) -> Result<Option<Held>> {
        let now = self.now_ms();
        let new_status = write.status.as_ref().map(StatusChange::to);
        let allowed = match new_status {
            Some(to) => from_states(to, By::Owner),
            None => owned_states(),
        };
        let leaving = match new_status {
            None => "",
            Some(_) => ", owner = NULL, lease_until = 0, intent = NULL",
        };
        // A change of state is progress too: what follows is another piece of work.
        let fruitless = match new_status {
            None => "CASE WHEN $14 > furthest_step THEN 0 ELSE fruitless_claims END",
            Some(_) => "0",
        };
        let reached = write.resume_point.max(write.progress.map(|progress| progress.step));
        let finished = match new_status {
            Some(to) if to.is_terminal() => format!(", finished_at = {now} / 1000"),
            _ => String::new(),
        };
        let (error, model, file, trained) = outcome(write)?;
        let resolved = write.resolved.as_ref().map(|value| to_json("resolved", value));
        let row = sqlx::query(sql(format!(
            "UPDATE jobs SET event_sequence = event_sequence + $4, step = COALESCE($5, step),
                 total_steps = COALESCE($6, total_steps),
                 estimated_finish = CASE WHEN $8 IS NULL
                     THEN COALESCE($7, estimated_finish) ELSE NULL END,
                 status = COALESCE($8, status), resolved = COALESCE($9, resolved),
                 error = COALESCE($10, error),
                 fine_tuned_model = COALESCE($11, fine_tuned_model),
                 result_file = COALESCE($12, result_file),
                 trained_tokens = COALESCE($13, trained_tokens),
                 fruitless_claims = {fruitless},
                 furthest_step = CASE WHEN $14 > furthest_step THEN $14
                     ELSE furthest_step END{leaving}{finished}
             WHERE id = $1 AND owner = $2 AND attempt = $3 AND {allowed}
             RETURNING org, event_sequence"
        )))
        .bind(&claim.job.id)
        .bind(&claim.owner)
        .bind(claim.attempt)
        .bind(events)
        .bind(write.progress.map(|progress| progress.step))
        .bind(write.progress.map(|progress| progress.total_steps))
        .bind(write.progress.and_then(|progress| progress.estimated_finish))
        .bind(new_status.map(|to| to.as_str().to_owned()))
        .bind(resolved.transpose()?)
        .bind(error)
        .bind(model)
        .bind(file)
        .bind(trained)
        .bind(reached)
        .fetch_optional(self.connection())
        .await?;
        let Some(row) = row else { return Ok(None) };
        let last: i64 = get(&row, "event_sequence")?;
        Ok(Some(Held { org: get(&row, "org")?, first_event: last - events + 1 }))
    }
}

type Outcome = (Option<String>, Option<String>, Option<String>, Option<i64>);

/// The columns error, fine_tuned_model, result_file and trained_tokens of a change of state.
fn outcome(write: &JobWrite) -> Result<Outcome> {
    Ok(match &write.status {
        Some(StatusChange::Failed(error)) => {
            let shown = JobError { message: escape_nul(&error.message), ..error.clone() };
            (Some(to_json("error", &shown)?), None, None, None)
        }
        Some(StatusChange::Succeeded { checkpoint, result_file, trained_tokens }) => (
            None,
            Some(checkpoint.adapter.model.clone()),
            Some(result_file.id.clone()),
            Some(*trained_tokens),
        ),
        Some(StatusChange::Queued | StatusChange::Paused) | None => (None, None, None, None),
    })
}

impl StatusChange {
    /// The state it leads to.
    pub fn to(&self) -> JobStatus {
        match self {
            Self::Queued => JobStatus::Queued,
            Self::Paused => JobStatus::Paused,
            Self::Failed(_) => JobStatus::Failed,
            Self::Succeeded { .. } => JobStatus::Succeeded,
        }
    }
}

impl JobWrite {
    fn final_checkpoint(&self) -> Option<&NewCheckpoint> {
        match &self.status {
            Some(StatusChange::Succeeded { checkpoint, .. }) => Some(checkpoint),
            _ => None,
        }
    }

    /// The contract's messages for what this write does.
    fn own_events(&self, attempt: i64) -> Vec<NewEvent> {
        let mut events = Vec::new();
        if let Some(checkpoint) = &self.checkpoint {
            let (step, name) = (checkpoint.step, &checkpoint.adapter.model);
            events.push(NewEvent::info(
                event_kind::CHECKPOINT,
                step,
                format!("Checkpoint created at step {step} with Snapshot ID: {name}"),
            ));
        }
        match &self.status {
            None => {}
            Some(StatusChange::Queued) => events.push(NewEvent::info(
                event_kind::VALIDATED,
                0,
                "Files validated, moving job to queued state",
            )),
            Some(StatusChange::Paused) => {
                events.push(NewEvent::info(event_kind::PAUSED, attempt, "The job has been paused"));
            }
            Some(StatusChange::Failed(error)) => events.push(NewEvent {
                level: Level::Error,
                ..NewEvent::info(event_kind::FAILED, 0, error.message.clone())
            }),
            Some(StatusChange::Succeeded { checkpoint, .. }) => {
                let name = &checkpoint.adapter.model;
                events.push(NewEvent::info(
                    event_kind::MODEL,
                    0,
                    format!("New fine-tuned model created: {name}"),
                ));
                events.push(NewEvent::info(
                    event_kind::COMPLETED,
                    0,
                    "The job has successfully completed",
                ));
            }
        }
        events
    }
}
