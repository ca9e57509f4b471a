//! The one error type of the HTTP border and its envelope
//! `{"error":{"message","type","param","code"}}`. Every reply that is not 2xx is made here.
//!
//! Statuses follow what SDKs do with them: they repeat 408, 409, 429 and 5xx on their own, so a
//! permanent condition is always another 4xx.

use axum::Json;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::Value;
use storage::queue::message::{Refusal, RefusalKind};
use utoipa::ToSchema;

/// Body of every reply that is not 2xx.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorReply {
    /// What went wrong.
    pub error: ErrorBody,
}

/// The four keys clients read; all are always present.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// Sentence for a person.
    pub message: String,
    /// Family, such as `invalid_request_error`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Path of the offending field, such as `messages[0].content`.
    pub param: Option<String>,
    /// Machine-readable reason.
    pub code: Option<&'static str>,
}

/// A refusal or a fault on its way to the client. Boxed: results carry it everywhere.
#[derive(Clone, Debug)]
pub struct ApiError(Box<Refused>);

#[derive(Clone, Debug)]
struct Refused {
    status: StatusCode,
    body: ErrorBody,
    retry_after_ms: Option<u64>,
    /// Send `WWW-Authenticate: Bearer`.
    challenge: bool,
}

/// What handlers return.
pub type ApiResult<T> = Result<T, ApiError>;

const INVALID: &str = "invalid_request_error";

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> ApiError {
        let body = ErrorBody { message: message.into(), kind, param: None, code: None };
        ApiError(Box::new(Refused { status, body, retry_after_ms: None, challenge: false }))
    }

    fn code(mut self, code: &'static str) -> ApiError {
        self.0.body.code = Some(code);
        self
    }

    fn param(mut self, param: impl Into<String>) -> ApiError {
        self.0.body.param = Some(param.into());
        self
    }

    fn challenge(mut self) -> ApiError {
        self.0.challenge = true;
        self
    }

    fn retry_after_ms(mut self, ms: u64) -> ApiError {
        self.0.retry_after_ms = Some(ms);
        self
    }

    /// 400 with a code and the field's path.
    pub fn bad(
        code: &'static str,
        param: impl Into<String>,
        message: impl Into<String>,
    ) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, INVALID, message).code(code).param(param)
    }

    /// 400 without a code, for conditions that have no row of their own.
    pub fn refused(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, INVALID, message)
    }

    /// 400: the body is not a JSON object.
    pub fn not_json() -> ApiError {
        ApiError::refused("We could not parse the JSON body of your request.")
    }

    /// 400: a required field is absent or null.
    pub fn missing(param: impl Into<String>) -> ApiError {
        let param = param.into();
        let message = format!("Missing required parameter: '{param}'.");
        ApiError::bad("missing_required_parameter", param, message)
    }

    /// 400: wrong JSON type; `expected` carries its article, as in "an integer".
    pub fn invalid_type(param: impl Into<String>, expected: &str, got: &Value) -> ApiError {
        let param = param.into();
        let message = format!(
            "Invalid type for '{param}': expected {expected}, but got {} instead.",
            json_type(got)
        );
        ApiError::bad("invalid_type", param, message)
    }

    /// 400: a value outside its format or list of values.
    pub fn invalid_value(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError::bad("invalid_value", param, message)
    }

    /// 400: a field this service does not know.
    pub fn unknown_parameter(param: impl Into<String>) -> ApiError {
        let param = param.into();
        let message = format!("Unknown parameter: '{param}'.");
        ApiError::bad("unknown_parameter", param, message)
    }

    /// 400: a known field that this service does not offer.
    pub fn unsupported_parameter(param: impl Into<String>, hint: &str) -> ApiError {
        let param = param.into();
        let message = format!("Unsupported parameter: '{param}' is not supported. {hint}");
        ApiError::bad("unsupported_parameter", param, message.trim_end())
    }

    /// 400: a known value that this service does not offer.
    pub fn unsupported_value(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        ApiError::bad("unsupported_value", param, message)
    }

    /// 401: no key was sent.
    pub fn no_key() -> ApiError {
        ApiError::new(
            StatusCode::UNAUTHORIZED,
            INVALID,
            "You didn't provide an API key. Send it in an Authorization header: \
             'Authorization: Bearer YOUR_KEY'.",
        )
        .challenge()
    }

    /// 401: the key is malformed, unknown or revoked; it is masked in the message.
    pub fn wrong_key(secret: &str) -> ApiError {
        let message = format!("Incorrect API key provided: {}.", mask(secret));
        ApiError::new(StatusCode::UNAUTHORIZED, INVALID, message)
            .code("invalid_api_key")
            .challenge()
    }

    /// 403: the caller may not do this.
    pub fn forbidden(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::FORBIDDEN, INVALID, message).code("insufficient_permissions")
    }

    /// 404: the model is unknown, foreign or gone.
    pub fn model_not_found(model: &str) -> ApiError {
        let message =
            format!("The model `{model}` does not exist or you do not have access to it.");
        ApiError::new(StatusCode::NOT_FOUND, INVALID, message)
            .code("model_not_found")
            .param("model")
    }

    /// 404: an object of `noun` (File, Adapter) is unknown, foreign or gone.
    pub fn no_such(noun: &str, id: &str) -> ApiError {
        let message = format!("No such {noun} object: {id}");
        ApiError::new(StatusCode::NOT_FOUND, INVALID, message).param("id")
    }

    /// 404: the fine-tuning job is unknown, foreign or gone.
    pub fn no_such_job(id: &str) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, INVALID, format!("Could not find fine tune: {id}"))
            .code("fine_tune_not_found")
            .param("fine_tune_id")
    }

    /// 404: no such route.
    pub fn no_route(method: &Method, path: &str) -> ApiError {
        let message = format!("Invalid URL ({method} {path})");
        ApiError::new(StatusCode::NOT_FOUND, INVALID, message)
    }

    /// 405; the router adds `Allow`.
    pub fn wrong_method(method: &Method, path: &str) -> ApiError {
        let message = format!("Not allowed to {method} on {path}.");
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, message).code("method_not_supported")
    }

    /// 413: more bytes than allowed.
    pub fn too_large(limit_bytes: u64) -> ApiError {
        let message = format!("The request is larger than the limit of {limit_bytes} bytes.");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, message).code("request_too_large")
    }

    /// 429: the caller's own limit; free again after `retry_after_ms`.
    pub fn rate_limited(message: impl Into<String>, retry_after_ms: u64) -> ApiError {
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
            .code("rate_limit_exceeded")
            .retry_after_ms(retry_after_ms)
    }

    /// 503: the whole service is saturated, starting, or lacks something it needs.
    pub fn overloaded(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", message)
            .code("server_is_overloaded")
            .retry_after_ms(1000)
    }

    /// 500: a fault of ours. The cause is logged here, once, and never shown.
    pub fn internal(cause: &dyn std::fmt::Display) -> ApiError {
        tracing::error!(%cause, "request failed");
        ApiError::internal_silent()
    }

    /// 500 whose cause is logged already.
    pub fn internal_silent() -> ApiError {
        ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            "The server had an error while processing your request. \
             Quote the x-request-id header when reporting it.",
        )
    }

    /// What a worker refused; `model` is the name the client used, `prompt_param` the field that
    /// holds its prompt.
    pub fn from_refusal(refusal: &Refusal, model: &str, prompt_param: &'static str) -> ApiError {
        let param = refusal.param.clone().unwrap_or_else(|| prompt_param.to_owned());
        match refusal.kind {
            RefusalKind::Invalid => ApiError::invalid_value(param, &refusal.message),
            RefusalKind::ContextLength => {
                ApiError::bad("context_length_exceeded", param, &refusal.message)
            }
            RefusalKind::ModelNotFound => ApiError::model_not_found(model),
            RefusalKind::Overloaded | RefusalKind::Unavailable => {
                ApiError::overloaded(&refusal.message)
            }
            RefusalKind::Internal => ApiError::internal(&refusal.message),
        }
    }

    /// HTTP status.
    pub fn status(&self) -> StatusCode {
        self.0.status
    }

    /// The JSON envelope; also what a stream sends when it fails after its first byte.
    pub fn reply(&self) -> ErrorReply {
        ErrorReply { error: self.0.body.clone() }
    }
}

