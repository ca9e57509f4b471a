//! Jobs: takes leases, checks files, and starts a runner for each job that trains here.

use super::examples::{self, Unusable};
use super::{Shared, job_run, job_write, lock};
use crate::dataset::Purpose;
use crate::train::auto::{self, Facts, Resolved};
use crate::train::metrics::JobNotice;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use storage::db::{Claim, Claimant, JobError, JobRow, JobWrite, Renewed, StatusChange};

/// How long this worker leaves jobs alone after one found no room here.
const NO_ROOM_PAUSE: Duration = Duration::from_secs(2);

/// Looks for work whenever the bell rings, and at intervals.
pub async fn run(shared: Arc<Shared>) {
    loop {
        let bell = shared.job_bell.notified();
        if !shared.draining.load(Relaxed)
            && let Err(error) = look(&shared).await
        {
            tracing::warn!(%error, "looking for jobs failed");
        }
        let _ = tokio::time::timeout(shared.options.poll, bell).await;
        if shared.commands.is_closed() {
            return;
        }
    }
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

async fn look(shared: &Arc<Shared>) -> anyhow::Result<()> {
    let jobs = shared.storage.db.jobs();
    let claimant = claimant(shared);
    while let Some(claim) = jobs.claim_validation(&claimant, lease_ms(shared)).await? {
        validate(shared, &claim).await?;
    }
    while lock(&shared.running).len() < shared.options.max_jobs {
        let Some(claim) = jobs.claim_training(&claimant, lease_ms(shared)).await? else { break };
        let (news, bell) = shared.open_run(&claim.job.id);
        let shared = shared.clone();
        tokio::spawn(async move {
            let id = claim.job.id.clone();
            let ended = job_run::run(shared.clone(), claim, news, bell).await;
            lock(&shared.running).remove(&id);
            if let Err(error) = &ended {
                tracing::warn!(job.id = id, %error, "a job's run ended early");
            }
            if !matches!(ended, Ok(job_run::End::Done)) {
                tokio::time::sleep(NO_ROOM_PAUSE).await;
            }
            shared.job_bell.notify_one();
        });
    }
    Ok(())
}

/// Checks a job's files under a lease of its own: then it is queued, or failed.
async fn validate(shared: &Arc<Shared>, claim: &Claim) -> anyhow::Result<()> {
    let Some(checked) = with_lease(shared, claim, check(shared, &claim.job)).await? else {
        return Ok(());
    };
    let write = match checked {
        Ok((resolved, notices)) => JobWrite {
            events: notices.iter().map(job_write::event).collect(),
            resolved: Some(resolved.echo),
            status: Some(StatusChange::Queued),
            ..JobWrite::default()
        },
        Err(Unusable::Fault(error)) => {
            JobWrite { status: Some(StatusChange::Failed(error)), ..JobWrite::default() }
        }
        Err(Unusable::Later(error)) => {
            shared.storage.db.jobs().release(claim).await?;
            return Err(error);
        }
    };
    shared.storage.db.jobs().write(claim, &write).await?;
    Ok(())
}

/// Does a piece of work while renewing the lease. `None`: the lease was lost, the work dropped.
pub async fn with_lease<T>(
    shared: &Shared,
    claim: &Claim,
    work: impl Future<Output = T>,
) -> anyhow::Result<Option<T>> {
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return Ok(Some(done)),
            () = tokio::time::sleep(shared.options.lease / 3) => {
                let renewed = shared.storage.db.jobs().renew(claim, lease_ms(shared)).await?;
                if renewed == Renewed::Lost {
                    return Ok(None);
                }
            }
        }
    }
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
