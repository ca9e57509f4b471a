//! Connections: accepted up to a bound, given a short time for their headers, ended in order.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::ServiceExt;

use crate::border::Peer;
use crate::gateway::Gateway;
use crate::router::app;

/// Pause after a failed accept: mostly a lack of file descriptors, which passes.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Bytes of a request's head; also bounds the read buffer of a connection.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// Serves until `shutdown` resolves; open requests then have the configured time to end.
pub async fn serve(
    listener: TcpListener,
    gateway: Arc<Gateway>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let app = app(Arc::clone(&gateway));
    let room = Arc::new(Semaphore::new(gateway.config().connections_max));
    let graceful = GracefulShutdown::new();
    tokio::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &room) => accepted,
            () = &mut shutdown => break,
        };
        match accepted {
            Ok((stream, permit)) => {
                let watcher = graceful.watcher();
                let header_timeout = gateway.config().header_timeout;
                tokio::spawn(connection(stream, app.clone(), watcher, header_timeout, permit));
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let grace = gateway.config().shutdown_grace;
    if tokio::time::timeout(grace, graceful.shutdown()).await.is_err() {
        tracing::warn!(grace_secs = grace.as_secs(), "open requests were cut off");
    }
    gateway.flush().await;
    Ok(())
}

/// The next connection, once there is room for one.
async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let permit = Arc::clone(room).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    // Tokens are small and must not wait for one another.
    stream.set_nodelay(true)?;
    Ok((stream, permit))
}

async fn connection(
    stream: TcpStream,
    app: Router,
    watcher: Watcher,
    header_timeout: Duration,
    _permit: OwnedSemaphorePermit,
) {
    let peer = stream.peer_addr().ok().map(Peer);
    let service = app.map_request(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        if let Some(peer) = peer {
            request.extensions_mut().insert(peer);
        }
        request
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    if let Err(error) = watcher.watch(connection).await {
        // The client's doing: closed early, too slow, or no HTTP.
        tracing::debug!(%error, "a connection ended");
    }
}
