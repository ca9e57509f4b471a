//! `/v1/models`: bases and the organization's fine-tuned models.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use storage::db::{AdapterDeleted, BaseRow, Resolved};

use super::Id;
use crate::auth::Authenticated;
use crate::error::{ApiError, ApiResult, ErrorReply};
use crate::gateway::Gateway;
use crate::wire::file::Deleted;
use crate::wire::list::WholeList;
use crate::wire::model::ModelObject;

const OWNER_OF_BASES: &str = "loquetier";

fn base(row: BaseRow) -> ModelObject {
    ModelObject {
        id: row.name,
        object: "model",
        created: row.created_at,
        owned_by: OWNER_OF_BASES.to_owned(),
        parent: None,
        max_model_len: Some(row.context),
    }
}

fn fine_tuned(id: String, base: String, created: i64, org: &str) -> ModelObject {
    ModelObject {
        id,
        object: "model",
        created,
        owned_by: org.to_owned(),
        parent: Some(base),
        max_model_len: None,
    }
}

/// All bases, then the organization's models, newest first.
#[utoipa::path(
    get,
    path = "/v1/models",
    tag = "Models",
    responses(
        (status = 200, description = "All models", body = WholeList<ModelObject>),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn list_models(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
) -> ApiResult<Json<WholeList<ModelObject>>> {
    let db = &gateway.storage().db;
    let mut data: Vec<ModelObject> = db.bases().list().await?.into_iter().map(base).collect();
    for name in db.adapters().names_of(&caller.org).await? {
        data.push(fine_tuned(name.model, name.base, name.created_at, &caller.org));
    }
    Ok(Json(WholeList { object: "list", data }))
}

/// One model; `/` and `:` in its name may be percent-encoded or not.
#[utoipa::path(
    get,
    path = "/v1/models/{*model}",
    tag = "Models",
    params(("model" = String, Path, description = "Model name")),
    responses(
        (status = 200, description = "The model", body = ModelObject),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn get_model(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(model): Id,
) -> ApiResult<Json<ModelObject>> {
    let org = &caller.org;
    Ok(Json(match gateway.resolve(org, &model).await? {
        Resolved::Base(row) => base(row),
        // By the name that was asked for: a job's id may stand for its result.
        Resolved::Adapter(row) => fine_tuned(model, row.base, row.created_at, org),
        Resolved::Job(row) => fine_tuned(row.id, row.base, row.created_at, org),
    }))
}

/// Delete a fine-tuned model or checkpoint. Requests under way finish.
#[utoipa::path(
    delete,
    path = "/v1/models/{*model}",
    tag = "Models",
    params(("model" = String, Path, description = "Name of an own fine-tuned model")),
    responses(
        (status = 200, description = "Deleted", body = Deleted),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn delete_model(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(model): Id,
) -> ApiResult<Json<Deleted>> {
    match gateway.resolve(&caller.org, &model).await? {
        Resolved::Base(_) => {
            Err(ApiError::forbidden(format!("The base model `{model}` cannot be deleted.")))
        }
        Resolved::Adapter(row) if row.model == model => {
            let adapters = gateway.storage().db.adapters();
            match adapters.delete(&caller.org, &row.id).await? {
                AdapterDeleted::Deleted(row) => {
                    Ok(Json(Deleted { id: row.model, object: "model", deleted: true }))
                }
                AdapterDeleted::NotFound => Err(ApiError::model_not_found(&model)),
            }
        }
        // A job's id is another name of a model, not the model.
        Resolved::Adapter(_) | Resolved::Job(_) => Err(ApiError::model_not_found(&model)),
    }
}
