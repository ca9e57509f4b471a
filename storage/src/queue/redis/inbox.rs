//! The worker's end of an inbox, and the presence kept while it is open.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{StreamExt, stream};
use redis::aio::MultiplexedConnection;
use redis::{Script, ScriptInvocation};
use tokio::sync::{oneshot, watch};
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::link::Outage;
use super::{Shared, envelope, keys, millis, scripts};
use crate::Result;
use crate::ids::alphanumerics;
use crate::queue::Inbox;
use crate::queue::message::{Request, ToWorker, WorkerPresence};

/// How long one wait for the bell is; a bell lost with a connection costs no more.
const BELL_WAIT: Duration = Duration::from_secs(2);

/// Before the next try after a failed one.
const PAUSE: Duration = Duration::from_millis(100);

/// An open inbox of this process.
#[derive(Debug)]
pub(super) struct Lease {
    worker_id: String,
    token: String,
    presence: Mutex<WorkerPresence>,
    /// True once another inbox has this id.
    ended: watch::Sender<bool>,
}

impl Lease {
    fn presence(&self) -> MutexGuard<'_, WorkerPresence> {
        self.presence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a newer presence of the same incarnation; false for another's.
    pub(super) fn update(&self, presence: WorkerPresence) -> bool {
        let mut current = self.presence();
        let same = current.incarnation == presence.incarnation;
        if same {
            *current = presence;
        }
        same
    }

    /// Tells the server that the worker lives.
    pub(super) async fn keep(&self, shared: &Shared) -> Result<()> {
        if *self.ended.borrow() {
            return Ok(());
        }
        let call = self.announcement(shared, &scripts::KEEP_WORKER)?;
        let kept: bool = shared.link.run(&call).await?;
        if !kept {
            self.ended.send_replace(true);
        }
        Ok(())
    }

    fn announcement<'a>(
        &self,
        shared: &Shared,
        script: &'a Script,
    ) -> Result<ScriptInvocation<'a>> {
        let presence = envelope::seal(&*self.presence())?;
        let limits = &shared.options.limits;
        let mut call = self.named(shared, script);
        call.arg(presence).arg(limits.inbox_requests).arg(limits.inbox_controls);
        call.arg(shared.expiry_ms()).arg(millis(keys::LINGER));
        Ok(call)
    }

    fn named<'a>(&self, shared: &Shared, script: &'a Script) -> ScriptInvocation<'a> {
        let keys = &shared.keys;
        let mut call = script.prepare_invoke();
        call.key(keys.workers()).key(keys.worker(&self.worker_id));
        call.key(keys.inbox_stem(&self.worker_id)).arg(&self.worker_id).arg(&self.token);
        call
    }
}

/// Opens the inbox of a worker.
pub(super) async fn open(shared: &Arc<Shared>, presence: WorkerPresence) -> Result<Inbox> {
    let lease = Arc::new(Lease {
        worker_id: presence.worker_id.clone(),
        token: alphanumerics(16),
        presence: Mutex::new(presence),
        ended: watch::Sender::new(false),
    });
    let call = lease.announcement(shared, &scripts::OPEN_INBOX)?;
    shared.link.run::<()>(&call).await?;
    let before = shared.inboxes().insert(lease.worker_id.clone(), Arc::clone(&lease));
    if let Some(before) = before {
        before.ended.send_replace(true);
    }
    let (alive, dropped) = oneshot::channel();
    let (taken_back, closed) = oneshot::channel();
    let keep = keep_presence(Arc::clone(shared), Arc::clone(&lease), dropped);
    tokio::spawn(async move {
        keep.await;
        // Nobody need wait for it.
        let _ = taken_back.send(());
    });
    let reader = Reader {
        shared: Arc::clone(shared),
        ended: lease.ended.subscribe(),
        lease,
        bell: None,
        taken: 0,
        outage: Outage::default(),
        _alive: alive,
    };
    let messages = stream::unfold(reader, |mut reader| async {
        let message = reader.next().await?;
        Some((message, reader))
    });
    Ok(Inbox { messages: messages.boxed(), closed: Some(closed) })
}

