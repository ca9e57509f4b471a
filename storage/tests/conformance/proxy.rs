//! A server in front of the S3 server that fails in chosen ways.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const NO_SUCH_UPLOAD: &[u8] = b"HTTP/1.1 404 Not Found\r\nconnection: close\r\n\
    content-length: 42\r\n\r\n<Error><Code>NoSuchUpload</Code></Error>\r\n";

/// What the proxy does with what passes through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Closes every connection.
    Away,
    /// Takes requests and never answers.
    Silent,
    /// Once: closes the connection after so many bytes of answers.
    CutAnswer { after: usize },
    /// Once: passes on the request that completes an upload, loses its answer, and says to the
    /// next one that there is no such upload, as a store may that has forgotten a completed one.
    LoseCompletion,
    /// The second half of the one above.
    ForgetUpload,
}

#[derive(Clone)]
pub struct Proxy {
    pub address: String,
    fault: Arc<Mutex<Fault>>,
    changes: watch::Sender<()>,
}

impl Proxy {
    pub async fn start(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let fault = Arc::new(Mutex::new(Fault::None));
        let proxy = Self { address, fault, changes: watch::Sender::new(()) };
        let (accepting, server) = (proxy.clone(), server.to_owned());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (proxy, server) = (accepting.clone(), server.clone());
                tokio::spawn(async move {
                    let mut changed = proxy.changes.subscribe();
                    // Connections do not outlive the fault they were opened under.
                    tokio::select! {
                        _ = proxy.pass(client, &server) => {}
                        _ = changed.changed() => {}
                    }
                });
            }
        });
        proxy
    }

    pub fn set(&self, fault: Fault) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
        self.changes.send_replace(());
    }

    pub fn fault(&self) -> Fault {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What follows a fault that happens once; open connections stay.
    fn set_quietly(&self, next: Fault) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = next;
    }

    async fn pass(&self, mut client: TcpStream, server: &str) -> Option<()> {
        let (mut asked, mut answered) = (vec![0; 65536], vec![0; 65536]);
        if self.fault() == Fault::Away {
            return None;
        }
        let mut upstream = TcpStream::connect(server).await.ok()?;
        let (mut seen, mut lose) = (0, false);
        loop {
            tokio::select! {
                read = client.read(&mut asked) => {
                    let piece = &asked[..read.ok().filter(|count| *count > 0)?];
                    if self.fault() == Fault::Silent {
                        continue;
                    }
                    if self.fault() == Fault::ForgetUpload && completes(piece) {
                        self.set_quietly(Fault::None);
                        return client.write_all(NO_SUCH_UPLOAD).await.ok();
                    }
                    lose |= self.fault() == Fault::LoseCompletion && completes(piece);
                    upstream.write_all(piece).await.ok()?;
                }
                read = upstream.read(&mut answered) => {
                    let piece = &answered[..read.ok().filter(|count| *count > 0)?];
                    if lose {
                        self.set_quietly(Fault::ForgetUpload);
                        return None;
                    }
                    seen += piece.len();
                    if let Fault::CutAnswer { after } = self.fault()
                        && seen > after
                    {
                        self.set_quietly(Fault::None);
                        return None;
                    }
                    client.write_all(piece).await.ok()?;
                }
            }
        }
    }
}

fn completes(request: &[u8]) -> bool {
    let head = &request[..request.len().min(400)];
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    line.starts_with(b"POST ") && String::from_utf8_lossy(line).contains("uploadId=")
}
