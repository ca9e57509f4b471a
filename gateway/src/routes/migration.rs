//! Operators' words about where adapters and running jobs lie: `migrate` and `evict`. Clients see
//! nothing of it: requests that are handed over go on at another worker.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use storage::db::{AdapterRow, Caller, JobRow, JobStatus, Role};
use storage::ids::IdKind;
use storage::queue::Controlled;
use storage::queue::message::{ToWorker, WorkerPresence};
use tokio::time::{Duration, Instant, sleep};

use super::Id;
use super::adapters::residency;
use crate::auth::Authenticated;
use crate::body;
use crate::error::{ApiError, ApiResult, ErrorReply};
use crate::gateway::Gateway;
use crate::placement::{least_loaded, serves};
use crate::wire::adapter::{AdapterObject, Migrated};
use crate::wire::fields::Fields;
use crate::wire::request::{EvictRequest, MigrateRequest};

/// Between two looks at presence, which workers tell four times a second.
const LOOK: Duration = Duration::from_millis(100);

/// How long an evicted adapter may still be shown before the reply tells what is.
const EVICT_WAIT: Duration = Duration::from_secs(3);

/// Operators only: move an adapter, or a running job, to another worker without a client noticing.
#[utoipa::path(
    post,
    path = "/v1/adapters/{adapter}/migrate",
    tag = "Adapters",
    params(("adapter" = String, Path, description = "`adp-…`, `ft:…` or `ftjob-…`, of anyone")),
    request_body = Option<MigrateRequest>,
    responses(
        (status = 200, description = "Moved", body = Migrated),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn migrate_adapter(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(id): Id,
    request: Request,
) -> ApiResult<Json<Migrated>> {
    only_operators(&caller)?;
    let mut body = optional_body(&gateway, request).await?;
    let way = Way { to: body.string("to")?, from: body.string("from")? };
    body.finish()?;
    if way.to.is_some() && way.to == way.from {
        return Err(ApiError::invalid_value("to", "Invalid 'to': the same worker as 'from'."));
    }
    if id.starts_with(IdKind::Job.prefix()) {
        let row = gateway.storage().db.jobs().of_anyone(&id).await?;
        let row = row.ok_or_else(|| ApiError::no_such_job(&id))?;
        let moved = move_job(&gateway, row, &way).await?;
        return Ok(Json(Migrated::Job(Box::new(moved.into()))));
    }
    let row = find(&gateway, &id).await?;
    move_adapter(&gateway, &row, &way).await?;
    Ok(Json(Migrated::Adapter(Box::new(shown(&gateway, row).await?))))
}

/// Operators only: let go of an adapter's copies. Its requests finish; the next one loads it anew.
#[utoipa::path(
    post,
    path = "/v1/adapters/{adapter}/evict",
    tag = "Adapters",
    params(("adapter" = String, Path, description = "`adp-…` or `ft:…`, of anyone")),
    request_body = Option<EvictRequest>,
    responses(
        (status = 200, description = "Evicted", body = AdapterObject),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn evict_adapter(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(id): Id,
    request: Request,
) -> ApiResult<Json<AdapterObject>> {
    only_operators(&caller)?;
    let mut body = optional_body(&gateway, request).await?;
    let worker = body.string("worker")?;
    body.finish()?;
    let row = find(&gateway, &id).await?;
    let workers = gateway.storage().queue.workers().await?;
    if let Some(worker) = &worker {
        named(&workers, "worker", worker)?;
    }
    let meant = |id: &str| worker.as_ref().is_none_or(|worker| worker == id);
    let holders = holders(&workers, &row.id).into_iter().filter(|worker| meant(worker)).collect();
    evict(&gateway, &row.id, holders, false).await?;
    shown(&gateway, row).await.map(Json)
}

/// Whence and whither, by worker ids.
struct Way {
    to: Option<String>,
    from: Option<String>,
}

fn only_operators(caller: &Caller) -> ApiResult<()> {
    match caller.role {
        Role::Operator => Ok(()),
        Role::Member => {
            Err(ApiError::forbidden("Moving and evicting adapters needs an operator's key."))
        }
    }
}

/// No body at all means no field, as SDKs send actions.
async fn optional_body(gateway: &Gateway, request: Request) -> ApiResult<Fields> {
    let bytes = body::read(gateway, request).await?;
    Fields::parse(if bytes.is_empty() { b"{}" } else { &bytes })
}

async fn find(gateway: &Gateway, id: &str) -> ApiResult<AdapterRow> {
    let row = gateway.storage().db.adapters().of_anyone(id).await?;
    row.ok_or_else(|| ApiError::no_such("Adapter", id))
}

async fn shown(gateway: &Gateway, row: AdapterRow) -> ApiResult<AdapterObject> {
    let workers = gateway.storage().queue.workers().await?;
    let place = residency(&workers, &row.id);
    Ok(AdapterObject::new(row, place).on(&workers))
}

/// The live worker that a field names.
fn named<'a>(
    workers: &'a [WorkerPresence],
    field: &str,
    id: &str,
) -> ApiResult<&'a WorkerPresence> {
    let found = workers.iter().find(|worker| worker.worker_id == id);
    found.ok_or_else(|| {
        let shown = crate::wire::fields::clip(id);
        ApiError::invalid_value(field, format!("Invalid '{field}': no live worker '{shown}'."))
    })
}

