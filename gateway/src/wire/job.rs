//! Fine-tuning jobs: the request to create one, and the reply objects.

use serde::Serialize;
use serde_json::{Map, Value};
use storage::db::{CheckpointRow, EventRow, JobRow, JobStatus};
use utoipa::ToSchema;

use crate::error::{ApiError, ApiResult};
use crate::wire::fields::{self, Fields};
use crate::wire::training::{ParentShape, echo, parse_settings};

/// A checked request for a job, all but its model.
#[derive(Clone, Debug, PartialEq)]
pub struct CreateJob {
    /// `file-…`.
    pub training_file: String,
    /// `file-…`.
    pub validation_file: Option<String>,
    /// Part of the result's name.
    pub suffix: Option<String>,
    /// Drawn where none was given.
    pub seed: i64,
    /// Canonical form of [`crate::wire::training`].
    pub settings: Value,
    /// String values.
    pub metadata: Option<Map<String, Value>>,
}

impl CreateJob {
    /// Parses the body from which `model` was taken already.
    pub fn parse(mut body: Fields, parent: Option<&ParentShape>) -> ApiResult<CreateJob> {
        let training_file = body.required_string("training_file")?;
        let validation_file = body.string("validation_file")?;
        let suffix = parse_suffix(&mut body)?;
        let seed = body.integer("seed", 0, i64::from(i32::MAX))?;
        let metadata = fields::metadata(&mut body)?;
        refuse_integrations(&mut body)?;
        let settings = parse_settings(&mut body, parent)?;
        body.finish()?;
        let seed = seed.unwrap_or_else(|| rand::random_range(0..=i64::from(i32::MAX)));
        Ok(CreateJob { training_file, validation_file, suffix, seed, settings, metadata })
    }
}

fn parse_suffix(body: &mut Fields) -> ApiResult<Option<String>> {
    let Some(suffix) = body.string("suffix")? else { return Ok(None) };
    if suffix.is_empty() {
        let message = "Invalid 'suffix': empty string. Expected a string with minimum length 1.";
        return Err(ApiError::bad("string_below_min_length", "suffix", message));
    }
    fields::max_chars(&suffix, "suffix", 64)?;
    check_name("suffix", &suffix)?;
    Ok(Some(suffix))
}

/// Part of an `ft:` name: `[A-Za-z0-9._-]`.
pub fn check_name(param: &str, text: &str) -> ApiResult<()> {
    if !text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
        let message =
            format!("Invalid '{param}': only letters, digits, '.', '_' and '-' are allowed.");
        return Err(ApiError::invalid_value(param, message));
    }
    Ok(())
}

fn refuse_integrations(body: &mut Fields) -> ApiResult<()> {
    match body.array("integrations")? {
        Some(items) if !items.is_empty() => {
            let message = "Integrations are not supported.";
            Err(ApiError::unsupported_value("integrations", message))
        }
        _ => Ok(()),
    }
}

/// `fine_tuning.job`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct FineTuningJob {
    /// Always `fine_tuning.job`.
    pub object: &'static str,
    /// `ftjob-…`.
    pub id: String,
    /// Unix seconds.
    pub created_at: i64,
    /// Model as requested.
    pub model: String,
    /// `org-…`.
    pub organization_id: String,
    /// `validating_files`, `queued`, `running`, `paused`, `succeeded`, `failed` or `cancelled`.
    pub status: &'static str,
    /// `file-…`.
    pub training_file: String,
    /// `file-…`.
    pub validation_file: Option<String>,
    /// Of all randomness of the job.
    pub seed: i64,
    /// Method and its hyperparameters.
    #[schema(value_type = Object)]
    pub method: Value,
    /// The same hyperparameters.
    #[schema(value_type = Object)]
    pub hyperparameters: Map<String, Value>,
    /// `file-…`.
    pub result_files: Vec<String>,
    /// `ft:…`; null until succeeded.
    pub fine_tuned_model: Option<String>,
    /// Unix seconds; set in every terminal state.
    pub finished_at: Option<i64>,
    /// Over all epochs; null until succeeded.
    pub trained_tokens: Option<i64>,
    /// Unix seconds; set only while running.
    pub estimated_finish: Option<i64>,
    /// Why it failed.
    pub error: Option<JobFault>,
    /// Always empty.
    #[schema(value_type = Vec<Object>)]
    pub integrations: [(); 0],
    /// As requested.
    #[schema(value_type = Option<Object>)]
    pub metadata: Option<Map<String, Value>>,
    /// As requested.
    pub user_provided_suffix: Option<String>,
    /// Shape of the adapter.
    #[schema(value_type = Object)]
    pub lora: Map<String, Value>,
    /// How it is trained.
    #[schema(value_type = Object)]
    pub training: Map<String, Value>,
}

