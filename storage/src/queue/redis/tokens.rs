//! The gateway's end of its stream of token messages, and the presence kept while it is open.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use redis::aio::MultiplexedConnection;
use redis::streams::{StreamId, StreamReadReply};
use redis::{Script, ScriptInvocation};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::link::Outage;
use super::{Shared, envelope, keys, millis, scripts};
use crate::Result;
use crate::ids::alphanumerics;
use crate::queue::message::TokenMessage;
use crate::queue::{Received, TokenReceiver};

/// How long one blocking read waits.
const READ_WAIT: Duration = Duration::from_secs(2);

/// Messages per read at most.
const READ_MESSAGES: usize = 64;

/// Before the next try after a failed one.
const PAUSE: Duration = Duration::from_millis(100);

/// The token of the stream that counts; None once another receiver has this id.
type Standing = Option<String>;

/// Opens the stream of a gateway.
pub(super) async fn open(shared: &Arc<Shared>, gateway_id: &str) -> Result<TokenReceiver> {
    let token = alphanumerics(16);
    let call = announcement(shared, &scripts::OPEN_TOKENS, gateway_id, &token);
    shared.link.run::<()>(&call).await?;
    let (announce, standing) = watch::channel(Some(token.clone()));
    let (alive, dropped) = oneshot::channel();
    let keeper = Keeper { shared: Arc::clone(shared), gateway_id: gateway_id.to_owned(), announce };
    tokio::spawn(keeper.run(token.clone(), dropped));
    let reader = Reader {
        shared: Arc::clone(shared),
        gateway_id: gateway_id.to_owned(),
        token,
        cursor: "0-0".to_owned(),
        ready: VecDeque::new(),
        ended: false,
        standing,
        connection: None,
        trimming: None,
        outage: Outage::default(),
        _alive: alive,
    };
    let messages = stream::unfold(reader, |mut reader| async {
        let message = reader.next().await?;
        Some((message, reader))
    });
    Ok(TokenReceiver { messages: messages.boxed() })
}

fn named<'a>(
    shared: &Shared,
    script: &'a Script,
    gateway_id: &str,
    token: &str,
) -> ScriptInvocation<'a> {
    let keys = &shared.keys;
    let mut call = script.prepare_invoke();
    call.key(keys.gateways()).key(keys.gateway(gateway_id)).key(keys.tokens_stem(gateway_id));
    call.arg(gateway_id).arg(token);
    call
}

fn announcement<'a>(
    shared: &Shared,
    script: &'a Script,
    gateway_id: &str,
    token: &str,
) -> ScriptInvocation<'a> {
    let mut call = named(shared, script, gateway_id, token);
    call.arg(shared.options.limits.token_messages);
    call.arg(shared.expiry_ms()).arg(millis(keys::LINGER));
    call
}

/// Keeps a gateway's presence until its receiver is dropped or another has its id.
struct Keeper {
    shared: Arc<Shared>,
    gateway_id: String,
    announce: watch::Sender<Standing>,
}

impl Keeper {
    async fn run(self, mut token: String, mut dropped: oneshot::Receiver<Infallible>) {
        const WHAT: &str = "keeping a gateway's presence in Redis";
        let mut outage = Outage::default();
        let mut next_token = alphanumerics(16);
        let mut beats = interval(self.shared.beat());
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = &mut dropped => break,
                _ = beats.tick() => {}
            }
            match self.keep(&token, &next_token).await {
                Ok(Kept::AsBefore) => outage.succeeded(WHAT),
                Ok(Kept::Anew) => {
                    outage.succeeded(WHAT);
                    tracing::warn!("this gateway's presence was gone from Redis; it is back");
                    token = std::mem::replace(&mut next_token, alphanumerics(16));
                    self.announce.send_replace(Some(token.clone()));
                }
                Ok(Kept::Taken) => {
                    self.announce.send_replace(None);
                    return;
                }
                Err(error) => outage.failed(WHAT, &error),
            }
        }
        let call = named(&self.shared, &scripts::CLOSE_TOKENS, &self.gateway_id, &token);
        if let Err(error) = self.shared.link.run::<()>(&call).await {
            tracing::warn!(%error, "a gateway's presence was not taken back; it runs out");
        }
    }

    async fn keep(&self, token: &str, next_token: &str) -> Result<Kept> {
        let mut call = announcement(&self.shared, &scripts::KEEP_GATEWAY, &self.gateway_id, token);
        call.arg(next_token);
        Ok(match self.shared.link.run::<u8>(&call).await? {
            0 => Kept::Taken,
            1 => Kept::AsBefore,
            _ => Kept::Anew,
        })
    }
}

/// Outcome of one sign of life.
enum Kept {
    AsBefore,
    /// Presence was gone; a new stream counts.
    Anew,
    /// Another receiver has this id.
    Taken,
}

