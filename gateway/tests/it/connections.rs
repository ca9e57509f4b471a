//! What only shows on a socket: hang-ups, slow clients, refusals of large bodies, shutdown.

use std::net::SocketAddr;
use std::time::Duration;

use gateway::GatewayConfig;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::site::{Site, chat_body};
use crate::worker::{self, Script};

struct Served {
    site: Site,
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    server: JoinHandle<std::io::Result<()>>,
}

async fn serve(config: GatewayConfig) -> Served {
    let site = Site::with(config).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let gateway = std::sync::Arc::clone(&site.gateway);
    let server = tokio::spawn(gateway::serve(listener, gateway, async {
        stopped.await.ok();
    }));
    Served { site, address, stop, server }
}

fn open() -> GatewayConfig {
    GatewayConfig { open_access: true, ..GatewayConfig::default() }
}

fn post(path: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Reads until the other side closes or `until` has been seen.
async fn read(stream: &mut TcpStream, until: &str) -> String {
    let mut text = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let read = timeout(Duration::from_secs(5), stream.read(&mut chunk)).await;
        let count = read.expect("something arrives").unwrap_or(0);
        text.extend_from_slice(&chunk[..count]);
        let seen = String::from_utf8_lossy(&text).into_owned();
        if count == 0 || (!until.is_empty() && seen.contains(until)) {
            return seen;
        }
    }
}

#[tokio::test]
async fn hanging_up_cancels_streams_and_whole_replies() {
    let served = serve(open()).await;
    let script = Script { silent: true, ..Script::default() };
    let worker = worker::start(&served.site.storage, "w", script).await;
    for (i, stream) in [true, false].into_iter().enumerate() {
        let body = chat_body(json!({"stream": stream})).to_string();
        let mut socket = TcpStream::connect(served.address).await.unwrap();
        socket.write_all(post("/v1/chat/completions", &body).as_bytes()).await.unwrap();
        if stream {
            let head = read(&mut socket, "assistant").await;
            assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
        }
        let id = worker.wait(|heard| heard.requests.get(i).map(|r| r.request_id.clone())).await;
        drop(socket);
        let gone = worker.wait(|heard| heard.cancels.get(i).cloned()).await;
        assert_eq!(gone, id);
    }
    assert_eq!(served.site.gateway.open_requests(), 0);
}

#[tokio::test]
async fn a_stream_ends_its_response_right_after_done() {
    let served = serve(open()).await;
    let _worker = worker::start(&served.site.storage, "w", Script::default()).await;
    let body = chat_body(json!({"stream": true})).to_string();
    let mut socket = TcpStream::connect(served.address).await.unwrap();
    socket.write_all(post("/v1/chat/completions", &body).as_bytes()).await.unwrap();
    let reply = read(&mut socket, "\r\n0\r\n\r\n").await;
    assert!(reply.contains("data: [DONE]\n\n\r\n0\r\n\r\n"), "{reply}");
    // The connection is good for another request.
    let get = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";
    socket.write_all(get.as_bytes()).await.unwrap();
    assert!(read(&mut socket, "\"ok\"").await.starts_with("HTTP/1.1 200 OK"));
}

#[tokio::test]
async fn metrics_are_open_to_this_machine() {
    let served = serve(GatewayConfig::default()).await;
    let ask = async |headers: &str| {
        let mut socket = TcpStream::connect(served.address).await.unwrap();
        let get = format!("GET /metrics HTTP/1.1\r\nConnection: close\r\n{headers}\r\n");
        socket.write_all(get.as_bytes()).await.unwrap();
        read(&mut socket, "").await
    };
    assert!(ask("Host: 127.0.0.1\r\n").await.starts_with("HTTP/1.1 200 OK"));
    for headers in ["Host: example.com\r\n", "Host: localhost\r\nX-Forwarded-For: 1.2.3.4\r\n"] {
        assert!(ask(headers).await.starts_with("HTTP/1.1 401"), "{headers}");
    }
}

#[tokio::test]
async fn readiness_follows_the_workers() {
    let served = serve(open()).await;
    assert_eq!(served.site.client().get("/readyz").await.status, 503);
    let worker = worker::start(&served.site.storage, "w", Script::default()).await;
    assert_eq!(served.site.client().get("/readyz").await.status, 200);
    drop(worker);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(served.site.client().get("/readyz").await.status, 503);
}

#[tokio::test]
async fn a_refused_upload_is_read_on_so_that_its_client_sees_why() {
    let config = GatewayConfig { body_bytes_max: 1000, ..open() };
    let served = serve(config).await;
    let big = "x".repeat(4 << 20);
    let mut socket = TcpStream::connect(served.address).await.unwrap();
    let request = post("/v1/chat/completions", &big);
    timeout(Duration::from_secs(5), socket.write_all(request.as_bytes())).await.unwrap().unwrap();
    let reply = read(&mut socket, "request_too_large").await;
    assert!(reply.starts_with("HTTP/1.1 413"), "{reply}");

    // A client that asks first is told at once and sends nothing.
    let mut socket = TcpStream::connect(served.address).await.unwrap();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\
                Content-Length: 100000\r\nExpect: 100-continue\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let reply = read(&mut socket, "request_too_large").await;
    assert!(reply.starts_with("HTTP/1.1 413"), "{reply}");
}

#[tokio::test]
async fn slow_clients_are_dropped() {
    let config = GatewayConfig {
        header_timeout: Duration::from_millis(200),
        body_idle_timeout: Duration::from_millis(200),
        ..open()
    };
    let served = serve(config).await;
    let mut socket = TcpStream::connect(served.address).await.unwrap();
    socket.write_all(b"GET /healthz HTTP/1.1\r\nHost: loc").await.unwrap();
    read(&mut socket, "").await;

    for (path, kind) in [
        ("/v1/chat/completions", "application/json"),
        ("/v1/files", "multipart/form-data; boundary=XX"),
    ] {
        let mut socket = TcpStream::connect(served.address).await.unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n\
             Content-Length: 100\r\nConnection: close\r\n\r\n--XX"
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        let reply = read(&mut socket, "").await;
        assert!(reply.starts_with("HTTP/1.1 400"), "{reply}");
    }
}

#[tokio::test]
async fn shutdown_lets_open_requests_end() {
    let served = serve(open()).await;
    let script = Script { pause: Duration::from_millis(50), ..Script::default() };
    let worker = worker::start(&served.site.storage, "w", script).await;
    let body = chat_body(json!({"stream": true})).to_string();
    let mut socket = TcpStream::connect(served.address).await.unwrap();
    socket.write_all(post("/v1/chat/completions", &body).as_bytes()).await.unwrap();
    worker.wait(|heard| heard.requests.first().cloned()).await;
    served.stop.send(()).unwrap();
    let reply = read(&mut socket, "[DONE]").await;
    assert!(reply.contains("data: [DONE]"), "{reply}");
    timeout(Duration::from_secs(5), served.server).await.unwrap().unwrap().unwrap();
    assert!(TcpStream::connect(served.address).await.is_err());
}
