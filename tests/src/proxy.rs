//! A TCP proxy before a server, for outages: connections pass, say nothing any more, or break; and
//! a filter may meddle with single ones.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;

/// Bytes that are passed on at once.
const PIECE: usize = 16 * 1024;

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
    /// `host:port`.
    Tcp(String),
    /// A socket in a folder.
    Unix(PathBuf),
}

impl From<&str> for Upstream {
    fn from(address: &str) -> Self {
        Self::Tcp(address.to_owned())
    }
}

impl From<SocketAddr> for Upstream {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address.to_string())
    }
}

/// What becomes of a piece of what passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It passes.
    Pass,
    /// It is lost, and its connection breaks.
    Break,
    /// The client gets these bytes in its place, and the connection ends.
    Answer(Vec<u8>),
}

/// Sees all that passes, each connection by its number. By default it lets everything pass.
pub trait Filter: Send + Sync + 'static {
    /// A piece on its way to the server.
    fn asked(&self, _connection: u64, _piece: &[u8]) -> Fate {
        Fate::Pass
    }

    /// A piece on its way to the client.
    fn answered(&self, _connection: u64, _piece: &[u8]) -> Fate {
        Fate::Pass
    }
}

/// Lets everything pass.
impl Filter for () {}

#[derive(Clone, Copy)]
struct State {
    way: Way,
    /// How often connections have been broken: one that was there before is to end.
    cuts: u64,
}

/// See the module. Ends with its runtime.
#[derive(Clone)]
pub struct Proxy {
    /// Where it listens: `host:port`.
    pub address: String,
    state: watch::Sender<State>,
}

impl Proxy {
    /// An open way, from a free port.
    pub async fn start(upstream: impl Into<Upstream>) -> Self {
        Self::filtered(upstream, Arc::new(())).await
    }

