//! A TCP proxy that stands before a store, one for each process that uses it: connections pass,
//! say nothing any more, or break.

use std::net::SocketAddr;
use std::path::PathBuf;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;

/// How a proxy treats connections; the later is the worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// They pass.
    Open,
    /// They stand, new ones are taken, and nothing comes through until the way is open again.
    Silent,
    /// They break, and new ones at once.
    Shut,
}

/// What a proxy leads to.
#[derive(Clone, Debug)]
pub enum Upstream {
    /// An address.
    Tcp(SocketAddr),
    /// A socket in a folder.
    Unix(PathBuf),
}

#[derive(Clone, Copy)]
struct State {
    way: Way,
    /// How often connections have been broken: one that was there before is to end.
    cuts: u64,
}

/// See the module. Ends with its runtime.
pub struct Proxy {
    /// Where it listens.
    pub address: SocketAddr,
    state: watch::Sender<State>,
}

impl Proxy {
    /// Listens on a free port.
    pub async fn start(upstream: Upstream) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (state, watched) = watch::channel(State { way: Way::Open, cuts: 0 });
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                tokio::spawn(connection(client, upstream.clone(), watched.clone()));
            }
        });
        Self { address, state }
    }

    /// Changes how connections are treated.
    pub fn set(&self, way: Way) {
        self.state.send_modify(|state| {
            state.cuts += u64::from(way == Way::Shut && state.way != Way::Shut);
            state.way = way;
        });
    }
}

async fn connection(client: TcpStream, upstream: Upstream, mut state: watch::Receiver<State>) {
    let cuts = {
        let state = state.borrow_and_update();
        if state.way == Way::Shut {
            return;
        }
        state.cuts
    };
    let cut = state.clone();
    let served = async move {
        opened(&mut state).await;
        // A server that is away just now: the connection breaks.
        match upstream {
            Upstream::Tcp(address) => match TcpStream::connect(address).await {
                Ok(server) => both_ways(client, server, state).await,
                Err(_) => drop(client),
            },
            Upstream::Unix(path) => match UnixStream::connect(path).await {
                Ok(server) => both_ways(client, server, state).await,
                Err(_) => drop(client),
            },
        }
    };
    tokio::select! {
        () = served => {}
        () = was_cut(cut, cuts) => {}
    }
}

async fn opened(state: &mut watch::Receiver<State>) {
    let gone = state.wait_for(|state| state.way == Way::Open).await.is_err();
    assert!(!gone, "a proxy outlives its connections");
}

async fn was_cut(mut state: watch::Receiver<State>, cuts: u64) {
    let _ = state.wait_for(|state| state.cuts != cuts).await;
}

/// Until either side ends.
async fn both_ways<S>(client: TcpStream, server: S, state: watch::Receiver<State>)
where
    S: AsyncRead + AsyncWrite,
{
    let _ = client.set_nodelay(true);
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = tokio::io::split(server);
    tokio::select! {
        () = pump(from_client, to_server, state.clone()) => {}
        () = pump(from_server, to_client, state.clone()) => {}
    }
}

async fn pump<R, W>(mut from: R, mut to: W, mut state: watch::Receiver<State>)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let Ok(read) = from.read(&mut buffer).await else { return };
        opened(&mut state).await;
        if read == 0 || to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    const SHORT: Duration = Duration::from_millis(100);

    /// A server that sends back what it gets.
    async fn echo() -> Upstream {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        Upstream::Tcp(address)
    }

    #[tokio::test]
    async fn connections_pass_wait_and_break() {
        let proxy = Proxy::start(echo().await).await;
        let mut stream = TcpStream::connect(proxy.address).await.unwrap();
        let mut byte = [0];
        stream.write_all(b"a").await.unwrap();
        stream.read_exact(&mut byte).await.unwrap();
        assert_eq!(&byte, b"a");

        proxy.set(Way::Silent);
        stream.write_all(b"b").await.unwrap();
        assert!(timeout(SHORT, stream.read(&mut byte)).await.is_err(), "nothing passes");
        proxy.set(Way::Open);
        stream.read_exact(&mut byte).await.unwrap();
        assert_eq!(&byte, b"b");

        proxy.set(Way::Shut);
        assert!(matches!(stream.read(&mut byte).await, Ok(0) | Err(_)), "broken");
        let mut early = TcpStream::connect(proxy.address).await.unwrap();
        assert!(matches!(early.read(&mut byte).await, Ok(0) | Err(_)), "broken at once");
        proxy.set(Way::Open);
        let mut late = TcpStream::connect(proxy.address).await.unwrap();
        late.write_all(b"c").await.unwrap();
        late.read_exact(&mut byte).await.unwrap();
        assert_eq!(&byte, b"c");
    }
}