/// Keeps a worker's presence until its inbox is dropped or another has its id.
async fn keep_presence(
    shared: Arc<Shared>,
    lease: Arc<Lease>,
    mut dropped: oneshot::Receiver<Infallible>,
) {
    const WHAT: &str = "keeping a worker's presence in Redis";
    let mut outage = Outage::default();
    let mut ended = lease.ended.subscribe();
    let mut beats = interval(shared.beat());
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !*ended.borrow_and_update() {
        tokio::select! {
            _ = &mut dropped => break,
            _ = ended.changed() => {}
            _ = beats.tick() => match lease.keep(&shared).await {
                Ok(()) => outage.succeeded(WHAT),
                Err(error) => outage.failed(WHAT, &error),
            },
        }
    }
    {
        let mut inboxes = shared.inboxes();
        if inboxes.get(&lease.worker_id).is_some_and(|current| Arc::ptr_eq(current, &lease)) {
            inboxes.remove(&lease.worker_id);
        }
    }
    if let Err(error) = shared.link.run::<()>(&lease.named(&shared, &scripts::CLOSE_INBOX)).await {
        tracing::warn!(%error, "a worker's presence was not taken back; it runs out");
    }
}

/// What the worker reads with.
struct Reader {
    shared: Arc<Shared>,
    lease: Arc<Lease>,
    ended: watch::Receiver<bool>,
    /// Its own connection, on which it waits.
    bell: Option<MultiplexedConnection>,
    /// Messages taken: the number of the next.
    taken: u64,
    outage: Outage,
    /// Dropped with the inbox.
    _alive: oneshot::Sender<Infallible>,
}

/// Outcome of one look into the inbox.
enum Taken {
    Control(String),
    Request(String),
    Nothing,
    Ended,
}

impl Reader {
    async fn next(&mut self) -> Option<ToWorker> {
        const WHAT: &str = "reading a worker's inbox in Redis";
        loop {
            if *self.ended.borrow_and_update() {
                return None;
            }
            let looked = match self.take().await {
                Ok(Taken::Ended) => {
                    self.lease.ended.send_replace(true);
                    return None;
                }
                Ok(Taken::Nothing) => self.wait().await,
                Ok(Taken::Control(text)) => match self.opened(envelope::open(&text)) {
                    Some(message) => return Some(message),
                    None => continue,
                },
                Ok(Taken::Request(text)) => {
                    match self.opened(envelope::open::<Box<Request>>(&text)) {
                        Some(request) => return Some(ToWorker::Place(request)),
                        None => continue,
                    }
                }
                Err(error) => Err(error),
            };
            match looked {
                Ok(()) => self.outage.succeeded(WHAT),
                Err(error) => {
                    self.outage.failed(WHAT, &error);
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// Counts what was taken. Placement respects the versions in presence, so what cannot be read
    /// is a fault of a sender.
    fn opened<T>(&mut self, message: Result<T>) -> Option<T> {
        self.taken += 1;
        message
            .inspect_err(|error| tracing::error!(%error, "what came to the inbox is dropped"))
            .ok()
    }

    async fn take(&self) -> Result<Taken> {
        let keys = &self.shared.keys;
        let id = &self.lease.worker_id;
        let mut call = scripts::TAKE.prepare_invoke();
        call.key(keys.worker(id)).key(keys.inbox_stem(id));
        call.arg(&self.lease.token).arg(self.taken).arg(millis(keys::LINGER));
        let answer: Vec<String> = self.shared.link.run(&call).await?;
        let Ok([kind, body]) = <[String; 2]>::try_from(answer) else { return Ok(Taken::Ended) };
        Ok(match kind.as_str() {
            "c" => Taken::Control(body),
            "r" => Taken::Request(body),
            _ => Taken::Nothing,
        })
    }

    /// Waits for the bell, or a little.
    async fn wait(&mut self) -> Result<()> {
        let Self { shared, lease, ended, bell, .. } = self;
        let mut connection = match bell.take() {
            Some(connection) => connection,
            None => shared.link.connect_reader(BELL_WAIT).await?,
        };
        let mut pop = redis::cmd("BLPOP");
        pop.arg(shared.keys.bell(&lease.worker_id, &lease.token)).arg(BELL_WAIT.as_secs());
        tokio::select! {
            // The connection goes with the wait that is given up.
            _ = ended.changed() => return Ok(()),
            rung = pop.query_async::<Option<(String, String)>>(&mut connection) => rung?,
        };
        *bell = Some(connection);
        Ok(())
    }
}