/// Where an adapter lies, on the device or in host memory.
fn holders(workers: &[WorkerPresence], adapter_id: &str) -> Vec<String> {
    let holds = |worker: &&WorkerPresence| worker.adapters.iter().any(|copy| copy.id == adapter_id);
    workers.iter().filter(holds).map(|worker| worker.worker_id.clone()).collect()
}

/// Checks that a worker named as `to` can take what is of this base.
fn check_target(worker: &WorkerPresence, base: &str, fingerprint: &str) -> ApiResult<()> {
    let id = &worker.worker_id;
    let why = if worker.base != base {
        format!("worker '{id}' runs the base `{}`, not `{base}`", worker.base)
    } else if !serves(worker, base, Some(fingerprint)) {
        format!("worker '{id}' runs other weights of `{base}`, or another release")
    } else if worker.draining {
        format!("worker '{id}' is draining")
    } else {
        return Ok(());
    };
    Err(ApiError::invalid_value("to", format!("Invalid 'to': {why}.")))
}

/// The target that placement would choose among those that `may` take it.
fn choose(
    workers: &[WorkerPresence],
    base: &str,
    fingerprint: &str,
    may: impl Fn(&WorkerPresence) -> bool,
    none: &str,
) -> ApiResult<WorkerPresence> {
    let able: Vec<WorkerPresence> = workers
        .iter()
        .filter(|worker| serves(worker, base, Some(fingerprint)) && !worker.draining)
        .cloned()
        .collect();
    match able.len() {
        0 => Err(ApiError::overloaded(format!("No worker serves the base `{base}` now."))),
        _ if able.iter().any(&may) => {
            least_loaded(able.into_iter().filter(may)).ok_or_else(|| ApiError::refused(none))
        }
        1 => Err(ApiError::refused(format!(
            "There is no other worker: '{}' is the only one of the base `{base}` that takes work.",
            able[0].worker_id
        ))),
        _ => Err(ApiError::refused(none)),
    }
}

/// Loads the adapter on the target; once it is there, the others hand their requests over.
async fn move_adapter(gateway: &Gateway, row: &AdapterRow, way: &Way) -> ApiResult<()> {
    let workers = gateway.storage().queue.workers().await?;
    let before = holders(&workers, &row.id);
    if let Some(from) = &way.from {
        named(&workers, "from", from)?;
        if !before.contains(from) {
            let message = format!("Invalid 'from': worker '{from}' does not hold the adapter.");
            return Err(ApiError::invalid_value("from", message));
        }
    }
    let target = match &way.to {
        Some(to) => {
            let target = named(&workers, "to", to)?;
            check_target(target, &row.base, &row.base_fingerprint)?;
            target.clone()
        }
        None => {
            let may = |worker: &WorkerPresence| !worker.holds(&row.id);
            let none = "Every worker of its base holds the adapter already; name one as 'to'.";
            choose(&workers, &row.base, &row.base_fingerprint, may, none)?
        }
    };
    if !target.holds(&row.id) {
        load(gateway, row, &target).await?;
    }
    let leaves = |id: &String| match &way.from {
        Some(from) => id == from,
        None => *id != target.worker_id,
    };
    evict(gateway, &row.id, before.into_iter().filter(leaves).collect(), true).await
}

