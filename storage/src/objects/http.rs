//! HTTP as the object store's client speaks it: every wait is bounded, TLS uses the system's
//! certificates, and a store that is overloaded counts as away. Knows nothing of S3.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use futures::{StreamExt, stream};
use http_body_util::{BodyExt, StreamBody};
use hyper::StatusCode;
use hyper::body::Incoming;
use hyper_rustls::{ConfigBuilderExt, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector as TcpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody,
    HttpResponse, HttpResponseBody, HttpService,
};
use object_store::{ClientConfigKey, ClientOptions};
use rustls::{ClientConfig, RootCertStore};
use tokio::time::timeout;

use super::S3Limits;

/// An idle connection is closed before common load balancers would close it unseen.
const IDLE_CONNECTION: Duration = Duration::from_secs(30);

/// The store could not be reached, broke off, stayed silent or said that it is overloaded.
pub(crate) fn is_away(error: &object_store::Error) -> bool {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(inner) = cause {
        if inner.is::<HttpError>() {
            return true;
        }
        cause = inner.source();
    }
    false
}

/// Makes the clients: one for the store, others for services that hand out credentials.
#[derive(Debug)]
pub(super) struct BoundedConnector {
    pub(super) limits: S3Limits,
}

impl HttpConnector for BoundedConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let allow_http =
            options.get_config_value(&ClientConfigKey::AllowHttp).is_some_and(|v| v == "true");
        let tls = tls_config(allow_http)
            .map_err(|error| object_store::Error::Generic { store: "S3", source: error })?;
        let mut tcp = TcpConnector::new();
        tcp.set_connect_timeout(Some(self.limits.connect));
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        let builder = HttpsConnectorBuilder::new().with_tls_config(tls);
        let connector = if allow_http { builder.https_or_http() } else { builder.https_only() };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_CONNECTION)
            .build(connector.enable_http1().wrap_connector(tcp));
        Ok(HttpClient::new(BoundedClient { client, limits: self.limits.clone() }))
    }
}

/// Trusts what the system trusts (`SSL_CERT_FILE` names another bundle). A system without
/// certificates may still use a store over plain HTTP.
fn tls_config(allow_http: bool) -> Result<ClientConfig, Box<dyn StdError + Send + Sync>> {
    let versions = || {
        ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
            .with_safe_default_protocol_versions()
    };
    let config = match versions()?.with_native_roots() {
        Ok(trusting) => trusting.with_no_client_auth(),
        Err(_) if allow_http => {
            versions()?.with_root_certificates(RootCertStore::empty()).with_no_client_auth()
        }
        Err(error) => return Err(error.into()),
    };
    Ok(config)
}

struct BoundedClient {
    client: Client<HttpsConnector<TcpConnector>, HttpRequestBody>,
    limits: S3Limits,
}

impl fmt::Debug for BoundedClient {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("BoundedClient").field("limits", &self.limits).finish()
    }
}

#[async_trait::async_trait]
impl HttpService for BoundedClient {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let answer = timeout(self.limits.answer, self.client.request(request));
        let (head, body) = match answer.await {
            Ok(Ok(response)) => response.into_parts(),
            Ok(Err(error)) => return Err(repeatable(Fault::Broken(chain(&error)))),
            Err(_) => return Err(repeatable(Fault::NoAnswer(self.limits.answer))),
        };
        if is_busy(head.status) {
            return Err(repeatable(Fault::Busy(head.status)));
        }
        Ok(HttpResponse::from_parts(head, bounded(body, self.limits.silence)))
    }
}

/// Statuses of a store that cannot serve anyone just now.
fn is_busy(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504)
}

/// A body whose every wait for more bytes is bounded.
fn bounded(body: Incoming, silence: Duration) -> HttpResponseBody {
    let frames = stream::unfold(Some(body), move |body| async move {
        let mut body = body?;
        match timeout(silence, body.frame()).await {
            Ok(Some(Ok(frame))) => Some((Ok(frame), Some(body))),
            Ok(Some(Err(error))) => Some((Err(broken_off(Fault::Broken(chain(&error)))), None)),
            Ok(None) => None,
            Err(_) => Some((Err(broken_off(Fault::NoAnswer(silence))), None)),
        }
    });
    // A body may be polled after its end.
    HttpResponseBody::new(StreamBody::new(frames.fuse()))
}

/// What went wrong with an exchange.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("{0}")]
    Broken(String),
    #[error("no answer within {0:?}")]
    NoAnswer(Duration),
    #[error("the store answers {0}")]
    Busy(StatusCode),
}

/// Every request of ours may be sent again: objects are stored whole and their keys are fresh.
fn repeatable(fault: Fault) -> HttpError {
    HttpError::new(HttpErrorKind::Request, fault)
}

/// The client then asks for the rest of the body only.
fn broken_off(fault: Fault) -> HttpError {
    HttpError::new(HttpErrorKind::Interrupted, fault)
}

/// An error with its causes, which say more than it does itself.
fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}
