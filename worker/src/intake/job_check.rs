//! A job's files are checked under a claim of its own, which needs no training room: then the job
//! is queued, or failed.

use super::examples::{self, Unusable};
use super::job_keep::{Parting, with_lease};
use super::job_write::Retry;
use super::{Shared, outbox};
use crate::dataset::Purpose;
use crate::train::auto::{self, Facts, Resolved};
use crate::train::metrics::JobNotice;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Instant;
use storage::db::{Claim, JobError, JobRow, JobWrite, StatusChange, Written};

/// What became of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checked {
    /// The job waits for a worker.
    Queued,
    /// It was given back, for the worker drains.
    Released,
    /// It failed, or is no longer this worker's.
    Done,
}

/// Checks the files of a claim whose statement was sent at `asked`.
pub async fn validate(
    shared: &Arc<Shared>,
    claim: &Claim,
    asked: Instant,
) -> anyhow::Result<Checked> {
    let work = async {
        let write = match check(shared, &claim.job).await {
            Ok((resolved, notices)) => JobWrite {
                events: notices.iter().map(outbox::event).collect(),
                resolved: Some(resolved.echo),
                status: Some(StatusChange::Queued),
                ..JobWrite::default()
            },
            Err(Unusable::Fault(error)) => {
                JobWrite { status: Some(StatusChange::Failed(error)), ..JobWrite::default() }
            }
            Err(Unusable::Later(error)) => return Err(error),
        };
        Ok(tell(shared, claim, &write).await)
    };
    match with_lease(shared, claim, asked, work).await {
        Ok(Ok(checked)) => Ok(checked),
        Ok(Err(error)) => {
            shared.storage.db.jobs().release(claim).await?;
            Err(error)
        }
        Err(Parting::Drain) => {
            shared.storage.db.jobs().release(claim).await?;
            Ok(Checked::Released)
        }
        Err(Parting::Lost | Parting::Pause) => Ok(Checked::Done),
    }
}

/// Writes what a check came to; while the database is away it is not lost.
async fn tell(shared: &Shared, claim: &Claim, write: &JobWrite) -> Checked {
    let mut retry = Retry::new(&claim.job.id, "writing about a job's files");
    let written = loop {
        match shared.storage.db.jobs().write(claim, write).await {
            Ok(written) => break written,
            Err(error) => retry.wait(error).await,
        }
    };
    retry.done();
    let queued = write.status == Some(StatusChange::Queued);
    let kept = matches!(written, Written::Done { .. });
    if queued && kept { Checked::Queued } else { Checked::Done }
}

async fn check(shared: &Arc<Shared>, job: &JobRow) -> Result<(Resolved, Vec<JobNotice>), Unusable> {
    let request = with_parent(shared, job).await?;
    // The length limit depends on the rank, and only on numbers of the request: resolve once for
    // it, then again with the number of examples that are left.
    let first = resolve(shared, job, &request, 1)?;
    let limit = first.spec.training.max_sequence_length;
    let training = examples::load(shared, job, Purpose::Training, limit).await?;
    let validation = examples::load(shared, job, Purpose::Validation, limit).await?;
    let resolved = resolve(shared, job, &request, training.examples.len())?;
    let notices = training.notices.into_iter().chain(validation.notices).collect();
    Ok((resolved, notices))
}

fn resolve(
    shared: &Shared,
    job: &JobRow,
    request: &Value,
    examples: usize,
) -> Result<Resolved, Unusable> {
    let facts = Facts {
        examples,
        hidden: shared.config.hidden,
        context: shared.config.context,
        arena_rows: shared.bounds.arena_rows,
        arena_rank_rows: shared.bounds.arena_rank_rows,
    };
    auto::resolve(&job.id, job.seed as u64, request, &facts).map_err(|fault| {
        Unusable::Fault(JobError {
            code: "invalid_value".to_owned(),
            message: fault.to_string(),
            param: Some(fault.field),
        })
    })
}

/// A job that continues from an adapter takes its shape; another one cannot hold its weights.
async fn with_parent(shared: &Arc<Shared>, job: &JobRow) -> Result<Value, Unusable> {
    let mut request = job.request.clone();
    let Some(parent) = &job.parent else { return Ok(request) };
    let weights = super::adapters::read_parent(shared, &parent.object).await?;
    let shape = weights.layout.shape();
    let targets: Vec<&str> =
        shape.targets.iter().map(|module| crate::adapters::layout::module_name(*module)).collect();
    let fixed = [
        ("rank", json!(shape.rank)),
        ("alpha", json!(shape.alpha)),
        ("use_rslora", json!(shape.use_rslora)),
        ("target_modules", json!(targets)),
    ];
    let Some(top) = request.as_object_mut() else { return Ok(request) };
    let lora = top.entry("lora").or_insert_with(|| json!({}));
    if lora.is_null() {
        *lora = json!({});
    }
    for (field, value) in fixed {
        match lora.get(field).filter(|given| !given.is_null()) {
            Some(given) if !same(given, &value) => {
                return Err(Unusable::Fault(JobError {
                    code: "invalid_value".to_owned(),
                    message: format!(
                        "lora.{field} is {given}, but the job continues from {}, which has {value}",
                        parent.model
                    ),
                    param: Some(format!("lora.{field}")),
                }));
            }
            _ => lora[field] = value,
        }
    }
    Ok(request)
}

/// Whether a requested value says the same; the order of modules does not matter.
fn same(given: &Value, value: &Value) -> bool {
    match (given, value) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().all(|item| b.contains(item))
        }
        (Value::String(name), Value::Array(all)) => name == "all-linear" && all.len() == 7,
        _ => given == value,
    }
}