/// Has a worker load the adapter, and waits until it has.
async fn load(gateway: &Gateway, row: &AdapterRow, target: &WorkerPresence) -> ApiResult<()> {
    let queue = &gateway.storage().queue;
    let id = &target.worker_id;
    let message = ToWorker::Load { adapter_id: row.id.clone(), object: row.object.clone() };
    let gone = || ApiError::overloaded(format!("Worker '{id}' is gone; nothing was moved."));
    if queue.control(id, message).await? == Controlled::Gone {
        return Err(gone());
    }
    let deadline = Instant::now() + gateway.config().move_wait;
    loop {
        let workers = queue.workers().await?;
        let same = |worker: &&WorkerPresence| worker.incarnation == target.incarnation;
        match workers.iter().find(same) {
            Some(worker) if worker.holds(&row.id) => return Ok(()),
            Some(worker) if !worker.draining => {}
            _ => return Err(gone()),
        }
        if Instant::now() >= deadline {
            return Err(ApiError::overloaded(format!(
                "Worker '{id}' has not loaded the adapter in time: its room may be in use. \
                 Nothing was moved."
            )));
        }
        sleep(LOOK).await;
    }
}

/// Has workers let go of the adapter, and waits a little until presence shows it.
async fn evict(
    gateway: &Gateway,
    adapter_id: &str,
    from: Vec<String>,
    hand_over: bool,
) -> ApiResult<()> {
    let queue = &gateway.storage().queue;
    for worker in &from {
        let message = ToWorker::Evict { adapter_id: adapter_id.to_owned(), hand_over };
        // A worker that went meanwhile has let go.
        queue.control(worker, message).await?;
    }
    let deadline = Instant::now() + EVICT_WAIT;
    while Instant::now() < deadline {
        let still = holders(&queue.workers().await?, adapter_id);
        if !still.iter().any(|worker| from.contains(worker)) {
            return Ok(());
        }
        sleep(LOOK).await;
    }
    // A request that came in between has had it loaded anew: the reply shows where.
    Ok(())
}

/// Has the owner save the job and let go of it, and waits until another worker has it.
async fn move_job(gateway: &Gateway, row: JobRow, way: &Way) -> ApiResult<JobRow> {
    if row.status != JobStatus::Running {
        return Err(ApiError::refused(format!(
            "The job {} cannot be moved: its status is '{}'.",
            row.id,
            row.status.as_str()
        )));
    }
    let queue = &gateway.storage().queue;
    let workers = queue.workers().await?;
    let away = || ApiError::overloaded("The job's worker is gone; another one will take it over.");
    let owner = row.owner.clone().ok_or_else(away)?;
    if let Some(from) = &way.from
        && *from != owner
    {
        let message = format!("Invalid 'from': the job runs on worker '{owner}'.");
        return Err(ApiError::invalid_value("from", message));
    }
    let room = |worker: &WorkerPresence| worker.worker_id != owner && worker.training_room > 0;
    match &way.to {
        Some(to) => {
            let target = named(&workers, "to", to)?;
            check_target(target, &row.base, &row.base_fingerprint)?;
            if !room(target) {
                let message = format!("Invalid 'to': worker '{to}' has the job or no room for it.");
                return Err(ApiError::invalid_value("to", message));
            }
        }
        None => {
            let none = "No other worker has room to train the job.";
            choose(&workers, &row.base, &row.base_fingerprint, room, none)?;
        }
    }
    let message = ToWorker::MoveJob { job_id: row.id.clone(), to: way.to.clone() };
    if queue.control(&owner, message).await? == Controlled::Gone {
        return Err(away());
    }
    let deadline = Instant::now() + gateway.config().move_wait;
    loop {
        let now = gateway.storage().db.jobs().of_anyone(&row.id).await?;
        let now = now.ok_or_else(|| ApiError::no_such_job(&row.id))?;
        let taken = now.owner.as_ref().is_some_and(|other| *other != owner);
        if taken || now.status != JobStatus::Running {
            return Ok(now);
        }
        if Instant::now() >= deadline {
            return Err(ApiError::overloaded("No other worker has taken the job in time."));
        }
        sleep(LOOK).await;
    }
}
