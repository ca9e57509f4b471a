//! `/v1/workers`: the live workers. Operators see which adapters lie where, members how many.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use storage::db::Role;

use crate::auth::Authenticated;
use crate::error::{ApiResult, ErrorReply};
use crate::gateway::Gateway;
use crate::wire::list::WholeList;
use crate::wire::model::WorkerObject;

/// All live workers.
#[utoipa::path(
    get,
    path = "/v1/workers",
    tag = "Operation",
    responses(
        (status = 200, description = "Live workers", body = WholeList<WorkerObject>),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn list_workers(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
) -> ApiResult<Json<WholeList<WorkerObject>>> {
    let whole = caller.role == Role::Operator;
    let workers = gateway.storage().queue.workers().await?;
    let data = workers.into_iter().map(|worker| WorkerObject::new(worker, whole)).collect();
    Ok(Json(WholeList { object: "list", data }))
}
