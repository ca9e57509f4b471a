//! `/v1/adapters`: adapters as such, imported and exported in PEFT format. Deleting one is
//! `DELETE /v1/models/{name}`.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Uri, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use storage::db::{AdapterRow, Caller, NewAdapter, Order, Page};
use storage::ids::alphanumerics;
use storage::objects::{ObjectKey, imported_adapter_folder};
use storage::queue::message::WorkerPresence;

use super::Id;
use crate::auth::Authenticated;
use crate::error::{ApiError, ApiResult, ErrorReply};
use crate::gateway::Gateway;
use crate::import::{CheckRefusal, CheckedAdapter};
use crate::multipart::Form;
use crate::tar;
use crate::wire::adapter::AdapterObject;
use crate::wire::fields::max_chars;
use crate::wire::job::check_name;
use crate::wire::list::{List, Query};
use crate::wire::request::ImportForm;

/// `adapter_config.json` is a page of text.
const CONFIG_BYTES_MAX: usize = 1 << 20;

/// Where the nearest copy of an adapter lies.
pub(super) fn residency(workers: &[WorkerPresence], id: &str) -> &'static str {
    let copies = workers.iter().flat_map(|worker| &worker.adapters).filter(|copy| copy.id == id);
    match copies.map(|copy| copy.on_device).max() {
        Some(true) => "device",
        Some(false) => "host",
        None => "object_store",
    }
}

async fn shown(gateway: &Gateway, row: AdapterRow) -> ApiResult<Json<AdapterObject>> {
    let workers = gateway.storage().queue.workers().await?;
    let place = residency(&workers, &row.id);
    Ok(Json(AdapterObject::new(row, place)))
}

async fn find(gateway: &Gateway, caller: &Caller, id: &str) -> ApiResult<AdapterRow> {
    let row = gateway.storage().db.adapters().get(&caller.org, id).await?;
    row.ok_or_else(|| ApiError::no_such("Adapter", id))
}