    /// The same, under the eyes of a filter.
    pub async fn filtered(upstream: impl Into<Upstream>, filter: Arc<dyn Filter>) -> Self {
        let upstream = upstream.into();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (state, watched) = watch::channel(State { way: Way::Open, cuts: 0 });
        tokio::spawn(async move {
            for number in 0.. {
                let (client, _) = listener.accept().await.unwrap();
                let eye = Eye { filter: filter.clone(), number };
                tokio::spawn(connection(client, upstream.clone(), watched.clone(), eye));
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

    /// Breaks the connections that there are, as a server that restarts does.
    pub fn cut(&self) {
        self.state.send_modify(|state| state.cuts += 1);
    }
}

/// The filter of one connection.
struct Eye {
    filter: Arc<dyn Filter>,
    number: u64,
}

async fn connection(
    client: TcpStream,
    upstream: Upstream,
    mut state: watch::Receiver<State>,
    eye: Eye,
) {
    let cuts = {
        let state = state.borrow_and_update();
        if state.way == Way::Shut {
            return;
        }
        state.cuts
    };
    let cut = state.clone();
    let served = async move {
        if !opened(&mut state).await {
            return;
        }
        // A server that is away just now: the connection breaks.
        match upstream {
            Upstream::Tcp(address) => match TcpStream::connect(address).await {
                Ok(server) => {
                    let _ = server.set_nodelay(true);
                    both_ways(client, server, state, eye).await;
                }
                Err(_) => drop(client),
            },
            Upstream::Unix(path) => match UnixStream::connect(path).await {
                Ok(server) => both_ways(client, server, state, eye).await,
                Err(_) => drop(client),
            },
        }
    };
    tokio::select! {
        () = served => {}
        () = was_cut(cut, cuts) => {}
    }
}

/// Waits until the way is open; false where there is no proxy any more.
async fn opened(state: &mut watch::Receiver<State>) -> bool {
    state.wait_for(|state| state.way == Way::Open).await.is_ok()
}

async fn was_cut(mut state: watch::Receiver<State>, cuts: u64) {
    let _ = state.wait_for(|state| state.cuts != cuts).await;
}

/// Until either side ends.
async fn both_ways<S>(client: TcpStream, server: S, state: watch::Receiver<State>, eye: Eye)
where
    S: AsyncRead + AsyncWrite,
{
    let _ = client.set_nodelay(true);
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = tokio::io::split(server);
    let Eye { filter, number } = &eye;
    let asked = |piece: &[u8]| filter.asked(*number, piece);
    let answered = |piece: &[u8]| filter.answered(*number, piece);
    let last = tokio::select! {
        last = pump(&mut from_client, &mut to_server, state.clone(), asked) => last,
        last = pump(&mut from_server, &mut to_client, state.clone(), answered) => last,
    };
    let _ = to_client.write_all(&last).await;
}

/// Passes on what may pass, until the end; what the client is to be told in place of the rest.
async fn pump<R, W>(
    from: &mut R,
    to: &mut W,
    mut state: watch::Receiver<State>,
    fate: impl Fn(&[u8]) -> Fate,
) -> Vec<u8>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut buffer = vec![0; PIECE];
    loop {
        let Ok(read) = from.read(&mut buffer).await else { return Vec::new() };
        if !opened(&mut state).await || read == 0 {
            return Vec::new();
        }
        match fate(&buffer[..read]) {
            Fate::Pass => {}
            Fate::Break => return Vec::new(),
            Fate::Answer(bytes) => return bytes,
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return Vec::new();
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
        address.into()
    }

    /// What comes back of a byte; nothing where the connection is broken.
    async fn sent(stream: &mut TcpStream, byte: u8) -> Option<u8> {
        stream.write_all(&[byte]).await.ok()?;
        let mut back = [0];
        let read = timeout(Duration::from_secs(5), stream.read(&mut back)).await.expect("in time");
        (read.ok()? == 1).then_some(back[0])
    }

    #[tokio::test]
    async fn connections_pass_wait_and_break() {
        let proxy = Proxy::start(echo().await).await;
        let mut stream = TcpStream::connect(&proxy.address).await.unwrap();
        assert_eq!(sent(&mut stream, b'a').await, Some(b'a'));

        proxy.set(Way::Silent);
        let mut byte = [0];
        stream.write_all(b"b").await.unwrap();
        assert!(timeout(SHORT, stream.read(&mut byte)).await.is_err(), "nothing passes");
        proxy.set(Way::Open);
        stream.read_exact(&mut byte).await.unwrap();
        assert_eq!(&byte, b"b");

        proxy.set(Way::Shut);
        assert!(matches!(stream.read(&mut byte).await, Ok(0) | Err(_)), "broken");
        let mut early = TcpStream::connect(&proxy.address).await.unwrap();
        assert!(matches!(early.read(&mut byte).await, Ok(0) | Err(_)), "broken at once");
        proxy.set(Way::Open);
        let mut late = TcpStream::connect(&proxy.address).await.unwrap();
        assert_eq!(sent(&mut late, b'c').await, Some(b'c'));
    }

    #[tokio::test]
    async fn a_cut_breaks_what_is_there_and_nothing_else() {
        let proxy = Proxy::start(echo().await).await;
        let mut stream = TcpStream::connect(&proxy.address).await.unwrap();
        assert_eq!(sent(&mut stream, b'a').await, Some(b'a'));
        proxy.cut();
        assert!(matches!(stream.read(&mut [0]).await, Ok(0) | Err(_)), "broken");
        let mut next = TcpStream::connect(&proxy.address).await.unwrap();
        assert_eq!(sent(&mut next, b'b').await, Some(b'b'));
    }

    /// Answers questions itself, and loses an answer.
    struct Meddler;

    impl Filter for Meddler {
        fn asked(&self, connection: u64, piece: &[u8]) -> Fate {
            match piece {
                b"?" => Fate::Answer(vec![b'0' + connection as u8]),
                _ => Fate::Pass,
            }
        }

        fn answered(&self, _connection: u64, piece: &[u8]) -> Fate {
            if piece == b"!" { Fate::Break } else { Fate::Pass }
        }
    }

    #[tokio::test]
    async fn a_filter_answers_and_breaks() {
        let proxy = Proxy::filtered(echo().await, Arc::new(Meddler)).await;
        let mut first = TcpStream::connect(&proxy.address).await.unwrap();
        assert_eq!(sent(&mut first, b'a').await, Some(b'a'));
        assert_eq!(sent(&mut first, b'!').await, None);
        let mut second = TcpStream::connect(&proxy.address).await.unwrap();
        assert_eq!(sent(&mut second, b'?').await, Some(b'1'));
        assert_eq!(sent(&mut second, b'a').await, None, "it ended with that");
    }
}
