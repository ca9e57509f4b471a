//! Handlers: each reads its request, asks storage or the workers, and writes its reply.

pub mod adapters;
pub mod chat;
mod chunks;
pub mod completions;
pub mod files;
pub mod health;
mod infer;
pub mod job_history;
pub mod jobs;
pub mod migration;
pub mod models;
pub mod workers;

use axum::extract::{FromRequestParts, Path};
use axum::http::HeaderMap;
use axum::http::request::Parts;
use sha2::{Digest, Sha256};
use storage::db::Idempotency;

use crate::error::{ApiError, ApiResult};
use crate::wire::fields::max_chars;

/// The id in a path, percent-decoded once.
pub struct Id(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Path::<String>::from_request_parts(parts, state).await {
            // No stored id holds U+0000.
            Ok(Path(id)) if !id.contains('\0') => Ok(Id(id)),
            Ok(_) | Err(_) => Err(ApiError::no_route(&parts.method, parts.uri.path())),
        }
    }
}

/// The client's `Idempotency-Key` for a body, if it sent one.
fn idempotency(headers: &HeaderMap, body_hash: String) -> ApiResult<Option<Idempotency>> {
    const KEY: &str = "Idempotency-Key";
    let Some(value) = headers.get(KEY) else { return Ok(None) };
    let key = value.to_str().map_err(|_| {
        ApiError::invalid_value(KEY, "The Idempotency-Key header must be plain ASCII.")
    })?;
    max_chars(key, KEY, 255)?;
    Ok(Some(Idempotency { key: key.to_owned(), body_hash }))
}

/// The error for a key that was used with another body.
fn key_reused() -> ApiError {
    ApiError::bad(
        "invalid_value",
        "Idempotency-Key",
        "This Idempotency-Key was used with another request body.",
    )
}

/// SHA-256 in hexadecimal.
fn hex_hash(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
