//! Fine-tuning jobs. The gateway creates and steers them; a worker claims one by lease and writes
//! about it under its fencing number (`attempt`). Who may change what is in `status`.

mod claim;
mod create;
mod resume_points;
mod status;
mod steer;
mod write;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sqlx::any::AnyRow;

pub use claim::{Claim, Claimant, Held, Renewed};
pub use create::{JobCreated, NewJob};
pub use resume_points::ResumePointRow;
pub use status::{By, JobStatus, may_change};
pub use steer::{MetadataFilter, Transition};
pub use write::{JobWrite, Progress, StatusChange, Written};

use super::Db;
use super::row::{get, json, json_or_null, word};
use crate::error::{Error, Result};

/// A wish of the client that the owner has still to carry out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// Save and set aside.
    Pause,
}

/// The adapter a job continues from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterRef {
    /// `adp-…`
    pub id: String,
    /// `ft:…`
    pub model: String,
    /// Object folder; stays in the store while a job needs it.
    pub object: String,
}

/// Why a job failed, as replies show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobError {
    /// `invalid_training_file`, …
    pub code: String,
    /// For people.
    pub message: String,
    /// Field at fault.
    pub param: Option<String>,
}

/// A job.
#[derive(Clone, Debug, PartialEq)]
pub struct JobRow {
    /// `ftjob-…`
    pub id: String,
    /// Owner.
    pub org: String,
    /// Model as requested: a base, or an `ft:` name to continue from.
    pub model: String,
    /// Base model name.
    pub base: String,
    /// Fingerprint of the base at creation; only workers with the same weights claim it.
    pub base_fingerprint: String,
    /// The adapter to continue from.
    pub parent: Option<AdapterRef>,
    /// `file-…`
    pub training_file: String,
    /// `file-…`
    pub validation_file: Option<String>,
    /// Part of the result's name.
    pub suffix: Option<String>,
    /// 0 to 2³¹−1.
    pub seed: i64,
    /// Method, hyperparameters, `lora` and `training` as requested.
    pub request: Value,
    /// The same as numbers, after validation.
    pub resolved: Option<Value>,
    /// As requested; None if it was null or absent.
    pub metadata: Option<Map<String, Value>>,
    /// Where it stands.
    pub status: JobStatus,
    /// What the owner has still to do.
    pub intent: Option<Intent>,
    /// Worker id of the last claim while the job is claimed.
    pub owner: Option<String>,
    /// Fencing number: claims so far.
    pub attempt: i64,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix seconds of the first training claim.
    pub started_at: Option<i64>,
    /// Unix seconds; set in every terminal state.
    pub finished_at: Option<i64>,
    /// Tokens seen by training over all epochs; set by success.
    pub trained_tokens: Option<i64>,
    /// Unix seconds; set only while running.
    pub estimated_finish: Option<i64>,
    /// `ft:…`; set by success, kept when the model is deleted.
    pub fine_tuned_model: Option<String>,
    /// `file-…`; set by success.
    pub result_files: Vec<String>,
    /// Set by failure.
    pub error: Option<JobError>,
    /// Optimizer steps done, as last reported.
    pub step: i64,
    /// Optimizer steps in all, once known.
    pub total_steps: Option<i64>,
}

/// Access to jobs.
#[derive(Clone, Copy, Debug)]
pub struct Jobs<'a> {
    pub(super) db: &'a Db,
}

const COLUMNS: &str = "id, org, model, base, base_fingerprint, parent, training_file, \
    validation_file, suffix, seed, request, resolved, metadata, status, intent, owner, attempt, \
    created_at, started_at, finished_at, trained_tokens, estimated_finish, fine_tuned_model, \
    result_file, error, step, total_steps";

impl JobRow {
    /// The row as its creation returned it: a repeated create gives the first reply again.
    fn into_first_reply(self) -> Self {
        Self {
            resolved: None,
            status: JobStatus::ValidatingFiles,
            intent: None,
            owner: None,
            attempt: 0,
            started_at: None,
            finished_at: None,
            trained_tokens: None,
            estimated_finish: None,
            fine_tuned_model: None,
            result_files: Vec::new(),
            error: None,
            step: 0,
            total_steps: None,
            ..self
        }
    }
}

/// From [`COLUMNS`].
fn read(row: &AnyRow) -> Result<JobRow> {
    Ok(JobRow {
        id: get(row, "id")?,
        org: get(row, "org")?,
        model: get(row, "model")?,
        base: get(row, "base")?,
        base_fingerprint: get(row, "base_fingerprint")?,
        parent: json_or_null(row, "parent")?,
        training_file: get(row, "training_file")?,
        validation_file: get(row, "validation_file")?,
        suffix: get(row, "suffix")?,
        seed: get(row, "seed")?,
        request: json(row, "request")?,
        resolved: json_or_null(row, "resolved")?,
        metadata: json_or_null(row, "metadata")?,
        status: word(row, "status", JobStatus::parse)?,
        intent: read_intent(row)?,
        owner: get(row, "owner")?,
        attempt: get(row, "attempt")?,
        created_at: get(row, "created_at")?,
        started_at: get(row, "started_at")?,
        finished_at: get(row, "finished_at")?,
        trained_tokens: get(row, "trained_tokens")?,
        estimated_finish: get(row, "estimated_finish")?,
        fine_tuned_model: get(row, "fine_tuned_model")?,
        result_files: get::<Option<String>>(row, "result_file")?.into_iter().collect(),
        error: json_or_null(row, "error")?,
        step: get(row, "step")?,
        total_steps: get(row, "total_steps")?,
    })
}

fn read_intent(row: &AnyRow) -> Result<Option<Intent>> {
    match get::<Option<String>>(row, "intent")?.as_deref() {
        None => Ok(None),
        Some("pause") => Ok(Some(Intent::Pause)),
        Some(other) => {
            Err(Error::Unreadable { column: "intent", reason: format!("unknown {other:?}") })
        }
    }
}