/// Why a job failed.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct JobFault {
    /// Machine-readable reason.
    pub code: String,
    /// For people.
    pub message: String,
    /// Field at fault.
    pub param: Option<String>,
}

impl From<JobRow> for FineTuningJob {
    fn from(row: JobRow) -> FineTuningJob {
        let shown = echo(&row.request, row.resolved.as_ref());
        let fault = |error: storage::db::JobError| JobFault {
            code: error.code,
            message: error.message,
            param: error.param,
        };
        FineTuningJob {
            object: "fine_tuning.job",
            id: row.id,
            created_at: row.created_at,
            model: row.model,
            organization_id: row.org,
            status: row.status.as_str(),
            training_file: row.training_file,
            validation_file: row.validation_file,
            seed: row.seed,
            method: shown.method,
            hyperparameters: shown.hyperparameters,
            result_files: row.result_files,
            fine_tuned_model: row.fine_tuned_model,
            finished_at: row.finished_at,
            trained_tokens: row.trained_tokens,
            estimated_finish: row.estimated_finish.filter(|_| row.status == JobStatus::Running),
            error: row.error.map(fault),
            integrations: [],
            metadata: row.metadata,
            user_provided_suffix: row.suffix,
            lora: shown.lora,
            training: shown.training,
        }
    }
}

/// `fine_tuning.job.event`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct JobEvent {
    /// Always `fine_tuning.job.event`.
    pub object: &'static str,
    /// `ftevent-…`.
    pub id: String,
    /// Unix seconds.
    pub created_at: i64,
    /// `info`, `warn` or `error`.
    pub level: &'static str,
    /// For people.
    pub message: String,
    /// `message` or `metrics`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Numbers; `{}` when there are none.
    #[schema(value_type = Object)]
    pub data: Map<String, Value>,
}

impl From<EventRow> for JobEvent {
    fn from(row: EventRow) -> JobEvent {
        JobEvent {
            object: "fine_tuning.job.event",
            id: row.id,
            created_at: row.created_at,
            level: row.level.as_str(),
            message: row.message,
            kind: row.event_type.as_str(),
            data: row.data,
        }
    }
}

/// `fine_tuning.job.checkpoint`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct JobCheckpoint {
    /// Always `fine_tuning.job.checkpoint`.
    pub object: &'static str,
    /// `ftckpt_…`.
    pub id: String,
    /// Unix seconds.
    pub created_at: i64,
    /// A model name.
    pub fine_tuned_model_checkpoint: String,
    /// `ftjob-…`.
    pub fine_tuning_job_id: String,
    /// Optimizer steps done.
    pub step_number: i64,
    /// Losses and accuracies.
    #[schema(value_type = Object)]
    pub metrics: Map<String, Value>,
}

impl From<CheckpointRow> for JobCheckpoint {
    fn from(row: CheckpointRow) -> JobCheckpoint {
        let mut metrics = row.metrics;
        metrics.entry("step").or_insert(Value::from(row.step));
        metrics.retain(|_, value| !value.is_null());
        JobCheckpoint {
            object: "fine_tuning.job.checkpoint",
            id: row.id,
            created_at: row.created_at,
            fine_tuned_model_checkpoint: row.model,
            fine_tuning_job_id: row.job,
            step_number: row.step,
            metrics,
        }
    }
}
