//! What every request passes on its way in and out, whatever its route: id, headers, metrics, the
//! caller, panics, and the replies for routes that do not exist.

use std::any::Any;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use storage::ids::{IdKind, new_id};
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};
use tracing::Instrument;

use crate::auth::Authenticated;
use crate::error::ApiError;
use crate::gateway::Gateway;

/// Address of the other end of the connection.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// Unknown caller, in `openai-organization`.
const NO_ORG: HeaderValue = HeaderValue::from_static("unknown");

/// Gives the request an id and the reply its headers; logs and counts it.
pub async fn stamp(request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = new_id(IdKind::HttpRequest);
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str);
    let route = route.to_owned();
    let client_id = request.headers().get("x-client-request-id");
    let client_id = client_id.and_then(|id| id.to_str().ok()).unwrap_or_default();
    let span = tracing::info_span!(
        "request",
        request.id = id,
        request.client_id = client_id.get(..client_id.len().min(128)).unwrap_or_default(),
        http.method = %method,
        http.route = route,
    );
    let mut response = next.run(request).instrument(span.clone()).await;
    let took = started.elapsed();
    let status = response.status().as_u16();
    span.in_scope(|| tracing::debug!(status, took_ms = took.as_millis() as u64, "answered"));
    crate::metrics::answered(&route, method.as_str(), status, took);
    let org = response.extensions().get::<Authenticated>();
    let org = org.and_then(|Authenticated(caller)| HeaderValue::try_from(&caller.org).ok());
    let headers = response.headers_mut();
    headers.insert("openai-organization", org.unwrap_or(NO_ORG));
    headers.insert("openai-processing-ms", HeaderValue::from(took.as_millis() as u64));
    headers.insert("openai-version", HeaderValue::from_static("2020-10-01"));
    if let Ok(id) = HeaderValue::try_from(id) {
        headers.insert("x-request-id", id);
    }
    response
}

/// Everything under `/v1` needs a caller, routes that do not exist included.
pub async fn authenticate(
    State(gateway): State<Arc<Gateway>>,
    mut request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path();
    if path != "/v1" && !path.starts_with("/v1/") {
        return next.run(request).await;
    }
    let caller = gateway
        .keys()
        .caller(
            &gateway.storage().db,
            request.uri(),
            request.headers(),
            &gateway.config().cors_origins,
        )
        .await;
    match caller {
        Ok(caller) => {
            request.extensions_mut().insert(Authenticated(caller.clone()));
            let mut response = next.run(request).await;
            response.extensions_mut().insert(Authenticated(caller));
            response
        }
        Err(error) => error.into_response(),
    }
}

/// A panic is a 500 like any other; its message goes to the log.
pub fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("without a message");
    tracing::error!(panic = message, "a request panicked");
    ApiError::internal_silent().into_response()
}

/// No such route.
pub async fn no_route(request: Request) -> ApiError {
    ApiError::no_route(request.method(), request.uri().path())
}

/// The route exists, the method does not; the router adds `Allow`.
pub async fn wrong_method(request: Request) -> ApiError {
    ApiError::wrong_method(request.method(), request.uri().path())
}

/// Lets the configured web origins in, any header they ask for, and shows them the request id.
/// None without origins: the layer answers every OPTIONS itself.
pub fn cors(origins: &[String]) -> Option<CorsLayer> {
    let origins: Vec<HeaderValue> =
        origins.iter().filter_map(|origin| HeaderValue::try_from(origin).ok()).collect();
    if origins.is_empty() {
        return None;
    }
    let layer = CorsLayer::new()
        .allow_origin(AllowOrigin::list(origins))
        .allow_methods(AllowMethods::mirror_request())
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([HeaderName::from_static("x-request-id"), header::RETRY_AFTER]);
    Some(layer)
}
