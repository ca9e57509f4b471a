//! The queue over Redis: any number of gateway and worker processes, which share nothing else of
//! it. What the keys are is in [`keys`], every change in [`scripts`].
//!
//! - A request or control message lies in lists until the worker takes it. The worker waits with a
//!   blocking pop on a bell beside them, on a connection of its own: a bell that is lost costs a
//!   wait of seconds at most, a message is never lost with a connection, since the last one taken
//!   is kept until the next is asked for.
//! - Token messages lie in a bounded stream per gateway, read with a blocking read on a connection
//!   of its own, and removed once read. Nothing goes by pub/sub, which loses what nobody hears.
//! - Presence is a key that runs out. The process that opened an inbox or a stream keeps it, and
//!   makes it anew where it is gone: after a restart that lost everything, workers and gateways
//!   are back by their next beat. A gateway whose key was gone says so to its reader
//!   ([`Received::Lost`](super::Received::Lost)): what was under way may be lost too.
//! - Every call is tried again for [`RedisOptions::call_limit`], then it is
//!   [`Error::QueueAway`](crate::Error::QueueAway). A token message is tried for a second longer
//!   than presence lasts: one that is given up is one whose sender or gateway has been seen gone,
//!   so that no request waits for it. Receiving waits as long as it takes.
//!
//! Needs Redis 6.2 or what speaks like it; no cluster. Bounds are those of the reading side.

mod envelope;
mod inbox;
mod keys;
mod link;
mod picture;
mod scripts;
mod tokens;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::redis::{Script, ScriptInvocation};
use async_trait::async_trait;
use futures::future::join_all;
use tokio::time::{Instant, sleep};

use self::inbox::Lease;
use self::keys::Keys;
use self::link::Link;
use self::picture::Picture;
use super::message::{Request, ToWorker, TokenMessage, WorkerPresence};
use super::{Controlled, Delivered, Inbox, Placed, Queue, QueueLimits, TokenReceiver};
use crate::Result;

/// Between two looks whether there is room.
const FIRST_LOOK: Duration = Duration::from_millis(1);
const LONGEST_LOOK: Duration = Duration::from_millis(25);

/// Within which whoever watches presence sees that one has run out.
const SEEN_GONE: Duration = Duration::from_secs(1);

/// How Redis is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisOptions {
    /// Of every key; processes with another prefix are another system.
    pub prefix: String,
    /// Bounds of the inboxes and streams this process reads.
    pub limits: QueueLimits,
    /// How long a worker or gateway that gives no sign of life counts as alive; it gives one four
    /// times as often.
    pub presence_expiry: Duration,
    /// For one call with all its tries.
    pub call_limit: Duration,
}

impl Default for RedisOptions {
    fn default() -> Self {
        Self {
            prefix: "loquetier".to_owned(),
            limits: QueueLimits::default(),
            presence_expiry: Duration::from_secs(3),
            call_limit: Duration::from_secs(2),
        }
    }
}

/// The queue over Redis. Cheap to clone; needs the tokio runtime it is used on to outlive what it
/// opened.
#[derive(Clone, Debug)]
pub struct RedisQueue {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    link: Link,
    keys: Keys,
    options: RedisOptions,
    /// Inboxes opened here, by worker id.
    inboxes: Mutex<HashMap<String, Arc<Lease>>>,
    /// Presence as it was read last.
    picture: Picture,
}

impl Shared {
    fn inboxes(&self) -> MutexGuard<'_, HashMap<String, Arc<Lease>>> {
        self.inboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time between two signs of life.
    fn beat(&self) -> Duration {
        self.options.presence_expiry / 4
    }

    /// The expiry of presence in milliseconds.
    fn expiry_ms(&self) -> u64 {
        millis(self.options.presence_expiry)
    }

    /// The ids alive in a set.
    async fn alive(&self, set: String, stem: String) -> Result<Vec<String>> {
        let mut ids: Vec<String> =
            self.link.run(scripts::ALIVE.prepare_invoke().key(set).arg(stem)).await?;
        ids.sort_unstable();
        Ok(ids)
    }
}

/// A whole number of milliseconds, at least 1: Redis refuses an expiry of 0.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).max(1)
}

/// What [`scripts::PLACE`], [`scripts::CONTROL`] and [`scripts::PUBLISH`] answer.
const GONE: u8 = 0;
const DONE: u8 = 1;

impl RedisQueue {
    /// Connects to `redis://[user:password@]host[:port][/database]`, by `rediss://…` with TLS to a
    /// server that the system's certificates vouch for (`SSL_CERT_FILE` names others), or to a Unix
    /// socket by `redis+unix:///path`. [`Error::QueueAway`](crate::Error::QueueAway) where nobody answers.
    pub async fn connect(url: &str, options: RedisOptions) -> Result<Self> {
        let link = Link::new(url, options.call_limit)?;
        let keys = Keys::new(&options.prefix);
        let (inboxes, picture) = (Mutex::default(), Picture::default());
        let queue = Self { shared: Arc::new(Shared { link, keys, options, inboxes, picture }) };
        queue.gateways().await?;
        Ok(queue)
    }

