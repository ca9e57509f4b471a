//! `/v1/files`. An upload streams to the object store while its syntax is checked; it becomes
//! visible only when the whole form was good.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Uri, header};
use axum::response::{IntoResponse, Response};
use futures::TryStreamExt;
use sha2::{Digest, Sha256};
use storage::db::{Caller, FileDeleted, Inserted, NewFile};
use storage::ids::{IdKind, new_id};
use storage::objects::{ObjectKey, ObjectWriter};

use super::{Id, hex, idempotency, key_reused};
use crate::auth::Authenticated;
use crate::error::{ApiError, ApiResult, ErrorReply};
use crate::gateway::Gateway;
use crate::lines::LineCheck;
use crate::multipart::Form;
use crate::wire::fields::{integer, max_chars, no_nul, not_one_of};
use crate::wire::file::{Deleted, FileObject, Purpose};
use crate::wire::list::{EndedList, Query};
use crate::wire::request::UploadForm;

const FILENAME_CHARS_MAX: usize = 512;

/// The form of an upload as far as it has been read.
#[derive(Default)]
struct Upload {
    purpose: Option<Purpose>,
    expires_anchor: bool,
    expires_after_secs: Option<i64>,
    file: Option<ReceivedFile>,
}

/// A file whose bytes are in the store but not visible yet.
struct ReceivedFile {
    id: String,
    filename: String,
    writer: ObjectWriter,
    hash: Sha256,
    fault: Option<String>,
}

/// Upload a file; the fields of the form may come in any order.
#[utoipa::path(
    post,
    path = "/v1/files",
    tag = "Files",
    request_body(content = UploadForm, content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "Stored", body = FileObject),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn upload_file(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    request: Request,
) -> ApiResult<Json<FileObject>> {
    let _room = gateway
        .upload_room
        .try_acquire()
        .map_err(|_| ApiError::overloaded("Too many uploads at once. Try again in a moment."))?;
    let headers = request.headers().clone();
    let upload = receive(&gateway, request).await?;
    finish(&gateway, &caller, &headers, upload).await.map(Json)
}

async fn receive(gateway: &Gateway, request: Request) -> ApiResult<Upload> {
    let config = gateway.config();
    let mut form = Form::open(request, config.file_bytes_max, config.body_idle_timeout)?;
    let mut upload = Upload::default();
    while let Some((name, field)) = form.next().await? {
        match name.as_str() {
            "file" if upload.file.is_some() => {
                return Err(ApiError::invalid_value("file", "Only one file may be uploaded."));
            }
            "file" => upload.file = Some(receive_file(gateway, &form, field).await?),
            "purpose" => {
                let word = form.text(field, "purpose").await?;
                upload.purpose = Some(Purpose::parse(&word)?);
            }
            "expires_after[anchor]" => {
                let word = form.text(field, &name).await?;
                if word != "created_at" {
                    return Err(not_one_of(&name, &word, &["created_at"]));
                }
                upload.expires_anchor = true;
            }
            "expires_after[seconds]" => {
                let text = form.text(field, &name).await?;
                let value = serde_json::from_str(&text)
                    .unwrap_or_else(|_| serde_json::Value::String(text.clone()));
                upload.expires_after_secs = Some(integer(&value, &name, 3600, 2_592_000)?);
            }
            other => return Err(ApiError::unknown_parameter(other)),
        }
    }
    Ok(upload)
}

async fn receive_file(
    gateway: &Gateway,
    form: &Form,
    mut field: multer::Field<'static>,
) -> ApiResult<ReceivedFile> {
    let config = gateway.config();
    let filename = field.file_name().unwrap_or("upload").to_owned();
    no_nul(&filename, "file")?;
    max_chars(&filename, "file", FILENAME_CHARS_MAX)?;
    let id = new_id(IdKind::File);
    let began = Instant::now();
    let mut writer = gateway.storage().objects.writer(&ObjectKey::File { id: id.clone() }).await?;
    let mut hash = Sha256::new();
    // Always checked: the purpose may come after the file.
    let mut lines = LineCheck::new(config.line_bytes_max);
    while let Some(chunk) = form.chunk(&mut field).await? {
        if began.elapsed() > config.upload_time_max {
            return Err(ApiError::invalid_value("file", "The upload took too long."));
        }
        if writer.bytes() + chunk.len() as u64 > config.file_bytes_max {
            return Err(ApiError::too_large(config.file_bytes_max));
        }
        hash.update(&chunk);
        lines.feed(&chunk);
        writer.write(chunk).await?;
    }
    Ok(ReceivedFile { id, filename, writer, hash, fault: lines.finish() })
}

