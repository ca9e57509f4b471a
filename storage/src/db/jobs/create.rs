//! Creating a job: the row, its files held against deletion, and its first two events, at once.

use serde_json::{Map, Value};

use super::{AdapterRef, COLUMNS, JobRow, JobStatus, Jobs, read};
use crate::db::idempotency::Earlier;
use crate::db::row::to_json;
use crate::db::{Idempotency, NewEvent, Write, event_kind, patiently, sql, without_nul};
use crate::error::Result;
use crate::ids::{IdKind, new_id};

/// A checked request for a job.
#[derive(Clone, Debug, PartialEq)]
pub struct NewJob {
    /// Owner.
    pub org: String,
    /// Model as requested.
    pub model: String,
    /// Base model name.
    pub base: String,
    /// The base's fingerprint now.
    pub base_fingerprint: String,
    /// The adapter to continue from.
    pub parent: Option<AdapterRef>,
    /// `file-…` of the same organization.
    pub training_file: String,
    /// `file-…` of the same organization.
    pub validation_file: Option<String>,
    /// Part of the result's name.
    pub suffix: Option<String>,
    /// 0 to 2³¹−1.
    pub seed: i64,
    /// Method, hyperparameters, `lora` and `training` as requested.
    pub request: Value,
    /// String values; None if null or absent.
    pub metadata: Option<Map<String, Value>>,
    /// The client's key, if it sent one.
    pub idempotency: Option<Idempotency>,
}

/// Outcome of creating a job.
#[derive(Clone, Debug, PartialEq)]
pub enum JobCreated {
    /// A new job in `validating_files`.
    New(JobRow),
    /// The job of the first request with this key, as that request saw it.
    Replayed(JobRow),
    /// The key was used with another body (400).
    KeyReused,
    /// This parameter names no file of the organization (any more).
    FileMissing(&'static str),
}

impl Jobs<'_> {
    /// Creates a job with its events "Created fine-tuning job" and "Validating training file".
    pub async fn create(&self, job: &NewJob) -> Result<JobCreated> {
        check(job)?;
        patiently!(self.try_create(job))
    }

    async fn try_create(&self, job: &NewJob) -> Result<JobCreated> {
        let id = new_id(IdKind::Job);
        let mut write = self.db.begin().await?;
        if let Some(idempotency) = &job.idempotency {
            match write.remember(&job.org, "jobs", idempotency, &id).await? {
                Earlier::None => {}
                Earlier::Other => return Ok(JobCreated::KeyReused),
                Earlier::Same(first) => {
                    let row = sqlx::query(sql(format!("SELECT {COLUMNS} FROM jobs WHERE id = $1")))
                        .bind(first)
                        .fetch_one(write.connection())
                        .await?;
                    return Ok(JobCreated::Replayed(read(&row)?.into_first_reply()));
                }
            }
        }
        let training = ("training_file", Some(&job.training_file));
        let validation = ("validation_file", job.validation_file.as_ref());
        let mut files = [training, validation];
        // Held in one order by everybody, so that two jobs cannot wait for each other.
        files.sort_by_key(|(_, file)| *file);
        for (param, file) in files {
            if let Some(file) = file
                && !write.hold_file(&job.org, file).await?
            {
                return Ok(JobCreated::FileMissing(param));
            }
        }
        let events = first_events(&id, job);
        let row = write.insert_job(&id, job, events.len() as i64).await?;
        write.insert_metadata(&id, job).await?;
        write.insert_events(&id, 1, &events).await?;
        write.commit().await?;
        Ok(JobCreated::New(row))
    }
}

impl Write {
    async fn insert_job(&mut self, id: &str, job: &NewJob, events: i64) -> Result<JobRow> {
        let now = self.now_ms();
        let sequence = self.next_sequence("jobs").await?;
        let parent = job.parent.as_ref().map(|parent| to_json("parent", parent)).transpose()?;
        let metadata = job.metadata.as_ref().map(|map| to_json("metadata", map)).transpose()?;
        let row = sqlx::query(sql(format!(
            "INSERT INTO jobs (id, sequence, org, model, base, base_fingerprint, parent,
                 training_file, validation_file, suffix, seed, request, metadata, status,
                 event_sequence, created_at)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15,
                 {now} / 1000)
             RETURNING {COLUMNS}"
        )))
        .bind(id)
        .bind(sequence)
        .bind(&job.org)
        .bind(&job.model)
        .bind(&job.base)
        .bind(&job.base_fingerprint)
        .bind(parent)
        .bind(&job.training_file)
        .bind(job.validation_file.clone())
        .bind(job.suffix.clone())
        .bind(job.seed)
        .bind(to_json("request", &job.request)?)
        .bind(metadata)
        .bind(JobStatus::ValidatingFiles.as_str())
        .bind(events)
        .fetch_one(self.connection())
        .await?;
        read(&row)
    }

    /// One row per pair, so that lists can be filtered by it on both databases.
    async fn insert_metadata(&mut self, id: &str, job: &NewJob) -> Result<()> {
        for (name, value) in job.metadata.iter().flatten() {
            if let Value::String(text) = value {
                sqlx::query("INSERT INTO job_metadata (job, name, value) VALUES ($1, $2, $3)")
                    .bind(id)
                    .bind(name)
                    .bind(text)
                    .execute(self.connection())
                    .await?;
            }
        }
        Ok(())
    }
}

fn first_events(id: &str, job: &NewJob) -> [NewEvent; 2] {
    let mut validating = format!("Validating training file: {}", job.training_file);
    if let Some(file) = &job.validation_file {
        validating.push_str(" and validation file: ");
        validating.push_str(file);
    }
    [
        NewEvent::info(event_kind::CREATED, 0, format!("Created fine-tuning job: {id}")),
        NewEvent::info(event_kind::VALIDATING, 0, validating),
    ]
}

fn check(job: &NewJob) -> Result<()> {
    without_nul("model", &job.model)?;
    without_nul("suffix", job.suffix.as_deref().unwrap_or_default())?;
    without_nul("training_file", &job.training_file)?;
    without_nul("validation_file", job.validation_file.as_deref().unwrap_or_default())?;
    for (name, value) in job.metadata.iter().flatten() {
        without_nul("metadata", name)?;
        without_nul("metadata", value.as_str().unwrap_or_default())?;
    }
    Ok(())
}