/// The organization's adapters, newest first.
#[utoipa::path(
    get,
    path = "/v1/adapters",
    tag = "Adapters",
    params(
        ("limit" = Option<u32>, Query, description = "1 to 100, 20 by default"),
        ("after" = Option<String>, Query, description = "Id or name before the page"),
    ),
    responses(
        (status = 200, description = "A page", body = List<AdapterObject>),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn list_adapters(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    uri: Uri,
) -> ApiResult<Json<List<AdapterObject>>> {
    let page = Query::parse(&uri)?.page(20, 100, false)?;
    let storage = gateway.storage();
    let listing = storage.db.adapters().list(&caller.org, &page).await?;
    let workers = storage.queue.workers().await?;
    let show = |row: AdapterRow| {
        let place = residency(&workers, &row.id);
        AdapterObject::new(row, place)
    };
    Ok(Json(List::new(listing.rows.into_iter().map(show).collect(), listing.has_more)))
}

/// One adapter, by id or percent-encoded model name.
#[utoipa::path(
    get,
    path = "/v1/adapters/{adapter}",
    tag = "Adapters",
    params(("adapter" = String, Path, description = "`adp-…` or `ft:…`")),
    responses(
        (status = 200, description = "The adapter", body = AdapterObject),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn get_adapter(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(id): Id,
) -> ApiResult<Json<AdapterObject>> {
    let row = find(&gateway, &caller, &id).await?;
    shown(&gateway, row).await
}

/// Keep an adapter on the device.
#[utoipa::path(
    post,
    path = "/v1/adapters/{adapter}/pin",
    tag = "Adapters",
    params(("adapter" = String, Path, description = "`adp-…` or `ft:…`")),
    responses(
        (status = 200, description = "Pinned", body = AdapterObject),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn pin_adapter(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(id): Id,
) -> ApiResult<Json<AdapterObject>> {
    let row = find(&gateway, &caller, &id).await?;
    let max = gateway.config().pinned_adapters_max;
    if !row.pinned && count_pinned(&gateway, &caller).await? >= max {
        return Err(ApiError::refused(format!(
            "Your organization has {max} pinned adapters, which is its limit. Unpin one first."
        )));
    }
    set_pinned(&gateway, &caller, &id, true).await
}

/// Let an adapter leave the device when others need its room.
#[utoipa::path(
    post,
    path = "/v1/adapters/{adapter}/unpin",
    tag = "Adapters",
    params(("adapter" = String, Path, description = "`adp-…` or `ft:…`")),
    responses(
        (status = 200, description = "Not pinned", body = AdapterObject),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn unpin_adapter(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(id): Id,
) -> ApiResult<Json<AdapterObject>> {
    set_pinned(&gateway, &caller, &id, false).await
}

async fn set_pinned(
    gateway: &Gateway,
    caller: &Caller,
    id: &str,
    pinned: bool,
) -> ApiResult<Json<AdapterObject>> {
    let row = gateway.storage().db.adapters().set_pinned(&caller.org, id, pinned).await?;
    shown(gateway, row.ok_or_else(|| ApiError::no_such("Adapter", id))?).await
}

async fn count_pinned(gateway: &Gateway, caller: &Caller) -> ApiResult<usize> {
    let adapters = gateway.storage().db.adapters();
    let mut page = Page { after: None, limit: 1000, order: Order::Descending };
    let mut pinned = 0;
    loop {
        let listing = adapters.list(&caller.org, &page).await?;
        pinned += listing.rows.iter().filter(|row| row.pinned).count();
        page.after = listing.rows.last().map(|row| row.id.clone());
        if !listing.has_more {
            return Ok(pinned);
        }
    }
}

/// An adapter's PEFT files as a tar archive, equal to what is served.
#[utoipa::path(
    get,
    path = "/v1/adapters/{adapter}/content",
    tag = "Adapters",
    params(("adapter" = String, Path, description = "`adp-…` or `ft:…`")),
    responses(
        (status = 200, description = "The archive", content_type = "application/x-tar"),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn export_adapter(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(id): Id,
) -> ApiResult<Response> {
    let row = find(&gateway, &caller, &id).await?;
    let objects = &gateway.storage().objects;
    let object = row.object;
    let config = objects.get_stream(&ObjectKey::AdapterConfig { object: object.clone() }).await?;
    let weights = objects.get_stream(&ObjectKey::AdapterWeights { object }).await?;
    let (bytes, archive) = tar::archive(
        vec![("adapter_config.json", config), ("adapter_model.safetensors", weights)],
        row.created_at,
    );
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/x-tar")),
        (header::CONTENT_LENGTH, HeaderValue::from(bytes)),
    ];
    Ok((headers, Body::from_stream(archive)).into_response())
}

/// What an import form holds.
#[derive(Default)]
struct Import {
    name: Option<String>,
    base: Option<String>,
    config: Option<Bytes>,
    weights: Option<Bytes>,
}

/// Import a PEFT adapter under a new name.
#[utoipa::path(
    post,
    path = "/v1/adapters",
    tag = "Adapters",
    request_body(content = ImportForm, content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "Imported", body = AdapterObject),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn import_adapter(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    request: Request,
) -> ApiResult<Json<AdapterObject>> {
    let _room = gateway
        .upload_room
        .try_acquire()
        .map_err(|_| ApiError::overloaded("Too many uploads at once. Try again in a moment."))?;
    let kind = request.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    if kind.is_some_and(|kind| kind.starts_with(b"application/json")) {
        return Err(ApiError::refused(
            "Importing from a source is turned off here; send the files as multipart/form-data.",
        ));
    }
    let import = receive(&gateway, request).await?;
    let name = import.name.ok_or_else(|| ApiError::missing("name"))?;
    max_chars(&name, "name", 64)?;
    if name.is_empty() {
        let message = "Invalid 'name': empty string. Expected a string with minimum length 1.";
        return Err(ApiError::bad("string_below_min_length", "name", message));
    }
    check_name("name", &name)?;
    let config = import.config.ok_or_else(|| ApiError::missing("config"))?;
    let weights = import.weights.ok_or_else(|| ApiError::missing("weights"))?;
    let base = choose_base(&gateway, import.base, &config).await?;
    let checked = gateway.adapter_check().check(&base, config, weights).await;
    let checked = checked.map_err(|refusal| match refusal {
        CheckRefusal::Invalid { param, message } => ApiError::invalid_value(param, message),
        CheckRefusal::Unavailable(message) => ApiError::overloaded(message),
    })?;
    let row = store(&gateway, &caller, base, &name, checked).await?;
    shown(&gateway, row).await
}

async fn receive(gateway: &Gateway, request: Request) -> ApiResult<Import> {
    let config = gateway.config();
    let bytes_max = config.adapter_bytes_max as u64;
    let mut form = Form::open(request, bytes_max, config.body_idle_timeout)?;
    let mut import = Import::default();
    while let Some((field_name, mut field)) = form.next().await? {
        match field_name.as_str() {
            "name" => import.name = Some(form.text(field, "name").await?),
            "base" => import.base = Some(form.text(field, "base").await?),
            "config" => {
                let bytes = form.bytes(&mut field, "config", CONFIG_BYTES_MAX).await?;
                import.config = Some(bytes);
            }
            "weights" => {
                let bytes = form.bytes(&mut field, "weights", config.adapter_bytes_max).await?;
                import.weights = Some(bytes);
            }
            other => return Err(ApiError::unknown_parameter(other)),
        }
    }
    Ok(import)
}

/// The base named by the form, else the only one there is, else the one the adapter names.
async fn choose_base(gateway: &Gateway, named: Option<String>, config: &[u8]) -> ApiResult<String> {
    let bases = gateway.storage().db.bases().list().await?;
    let known = |name: &str| bases.iter().any(|base| base.name == name);
    if let Some(name) = named {
        return if known(&name) { Ok(name) } else { Err(ApiError::model_not_found(&name)) };
    }
    let config: Option<serde_json::Value> = serde_json::from_slice(config).ok();
    let own = config.as_ref().and_then(|config| config["base_model_name_or_path"].as_str());
    match (&bases[..], own) {
        (_, Some(own)) if known(own) => Ok(own.to_owned()),
        ([only], own) => {
            if let Some(own) = own {
                // Shapes decide; the name is only a hint.
                tracing::warn!(adapter.base = own, base = only.name, "an adapter of another name");
            }
            Ok(only.name.clone())
        }
        _ => Err(ApiError::missing("base")),
    }
}

/// Stores the objects, then the row that names them.
async fn store(
    gateway: &Gateway,
    caller: &Caller,
    base: String,
    name: &str,
    checked: CheckedAdapter,
) -> ApiResult<AdapterRow> {
    let storage = gateway.storage();
    let object = imported_adapter_folder(&alphanumerics(24));
    let config = ObjectKey::AdapterConfig { object: object.clone() };
    let weights = ObjectKey::AdapterWeights { object: object.clone() };
    storage.objects.put(&config, checked.config).await?;
    storage.objects.put(&weights, checked.weights).await?;
    let adapter = NewAdapter {
        model: format!("ft:{base}:{}:{name}:{}", caller.org, alphanumerics(8)),
        kind: "lora".to_owned(),
        base,
        base_fingerprint: checked.base_fingerprint,
        rank: checked.rank,
        alpha: checked.alpha,
        use_rslora: checked.use_rslora,
        target_modules: checked.target_modules,
        bytes: checked.device_bytes,
        version: 1,
        object,
    };
    let inserted = storage.db.adapters().insert(&caller.org, &adapter).await;
    // Where the database went away the row may be written all the same; without one the objects
    // are swept later.
    if inserted.as_ref().is_err_and(|error| !error.is_unavailable()) {
        storage.objects.delete(&config).await?;
        storage.objects.delete(&weights).await?;
    }
    Ok(inserted?)
}
