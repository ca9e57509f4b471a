//! Forms with files, read as a stream: memory stays bounded whatever a client sends.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context as TaskState, Poll};
use std::time::Duration;

use axum::body::BodyDataStream;
use axum::extract::Request;
use axum::http::header;
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use multer::{Field, Multipart};
use tokio::time::Sleep;

use crate::body::check_length;
use crate::error::{ApiError, ApiResult};

/// Bytes of the form around its files: boundaries, headers and text fields.
const FORM_BYTES: u64 = 1 << 20;

/// A text field.
const TEXT_BYTES_MAX: usize = 64 << 10;

/// A form being read.
pub struct Form {
    parts: Multipart<'static>,
    /// Bytes handed to the parser since it last gave something back.
    unanswered: Arc<AtomicU64>,
}

impl Form {
    /// Begins to read a form whose files come to at most `bytes_max`.
    pub fn open(request: Request, bytes_max: u64, idle: Duration) -> ApiResult<Form> {
        check_length(request.headers(), bytes_max + FORM_BYTES)
            .map_err(|_| ApiError::too_large(bytes_max))?;
        let kind = request.headers().get(header::CONTENT_TYPE);
        let kind = kind.and_then(|value| value.to_str().ok()).unwrap_or_default();
        let boundary = multer::parse_boundary(kind).map_err(|_| {
            ApiError::refused("Expected a request with Content-Type multipart/form-data.")
        })?;
        let unanswered = Arc::new(AtomicU64::new(0));
        let source = Source {
            chunks: request.into_body().into_data_stream(),
            idle,
            silence: Box::pin(tokio::time::sleep(idle)),
            rest: false,
            unanswered: Arc::clone(&unanswered),
        };
        Ok(Form { parts: Multipart::new(source, boundary), unanswered })
    }

    /// The next field with its name; the one before must be dropped.
    pub async fn next(&mut self) -> ApiResult<Option<(String, Field<'static>)>> {
        let field = self.parts.next_field().await.map_err(refuse)?;
        self.unanswered.store(0, Ordering::Relaxed);
        match field {
            None => Ok(None),
            Some(field) => match field.name().map(str::to_owned) {
                Some(name) => Ok(Some((name, field))),
                None => Err(ApiError::refused("A field of the form has no name.")),
            },
        }
    }

    /// The next bytes of a field.
    pub async fn chunk(&self, field: &mut Field<'static>) -> ApiResult<Option<Bytes>> {
        let chunk = field.chunk().await.map_err(refuse)?;
        self.unanswered.store(0, Ordering::Relaxed);
        Ok(chunk)
    }

    /// A short text field.
    pub async fn text(&self, mut field: Field<'static>, name: &str) -> ApiResult<String> {
        let bytes = self.bytes(&mut field, name, TEXT_BYTES_MAX).await?;
        String::from_utf8(bytes.into()).map_err(|_| {
            ApiError::invalid_value(name, format!("Invalid '{name}': it is not valid UTF-8."))
        })
    }

    /// A whole field in memory.
    pub async fn bytes(
        &self,
        field: &mut Field<'static>,
        name: &str,
        max: usize,
    ) -> ApiResult<Bytes> {
        let mut whole = BytesMut::new();
        while let Some(chunk) = self.chunk(field).await? {
            if whole.len() + chunk.len() > max {
                tracing::debug!(field = name, "a form field is too large");
                return Err(ApiError::too_large(max as u64));
            }
            whole.extend_from_slice(&chunk);
        }
        Ok(whole.freeze())
    }
}

/// What may go wrong with the body of a form.
#[derive(Debug, thiserror::Error)]
enum SourceFault {
    #[error("the request body stopped arriving")]
    Silent,
    #[error("the form's headers are too long")]
    Headers,
    #[error("the request body could not be read: {0}")]
    Broken(#[from] axum::Error),
}

/// The body, one chunk at a time: the parser reads its source until it has to wait, which with a
/// fast client would put the whole body into memory, so this one makes it wait after each chunk.
struct Source {
    chunks: BodyDataStream,
    idle: Duration,
    silence: Pin<Box<Sleep>>,
    rest: bool,
    unanswered: Arc<AtomicU64>,
}

impl Stream for Source {
    type Item = Result<Bytes, SourceFault>;

    fn poll_next(mut self: Pin<&mut Self>, task: &mut TaskState<'_>) -> Poll<Option<Self::Item>> {
        if std::mem::take(&mut self.rest) {
            task.waker().wake_by_ref();
            return Poll::Pending;
        }
        match self.chunks.poll_next_unpin(task) {
            Poll::Ready(Some(Ok(chunk))) => {
                self.rest = true;
                let deadline = tokio::time::Instant::now() + self.idle;
                self.silence.as_mut().reset(deadline);
                let bytes = chunk.len() as u64;
                let unanswered = self.unanswered.fetch_add(bytes, Ordering::Relaxed) + bytes;
                if unanswered > FORM_BYTES {
                    return Poll::Ready(Some(Err(SourceFault::Headers)));
                }
                Poll::Ready(Some(Ok(chunk)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error.into()))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => match self.silence.as_mut().poll(task) {
                Poll::Ready(()) => Poll::Ready(Some(Err(SourceFault::Silent))),
                Poll::Pending => Poll::Pending,
            },
        }
    }
}

fn refuse(error: multer::Error) -> ApiError {
    tracing::debug!(%error, "a form was refused");
    ApiError::refused(format!("The multipart form could not be read: {error}."))
}
