//! What became of a job: its events and its checkpoints.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::Uri;
use storage::db::Listing;

use super::Id;
use super::jobs::find;
use crate::auth::Authenticated;
use crate::error::{ApiResult, ErrorReply};
use crate::gateway::Gateway;
use crate::wire::job::{JobCheckpoint, JobEvent};
use crate::wire::list::{EndedList, List, Query};

/// What happened to a job, newest first.
#[utoipa::path(
    get,
    path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/events",
    tag = "Fine-tuning",
    params(
        ("fine_tuning_job_id" = String, Path, description = "`ftjob-…`"),
        ("limit" = Option<u32>, Query, description = "1 to 1000, 20 by default"),
        ("after" = Option<String>, Query, description = "Id of the event before the page"),
    ),
    responses(
        (status = 200, description = "A page", body = List<JobEvent>),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn list_events(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(id): Id,
    uri: Uri,
) -> ApiResult<Json<List<JobEvent>>> {
    find(&gateway, &caller, &id).await?;
    let page = Query::parse(&uri)?.page(20, 1000, false)?;
    let listing = gateway.storage().db.events().list(&caller.org, &id, &page).await?;
    let data = listing.rows.into_iter().map(JobEvent::from).collect();
    Ok(Json(List::new(data, listing.has_more)))
}

/// The checkpoints of a job, highest step first.
#[utoipa::path(
    get,
    path = "/v1/fine_tuning/jobs/{fine_tuning_job_id}/checkpoints",
    tag = "Fine-tuning",
    params(
        ("fine_tuning_job_id" = String, Path, description = "`ftjob-…`"),
        ("limit" = Option<u32>, Query, description = "1 to 100, 10 by default"),
        ("after" = Option<String>, Query, description = "Id of the checkpoint before the page"),
    ),
    responses(
        (status = 200, description = "A page", body = EndedList<JobCheckpoint>),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn list_checkpoints(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(id): Id,
    uri: Uri,
) -> ApiResult<Json<EndedList<JobCheckpoint>>> {
    find(&gateway, &caller, &id).await?;
    let page = Query::parse(&uri)?.page(10, 100, false)?;
    let Listing { rows, has_more } =
        gateway.storage().db.checkpoints().list(&caller.org, &id, &page).await?;
    let data: Vec<JobCheckpoint> = rows.into_iter().map(JobCheckpoint::from).collect();
    Ok(Json(EndedList {
        object: "list",
        first_id: data.first().map(|checkpoint| checkpoint.id.clone()),
        last_id: data.last().map(|checkpoint| checkpoint.id.clone()),
        has_more,
        data,
    }))
}