/// Judges the whole form and makes the file visible.
async fn finish(
    gateway: &Gateway,
    caller: &Caller,
    headers: &HeaderMap,
    upload: Upload,
) -> ApiResult<FileObject> {
    let file = upload.file.ok_or_else(|| ApiError::missing("file"))?;
    let purpose = upload.purpose.ok_or_else(|| ApiError::missing("purpose"))?;
    if upload.expires_anchor != upload.expires_after_secs.is_some() {
        return Err(ApiError::missing(if upload.expires_anchor {
            "expires_after[seconds]"
        } else {
            "expires_after[anchor]"
        }));
    }
    if file.writer.bytes() == 0 {
        return Err(ApiError::invalid_value("file", "The file is empty."));
    }
    let batch_max = gateway.config().batch_file_bytes_max;
    if purpose == Purpose::Batch && file.writer.bytes() > batch_max {
        return Err(ApiError::too_large(batch_max));
    }
    if let Some(fault) = file.fault.filter(|_| purpose.is_lines()) {
        return Err(ApiError::invalid_value("file", format!("Invalid file format. {fault}")));
    }
    let body = format!("{} {:?} {:?}", hex(&file.hash.finalize()), purpose, file.filename);
    let idempotency = idempotency(headers, body)?;
    let key = ObjectKey::File { id: file.id.clone() };
    let bytes = file.writer.finish().await? as i64;
    let row = NewFile {
        id: file.id,
        filename: file.filename,
        purpose: purpose.as_str().to_owned(),
        bytes,
        expires_after_secs: upload.expires_after_secs,
    };
    let storage = gateway.storage();
    match storage.db.files().insert(&caller.org, &row, idempotency.as_ref()).await {
        Ok(Inserted::New(row)) => Ok(row.into()),
        Ok(Inserted::Replayed(row)) => {
            storage.objects.delete(&key).await?;
            Ok(row.into())
        }
        Ok(Inserted::KeyReused) => {
            storage.objects.delete(&key).await?;
            Err(key_reused())
        }
        // The row may have been written all the same; without one the object is swept later.
        Err(error) if error.is_unavailable() => Err(error.into()),
        Err(error) => {
            storage.objects.delete(&key).await?;
            Err(error.into())
        }
    }
}

/// The organization's files.
#[utoipa::path(
    get,
    path = "/v1/files",
    tag = "Files",
    params(
        ("purpose" = Option<String>, Query, description = "Only files with this purpose"),
        ("limit" = Option<u32>, Query, description = "1 to 10000, 10000 by default"),
        ("order" = Option<String>, Query, description = "`desc` (default) or `asc`"),
        ("after" = Option<String>, Query, description = "Id of the file before the page"),
    ),
    responses(
        (status = 200, description = "A page", body = EndedList<FileObject>),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn list_files(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    uri: Uri,
) -> ApiResult<Json<EndedList<FileObject>>> {
    let query = Query::parse(&uri)?;
    let page = query.page(10_000, 10_000, true)?;
    let purpose = query.get("purpose");
    if let Some(purpose) = purpose {
        no_nul(purpose, "purpose")?;
    }
    let listing = gateway.storage().db.files().list(&caller.org, purpose, &page).await?;
    let data: Vec<FileObject> = listing.rows.into_iter().map(FileObject::from).collect();
    // The published schema forbids null here.
    let end = |file: Option<&FileObject>| Some(file.map_or(String::new(), |file| file.id.clone()));
    Ok(Json(EndedList {
        object: "list",
        first_id: end(data.first()),
        last_id: end(data.last()),
        has_more: listing.has_more,
        data,
    }))
}

/// One file's object.
#[utoipa::path(
    get,
    path = "/v1/files/{file_id}",
    tag = "Files",
    params(("file_id" = String, Path, description = "`file-…`")),
    responses(
        (status = 200, description = "The file", body = FileObject),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn get_file(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(id): Id,
) -> ApiResult<Json<FileObject>> {
    let row = gateway.storage().db.files().get(&caller.org, &id).await?;
    row.map(|row| Json(row.into())).ok_or_else(|| ApiError::no_such("File", &id))
}

/// Delete a file that no unfinished job reads.
#[utoipa::path(
    delete,
    path = "/v1/files/{file_id}",
    tag = "Files",
    params(("file_id" = String, Path, description = "`file-…`")),
    responses(
        (status = 200, description = "Deleted", body = Deleted),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn delete_file(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(id): Id,
) -> ApiResult<Json<Deleted>> {
    let storage = gateway.storage();
    match storage.db.files().delete(&caller.org, &id).await? {
        FileDeleted::Deleted => {
            // The row is what counts; bytes that stay are an orphan, not a file.
            if let Err(error) = storage.objects.delete(&ObjectKey::File { id: id.clone() }).await {
                tracing::warn!(%error, file.id = id, "the bytes of a deleted file stay");
            }
            Ok(Json(Deleted { id, object: "file", deleted: true }))
        }
        FileDeleted::InUse(job) => {
            Err(ApiError::refused(format!("The file {id} is used by the unfinished job {job}.")))
        }
        FileDeleted::NotFound => Err(ApiError::no_such("File", &id)),
    }
}

/// A file's exact bytes.
#[utoipa::path(
    get,
    path = "/v1/files/{file_id}/content",
    tag = "Files",
    params(("file_id" = String, Path, description = "`file-…`")),
    responses(
        (status = 200, description = "The bytes", content_type = "application/octet-stream"),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn download_file(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    Id(id): Id,
) -> ApiResult<Response> {
    let storage = gateway.storage();
    let row = storage.db.files().get(&caller.org, &id).await?;
    let row = row.ok_or_else(|| ApiError::no_such("File", &id))?;
    let (bytes, chunks) = storage.objects.get_stream(&ObjectKey::File { id }).await?;
    let csv = row.filename.to_ascii_lowercase().ends_with(".csv");
    let kind = if csv { "text/csv" } else { "application/octet-stream" };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(kind)),
        (header::CONTENT_LENGTH, HeaderValue::from(bytes)),
    ];
    Ok((headers, Body::from_stream(chunks.map_err(std::io::Error::other))).into_response())
}
