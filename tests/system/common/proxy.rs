//! A way to a server that can be closed, for outages that concern one process only.

use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// How the way is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Open.
    Open,
    /// Every connection is closed at once.
    Closed,
    /// Connections are taken and nothing comes back.
    Silent,
}

/// See the module. Connections do not outlive a change.
pub struct Proxy {
    /// `host:port`.
    pub address: String,
    way: Arc<watch::Sender<Way>>,
}

impl Proxy {
    /// An open way to `host:port`.
    pub async fn start(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let way = Arc::new(watch::Sender::new(Way::Open));
        let (ways, server) = (way.clone(), server.to_owned());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (mut changes, server) = (ways.subscribe(), server.clone());
                let now = *changes.borrow_and_update();
                tokio::spawn(async move {
                    tokio::select! {
                        () = pass(client, &server, now) => {}
                        _ = changes.changed() => {}
                    }
                });
            }
        });
        Self { address, way }
    }

    /// Changes the way.
    pub fn set(&self, way: Way) {
        self.way.send_replace(way);
    }
}

async fn pass(mut client: TcpStream, server: &str, way: Way) {
    match way {
        Way::Open => {
            let Ok(mut upstream) = TcpStream::connect(server).await else { return };
            let _ = client.set_nodelay(true);
            let _ = upstream.set_nodelay(true);
            let _ = copy_bidirectional(&mut client, &mut upstream).await;
        }
        Way::Closed => {
            let _ = client.shutdown().await;
        }
        Way::Silent => {
            let mut heard = [0; 4096];
            while client.read(&mut heard).await.is_ok_and(|bytes| bytes > 0) {}
        }
    }
}