    /// Runs a script, each time for `limit` at most, until it finds room or its addressee gone, or
    /// `patience` ends: then None.
    async fn until_room(
        &self,
        script: &ScriptInvocation<'_>,
        limit: Duration,
        patience: Option<Duration>,
    ) -> Result<Option<u8>> {
        let end = patience.map(|patience| Instant::now() + patience);
        let mut pause = FIRST_LOOK;
        loop {
            let answer: u8 = self.shared.link.run_for(limit, script).await?;
            if answer == GONE || answer == DONE {
                return Ok(Some(answer));
            }
            if end.is_some_and(|end| Instant::now() >= end) {
                return Ok(None);
            }
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_LOOK);
        }
    }

    /// A call about one worker's inbox.
    fn to_worker<'a>(&self, script: &'a Script, worker_id: &str) -> ScriptInvocation<'a> {
        let keys = &self.shared.keys;
        let mut call = script.prepare_invoke();
        call.key(keys.worker(worker_id)).key(keys.inbox_stem(worker_id));
        call
    }
}

#[async_trait]
impl Queue for RedisQueue {
    async fn place(&self, worker_id: &str, request: Request) -> Result<Placed> {
        let body = envelope::seal(&request)?;
        let mut call = self.to_worker(&scripts::PLACE, worker_id);
        call.arg(format!("{}:{}", request.attempt, request.request_id));
        call.arg(body).arg(millis(keys::LINGER)).arg(millis(keys::SEEN));
        Ok(match self.shared.link.run::<u8>(&call).await? {
            GONE => {
                self.shared.picture.forget();
                Placed::Gone
            }
            DONE => {
                self.shared.picture.placed(worker_id);
                Placed::Accepted
            }
            _ => Placed::Full,
        })
    }

    async fn control(&self, worker_id: &str, message: ToWorker) -> Result<Controlled> {
        let mut call = self.to_worker(&scripts::CONTROL, worker_id);
        call.arg(envelope::seal(&message)?);
        let (request_id, attempt) = match &message {
            ToWorker::Cancel { request_id, attempt } => (request_id.as_str(), *attempt),
            _ => ("", 0),
        };
        call.arg(request_id).arg(millis(keys::LINGER)).arg(attempt);
        Ok(match self.until_room(&call, self.shared.options.call_limit, None).await? {
            Some(GONE) => Controlled::Gone,
            _ => Controlled::Sent,
        })
    }

    async fn nudge_job(&self, job_id: &str) -> Result<()> {
        let keys = &self.shared.keys;
        let workers = self.shared.alive(keys.workers(), keys.worker_stem()).await?;
        let nudges = workers
            .iter()
            .map(|worker| self.control(worker, ToWorker::JobNudge { job_id: job_id.to_owned() }));
        // A worker that went meanwhile needs no nudge.
        join_all(nudges).await.into_iter().try_for_each(|sent| sent.map(|_| ()))
    }

    async fn workers(&self) -> Result<Vec<WorkerPresence>> {
        let asked = Instant::now();
        let keys = &self.shared.keys;
        let mut call = scripts::WORKERS.prepare_invoke();
        call.key(keys.workers()).arg(keys.worker_stem());
        let texts: Vec<String> = self.shared.link.run(&call).await?;
        let mut workers = Vec::with_capacity(texts.len());
        for text in texts {
            match envelope::open::<WorkerPresence>(&text) {
                Ok(presence) => workers.push(presence),
                // Of another release: this one cannot speak with it.
                Err(error) => tracing::debug!(%error, "the presence of a worker is not readable"),
            }
        }
        workers.sort_by(|a, b| a.worker_id.cmp(&b.worker_id));
        self.shared.picture.show(asked, workers.clone());
        Ok(workers)
    }

    async fn workers_lately(&self) -> Result<Arc<Vec<WorkerPresence>>> {
        match self.shared.picture.recent(Instant::now()) {
            Some(workers) => Ok(workers),
            None => self.workers().await.map(Arc::new),
        }
    }

    async fn gateway_tokens(&self, gateway_id: &str) -> Result<TokenReceiver> {
        tokens::open(&self.shared, gateway_id).await
    }

    async fn open_inbox(&self, presence: WorkerPresence) -> Result<Inbox> {
        inbox::open(&self.shared, presence).await
    }

    async fn refresh(&self, presence: WorkerPresence) -> Result<()> {
        let lease = self.shared.inboxes().get(&presence.worker_id).map(Arc::clone);
        match lease {
            Some(lease) if lease.update(presence) => lease.keep(&self.shared).await,
            _ => Ok(()),
        }
    }

    async fn publish(&self, gateway_id: &str, message: TokenMessage) -> Result<Delivered> {
        let keys = &self.shared.keys;
        let mut call = scripts::PUBLISH.prepare_invoke();
        call.key(keys.gateway(gateway_id)).key(keys.tokens_stem(gateway_id));
        call.arg(envelope::seal(&message)?).arg(millis(keys::LINGER));
        let options = &self.shared.options;
        let limit = options.call_limit.max(options.presence_expiry + SEEN_GONE);
        let patience = options.limits.publish_patience;
        Ok(match self.until_room(&call, limit, Some(patience)).await? {
            Some(GONE) => Delivered::GatewayGone,
            Some(_) => Delivered::Delivered,
            None => Delivered::Dropped,
        })
    }

    async fn gateways(&self) -> Result<Vec<String>> {
        let keys = &self.shared.keys;
        self.shared.alive(keys.gateways(), keys.gateway_stem()).await
    }
}
