//! Whether this process lives, whether it can serve, and what it measures.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use storage::db::Role;
use utoipa::ToSchema;

use crate::auth::check_local;
use crate::border::Peer;
use crate::error::{ApiError, ApiResult, ErrorReply};
use crate::gateway::Gateway;

/// Reply of the two probes.
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// Always `ok`.
    pub status: &'static str,
}

/// This process answers.
#[utoipa::path(
    get,
    path = "/healthz",
    tag = "Operation",
    responses((status = 200, description = "Alive", body = Health))
)]
pub async fn alive() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// The database answers and a worker is alive.
#[utoipa::path(
    get,
    path = "/readyz",
    tag = "Operation",
    responses(
        (status = 200, description = "Ready", body = Health),
        (status = 503, description = "Not ready", body = ErrorReply),
    )
)]
pub async fn ready(State(gateway): State<Arc<Gateway>>) -> ApiResult<Json<Health>> {
    let storage = gateway.storage();
    if let Err(error) = storage.db.ping().await {
        tracing::warn!(%error, "not ready: the database does not answer");
        return Err(ApiError::overloaded("The database does not answer."));
    }
    let workers = storage.queue.workers().await?;
    if workers.iter().all(|worker| worker.draining) {
        return Err(ApiError::overloaded("No worker is alive."));
    }
    Ok(Json(Health { status: "ok" }))
}

/// Prometheus metrics: from this machine, or with an operator's key.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "Operation",
    responses(
        (status = 200, description = "Text exposition format", body = String),
        (status = "default", description = "Refused", body = ErrorReply),
    )
)]
pub async fn metrics(State(gateway): State<Arc<Gateway>>, request: Request) -> ApiResult<Response> {
    let near = request.extensions().get::<Peer>().is_some_and(|Peer(at)| at.ip().is_loopback());
    let local = near && check_local(request.uri(), request.headers(), &[]).is_ok();
    if !local {
        let holder = gateway.keys().holder(&gateway.storage().db, request.headers()).await?;
        if holder.role != Role::Operator {
            return Err(ApiError::forbidden("Metrics need an operator's key."));
        }
    }
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    Ok((kind, crate::metrics::render(gateway.open_requests())).into_response())
}