/// What the gateway reads with.
struct Reader {
    shared: Arc<Shared>,
    gateway_id: String,
    token: String,
    /// The last id read.
    cursor: String,
    ready: VecDeque<TokenMessage>,
    /// The last of the stream was read.
    ended: bool,
    standing: watch::Receiver<Standing>,
    /// Its own connection, on which it waits.
    connection: Option<MultiplexedConnection>,
    /// Frees the room of what was read.
    trimming: Option<JoinHandle<Result<()>>>,
    outage: Outage,
    /// Dropped with the receiver.
    _alive: oneshot::Sender<Infallible>,
}

impl Reader {
    async fn next(&mut self) -> Option<Received> {
        const WHAT: &str = "reading token messages from Redis";
        loop {
            if let Some(message) = self.ready.pop_front() {
                return Some(Received::Message(message));
            }
            if self.ended {
                return None;
            }
            let Some(token) = self.standing.borrow_and_update().clone() else {
                // What lies there was sent to this receiver; nothing more comes.
                let last = self.read(None).await;
                self.ended = self.ready.is_empty() || last.is_err();
                continue;
            };
            if token != self.token {
                self.token = token;
                self.cursor = "0-0".to_owned();
                self.connection = None;
                self.trimming = None;
                return Some(Received::Lost);
            }
            match self.read(Some(READ_WAIT)).await {
                Ok(()) => self.outage.succeeded(WHAT),
                Err(error) => {
                    self.outage.failed(WHAT, &error);
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// Reads the entries there are. Where there are none, waits for one, or until another stream
    /// counts, if it is to wait.
    async fn read(&mut self, wait: Option<Duration>) -> Result<()> {
        self.trimmed().await?;
        let Self { shared, standing, connection, .. } = self;
        let mut own = match connection.take() {
            Some(own) => own,
            None => shared.link.connect_reader(READ_WAIT).await?,
        };
        let mut read = redis::cmd("XREAD");
        read.arg("COUNT").arg(READ_MESSAGES);
        if let Some(wait) = wait {
            read.arg("BLOCK").arg(millis(wait));
        }
        read.arg("STREAMS").arg(shared.keys.tokens(&self.gateway_id, &self.token));
        read.arg(&self.cursor);
        let reply = tokio::select! {
            // The connection goes with the wait that is given up.
            _ = standing.changed(), if wait.is_some() => return Ok(()),
            reply = read.query_async::<Option<StreamReadReply>>(&mut own) => reply?,
        };
        self.connection = Some(own);
        let entries = reply.into_iter().flat_map(|reply| reply.keys).flat_map(|key| key.ids);
        let mut any = false;
        for entry in entries {
            self.receive(entry);
            any = true;
        }
        if any {
            let (shared, call) = (Arc::clone(&self.shared), self.trim());
            self.trimming = Some(tokio::spawn(async move { shared.link.run(&call).await }));
        }
        Ok(())
    }

    fn receive(&mut self, entry: StreamId) {
        if entry.contains_key("end") {
            self.ended = true;
        } else {
            let text: Option<String> = entry.get("m");
            match envelope::open(text.as_deref().unwrap_or_default()) {
                Ok(message) => self.ready.push_back(message),
                // The gap in the sequence tells the gateway.
                Err(error) => tracing::error!(%error, "a token message is dropped"),
            }
        }
        self.cursor = entry.id;
    }

    /// Sees to it that what was read before takes no room: a full stream that nobody trims would
    /// stay full.
    async fn trimmed(&mut self) -> Result<()> {
        let Some(trimming) = &mut self.trimming else { return Ok(()) };
        if !matches!(trimming.await, Ok(Ok(()))) {
            let call = self.trim();
            // Polled once it has ended, a task must not be waited for again.
            self.trimming = None;
            self.shared.link.run::<()>(&call).await?;
        }
        self.trimming = None;
        Ok(())
    }

    /// Removes all up to the last id read.
    fn trim(&self) -> ScriptInvocation<'static> {
        let mut call = scripts::TRIM.prepare_invoke();
        call.key(self.shared.keys.tokens(&self.gateway_id, &self.token));
        call.arg(after(&self.cursor));
        call
    }
}

/// The least id greater than this one.
fn after(id: &str) -> String {
    match id.split_once('-').and_then(|(time, number)| Some((time, number.parse::<u64>().ok()?))) {
        Some((time, number)) if number < u64::MAX => format!("{time}-{}", number + 1),
        _ => id.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::after;

    #[test]
    fn the_least_greater_id_keeps_the_time() {
        assert_eq!(after("1700-0"), "1700-1");
        assert_eq!(after("1700-41"), "1700-42");
        let last = format!("1700-{}", u64::MAX);
        assert_eq!(after(&last), last, "left for the next to remove");
    }
}
