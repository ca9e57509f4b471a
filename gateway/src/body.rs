//! Reading request bodies within bounds of size and silence, and reading on politely after a
//! refusal: a client that is still sending would otherwise lose the reply to a closed connection.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as TaskState, Poll};
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::Request;
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use tokio::time::{Instant, timeout, timeout_at};

use crate::error::{ApiError, ApiResult};
use crate::gateway::Gateway;
use crate::wire::fields::Fields;

/// What is read and thrown away after a refusal, at most; beyond it the connection is closed.
const DRAIN_BYTES_MAX: u64 = 256 << 20;
const DRAIN_TIME_MAX: Duration = Duration::from_secs(10);

/// A client that sends nothing for so long is not in the middle of sending.
const DRAIN_SILENCE_MAX: Duration = Duration::from_secs(1);

/// Bodies above this are parsed beside the tasks that stream tokens.
const PARSE_INLINE_BYTES_MAX: usize = 256 << 10;

/// The body as a JSON object, whatever its Content-Type says.
pub async fn read_json(gateway: &Gateway, request: Request) -> ApiResult<Fields> {
    let body = read(gateway, request).await?;
    if body.len() <= PARSE_INLINE_BYTES_MAX {
        return Fields::parse(&body);
    }
    let parsed = tokio::task::spawn_blocking(move || Fields::parse(&body)).await;
    parsed.unwrap_or_else(|stopped| Err(ApiError::internal(&stopped)))
}

/// The whole body.
pub async fn read(gateway: &Gateway, request: Request) -> ApiResult<Bytes> {
    let config = gateway.config();
    check_length(request.headers(), config.body_bytes_max as u64)?;
    let mut chunks = request.into_body().into_data_stream();
    let mut whole = BytesMut::new();
    while let Some(chunk) = next_chunk(&mut chunks, config.body_idle_timeout).await? {
        if whole.len() + chunk.len() > config.body_bytes_max {
            return Err(ApiError::too_large(config.body_bytes_max as u64));
        }
        whole.extend_from_slice(&chunk);
    }
    Ok(whole.freeze())
}

/// Refuses by the announced length, before a byte is read.
pub fn check_length(headers: &HeaderMap, max: u64) -> ApiResult<()> {
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    match announced.and_then(|text| text.parse::<u64>().ok()) {
        Some(length) if length > max => Err(ApiError::too_large(max)),
        _ => Ok(()),
    }
}

/// The next bytes; None at the end.
pub async fn next_chunk(chunks: &mut BodyDataStream, idle: Duration) -> ApiResult<Option<Bytes>> {
    match timeout(idle, chunks.next()).await {
        Ok(Some(Ok(chunk))) => Ok(Some(chunk)),
        Ok(Some(Err(_))) => Err(ApiError::refused("The request body could not be read.")),
        Ok(None) => Ok(None),
        Err(_) => Err(ApiError::refused("The request body stopped arriving.")),
    }
}

/// A body whose unread rest comes back when it is dropped.
struct Returning {
    chunks: Option<BodyDataStream>,
    touched: bool,
    rest: Arc<Mutex<Option<Rest>>>,
}

struct Rest {
    chunks: BodyDataStream,
    touched: bool,
}

impl Stream for Returning {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, task: &mut TaskState<'_>) -> Poll<Option<Self::Item>> {
        self.touched = true;
        let Some(chunks) = &mut self.chunks else { return Poll::Ready(None) };
        let next = chunks.poll_next_unpin(task);
        if let Poll::Ready(None | Some(Err(_))) = &next {
            self.chunks = None;
        }
        next
    }
}

impl Drop for Returning {
    fn drop(&mut self) {
        if let Some(chunks) = self.chunks.take() {
            let rest = Rest { chunks, touched: self.touched };
            *self.rest.lock().unwrap_or_else(PoisonError::into_inner) = Some(rest);
        }
    }
}

/// Middleware: after a refusal, reads what the client is still sending.
pub async fn drain_after_refusal(request: Request, next: Next) -> Response {
    if !matches!(*request.method(), Method::POST | Method::PUT | Method::PATCH) {
        return next.run(request).await;
    }
    // Such a client sends nothing until it is told to go on.
    let waits = request.headers().contains_key(header::EXPECT);
    let slot = Arc::new(Mutex::new(None));
    let rest = Arc::clone(&slot);
    let request = request.map(|body| {
        let chunks = Some(body.into_data_stream());
        Body::from_stream(Returning { chunks, touched: false, rest })
    });
    let response = next.run(request).await;
    if response.status().is_client_error() || response.status().is_server_error() {
        let rest = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(rest) = rest.filter(|rest| rest.touched || !waits) {
            drain(rest.chunks).await;
        }
    }
    response
}

async fn drain(mut chunks: BodyDataStream) {
    let deadline = Instant::now() + DRAIN_TIME_MAX;
    let mut bytes = 0;
    while bytes < DRAIN_BYTES_MAX {
        let silence = deadline.min(Instant::now() + DRAIN_SILENCE_MAX);
        match timeout_at(silence, chunks.next()).await {
            Ok(Some(Ok(chunk))) => bytes += chunk.len() as u64,
            Ok(Some(Err(_)) | None) | Err(_) => return,
        }
    }
}
