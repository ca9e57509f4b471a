//! `/v1/fine_tuning/jobs`: create, look, cancel, pause, resume. What a job does is its worker's
//! business; here are rows and a nudge.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::Uri;
use storage::db::{
    AdapterRef, Caller, JobCreated, JobRow, JobStatus, MetadataFilter, NewJob, Resolved, Transition,
};
use tokio::time::{Instant, sleep};

use super::{Id, hex_hash, idempotency, key_reused};
use crate::auth::Authenticated;
use crate::body;
use crate::error::{ApiError, ApiResult, ErrorReply};
use crate::gateway::Gateway;
use crate::wire::fields::Fields;
use crate::wire::file::Purpose;
use crate::wire::job::{CreateJob, FineTuningJob};
use crate::wire::list::{List, Query};
use crate::wire::request::CreateJobRequest;
use crate::wire::training::ParentShape;

/// Between two looks at a job that is being paused; its owner obeys within a second.
const PAUSE_LOOK: Duration = Duration::from_millis(100);

/// Create a job. It starts when a worker of its base has room.
#[utoipa::path(
    post,
    path = "/v1/fine_tuning/jobs",
    tag = "Fine-tuning",
    request_body = CreateJobRequest,
    responses(
        (status = 200, description = "Created", body = FineTuningJob),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn create_job(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    request: Request,
) -> ApiResult<Json<FineTuningJob>> {
    let headers = request.headers().clone();
    let bytes = body::read(&gateway, request).await?;
    let idempotency = idempotency(&headers, hex_hash(&bytes))?;
    let mut fields = Fields::parse(&bytes)?;
    let model = fields.required_string("model")?;
    let origin = origin(&gateway, &caller, &model).await?;
    let job = CreateJob::parse(fields, origin.shape.as_ref())?;
    if job.settings["method"]["type"] == "dpo" && !gateway.config().dpo {
        let message = "Fine-tuning with method 'dpo' is not supported yet.";
        return Err(ApiError::unsupported_value("method.type", message));
    }
    check_file(&gateway, &caller, "training_file", &job.training_file).await?;
    if let Some(file) = &job.validation_file {
        check_file(&gateway, &caller, "validation_file", file).await?;
    }
    let new = NewJob {
        org: caller.org,
        model,
        base: origin.base,
        base_fingerprint: origin.base_fingerprint,
        parent: origin.parent,
        training_file: job.training_file,
        validation_file: job.validation_file,
        suffix: job.suffix,
        seed: job.seed,
        request: job.settings,
        metadata: job.metadata,
        idempotency,
    };
    match gateway.storage().db.jobs().create(&new).await? {
        JobCreated::New(row) => {
            nudge(&gateway, &row.id).await;
            Ok(Json(row.into()))
        }
        JobCreated::Replayed(row) => Ok(Json(row.into())),
        JobCreated::KeyReused => Err(key_reused()),
        JobCreated::FileMissing("validation_file") => {
            Err(no_file("validation_file", new.validation_file.as_deref().unwrap_or_default()))
        }
        JobCreated::FileMissing(param) => Err(no_file(param, &new.training_file)),
    }
}

/// What a job starts from.
struct Origin {
    base: String,
    base_fingerprint: String,
    parent: Option<AdapterRef>,
    shape: Option<ParentShape>,
}

/// A base, or an own fine-tuned model to continue from.
async fn origin(gateway: &Gateway, caller: &Caller, model: &str) -> ApiResult<Origin> {
    let not_available = || {
        let message = format!("Model {model} is not available for fine-tuning or does not exist.");
        ApiError::bad("model_not_available", "model", message)
    };
    if model.contains('\0') {
        return Err(not_available());
    }
    let resolved = gateway.storage().db.resolve(&caller.org, model).await?;
    match resolved.ok_or_else(not_available)? {
        Resolved::Base(row) => Ok(Origin {
            base: row.name,
            base_fingerprint: row.fingerprint,
            parent: None,
            shape: None,
        }),
        Resolved::Adapter(row) if row.model == model => Ok(Origin {
            shape: Some(ParentShape {
                rank: row.rank,
                alpha: row.alpha,
                use_rslora: row.use_rslora,
                target_modules: row.target_modules,
            }),
            parent: Some(AdapterRef { id: row.id, model: row.model, object: row.object }),
            base: row.base,
            base_fingerprint: row.base_fingerprint,
        }),
        Resolved::Adapter(_) | Resolved::Job(_) => Err(not_available()),
    }
}

fn no_file(param: &'static str, id: &str) -> ApiError {
    ApiError::invalid_value(param, format!("Invalid '{param}': no such file: {id}"))
}

/// The file must be the organization's own, with purpose `fine-tune`.
async fn check_file(
    gateway: &Gateway,
    caller: &Caller,
    param: &'static str,
    id: &str,
) -> ApiResult<()> {
    if id.contains('\0') {
        return Err(no_file(param, ""));
    }
    let row = gateway.storage().db.files().get(&caller.org, id).await?;
    let row = row.ok_or_else(|| no_file(param, id))?;
    if row.purpose != Purpose::FineTune.as_str() {
        let message = format!(
            "Invalid '{param}': file {id} has purpose '{}', expected 'fine-tune'.",
            row.purpose
        );
        return Err(ApiError::invalid_value(param, message));
    }
    Ok(())
}

/// Tells the workers to look at a job now; without it they look at their next poll.
async fn nudge(gateway: &Gateway, job: &str) {
    if let Err(error) = gateway.storage().queue.nudge_job(job).await {
        tracing::warn!(%error, job.id = job, "workers could not be nudged");
    }
}

/// The organization's jobs, newest first.
#[utoipa::path(
    get,
    path = "/v1/fine_tuning/jobs",
    tag = "Fine-tuning",
    params(
        ("limit" = Option<u32>, Query, description = "1 to 100, 20 by default"),
        ("after" = Option<String>, Query, description = "Id of the job before the page"),
        ("metadata" = Option<String>, Query,
            description = "`metadata[k]=v` filters by a pair; `metadata=null`: without metadata"),
    ),
    responses(
        (status = 200, description = "A page", body = List<FineTuningJob>),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn list_jobs(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    uri: Uri,
) -> ApiResult<Json<List<FineTuningJob>>> {
    let query = Query::parse(&uri)?;
    let page = query.page(20, 100, false)?;
    let filter = metadata_filter(&query)?;
    let listing = gateway.storage().db.jobs().list(&caller.org, &page, &filter).await?;
    let data = listing.rows.into_iter().map(FineTuningJob::from).collect();
    Ok(Json(List::new(data, listing.has_more)))
}

fn metadata_filter(query: &Query) -> ApiResult<MetadataFilter> {
    let mut filter = MetadataFilter::default();
    for (name, value) in query.pairs() {
        if name == "metadata" && value == "null" {
            filter.absent = true;
        } else if let Some(key) = name.strip_prefix("metadata[") {
            let key = key.strip_suffix(']').filter(|key| !key.contains('\0'));
            let Some(key) = key.filter(|_| !value.contains('\0')) else {
                return Err(ApiError::invalid_value("metadata", "Invalid metadata filter."));
            };
            filter.pairs.push((key.to_owned(), value.clone()));
        } else if name == "metadata" {
            return Err(ApiError::invalid_value(
                "metadata",
                "Invalid metadata filter: write metadata[key]=value, or metadata=null.",
            ));
        }
    }
    crate::wire::fields::max_items(filter.pairs.len(), "metadata", MetadataFilter::MAX_PAIRS)?;
    Ok(filter)
}

/// One job.
#[utoipa::path(
    get,
    path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}",
    tag = "Fine-tuning",
    params(("fine_tuning_job_id" = String, Path, description = "`ftjob-…`")),
    responses(
        (status = 200, description = "The job", body = FineTuningJob),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn get_job(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(id): Id,
) -> ApiResult<Json<FineTuningJob>> {
    find(&gateway, &caller, &id).await.map(|row| Json(row.into()))
}

pub(super) async fn find(gateway: &Gateway, caller: &Caller, id: &str) -> ApiResult<JobRow> {
    let row = gateway.storage().db.jobs().get(&caller.org, id).await?;
    row.ok_or_else(|| ApiError::no_such_job(id))
}

/// The row after a change, or why there was none.
fn changed(transition: Transition, id: &str, verb: &str) -> ApiResult<JobRow> {
    match transition {
        Transition::Done(row) => Ok(row),
        Transition::Refused(status) => Err(ApiError::refused(format!(
            "The job {id} cannot be {verb}: its status is '{}'.",
            status.as_str()
        ))),
        Transition::NotFound => Err(ApiError::no_such_job(id)),
    }
}

/// Cancel a job that has not ended; listed checkpoints stay usable.
#[utoipa::path(
    post,
    path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel",
    tag = "Fine-tuning",
    params(("fine_tuning_job_id" = String, Path, description = "`ftjob-…`")),
    responses(
        (status = 200, description = "Cancelled", body = FineTuningJob),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn cancel_job(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(id): Id,
) -> ApiResult<Json<FineTuningJob>> {
    let transition = gateway.storage().db.jobs().cancel(&caller.org, &id).await?;
    let row = changed(transition, &id, "cancelled")?;
    nudge(&gateway, &id).await;
    Ok(Json(row.into()))
}

/// Pause a running job; replies once it is saved, or after a while with the job as it is.
#[utoipa::path(
    post,
    path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/pause",
    tag = "Fine-tuning",
    params(("fine_tuning_job_id" = String, Path, description = "`ftjob-…`")),
    responses(
        (status = 200, description = "Paused", body = FineTuningJob),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn pause_job(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(id): Id,
) -> ApiResult<Json<FineTuningJob>> {
    let transition = gateway.storage().db.jobs().request_pause(&caller.org, &id).await?;
    let mut row = changed(transition, &id, "paused")?;
    nudge(&gateway, &id).await;
    let deadline = Instant::now() + gateway.config().pause_wait;
    while row.status == JobStatus::Running && Instant::now() < deadline {
        sleep(PAUSE_LOOK).await;
        row = find(&gateway, &caller, &id).await?;
    }
    Ok(Json(row.into()))
}

/// Put a paused job back in the queue.
#[utoipa::path(
    post,
    path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/resume",
    tag = "Fine-tuning",
    params(("fine_tuning_job_id" = String, Path, description = "`ftjob-…`")),
    responses(
        (status = 200, description = "Queued", body = FineTuningJob),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn resume_job(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(id): Id,
) -> ApiResult<Json<FineTuningJob>> {
    let transition = gateway.storage().db.jobs().resume(&caller.org, &id).await?;
    let row = changed(transition, &id, "resumed")?;
    nudge(&gateway, &id).await;
    Ok(Json(row.into()))
}