impl From<storage::Error> for ApiError {
    fn from(error: storage::Error) -> ApiError {
        match &error {
            storage::Error::UnknownCursor(after) => {
                let message = format!("Invalid 'after': no item '{after}' in this list.");
                ApiError::invalid_value("after", message)
            }
            storage::Error::NulCharacter { field } => {
                let message = format!("Invalid '{field}': must not contain the null character.");
                ApiError::invalid_value(*field, message)
            }
            unavailable if unavailable.is_unavailable() => {
                let away = match unavailable {
                    storage::Error::QueueAway(_) => "queue",
                    storage::Error::ObjectsUnavailable(_) => "object store",
                    _ => "database",
                };
                tracing::error!(%error, away, "a store is away");
                ApiError::overloaded(format!("The {away} cannot be reached at the moment."))
            }
            _ => ApiError::internal(&error),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut headers = HeaderMap::new();
        if self.0.challenge {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(ms) = self.0.retry_after_ms {
            // Clients retry at once on 0 and give up on large values.
            let secs = ms.div_ceil(1000).clamp(1, 60);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(secs));
            headers.insert("retry-after-ms", HeaderValue::from(ms.clamp(1, 60_000)));
        }
        (self.0.status, headers, Json(self.reply())).into_response()
    }
}

/// The JSON type of a value with its article, as error messages name it.
fn json_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(n) if n.is_f64() => "a decimal number",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Enough of a key to recognise it, never enough to use it.
fn mask(secret: &str) -> String {
    let shown: Vec<char> = secret.chars().take(64).collect();
    if shown.len() < 12 {
        return "*".repeat(shown.len());
    }
    let head: String = shown[..3].iter().collect();
    let tail: String = shown[shown.len() - 4..].iter().collect();
    format!("{head}{}{tail}", "*".repeat(8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_masked() {
        assert_eq!(mask("sk-abcdefghijklmnop"), "sk-********mnop");
        assert_eq!(mask("short"), "*****");
        assert_eq!(mask("ключ-ключ-ключ"), "клю********ключ");
    }

    #[test]
    fn retry_after_stays_within_what_clients_accept() {
        for (ms, secs) in [(1, "1"), (1000, "1"), (1001, "2"), (3_600_000, "60")] {
            let reply = ApiError::rate_limited("slow down", ms).into_response();
            assert_eq!(reply.headers()[header::RETRY_AFTER], secs);
        }
    }
}
