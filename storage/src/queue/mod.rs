//! The queue between gateways and workers: inboxes, control, token messages, presence. One trait;
//! in one process or over Redis, with the same messages. Everything is bounded.

mod local;
mod local_inbox;
pub mod message;
mod redis;

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};

pub use self::redis::{RedisOptions, RedisQueue};
pub use local::{LocalQueue, QueueLimits};
use message::{Request, ToWorker, TokenMessage, WorkerPresence};
use tokio::sync::oneshot;

/// Outcome of placing a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// In the worker's inbox.
    Accepted,
    /// The inbox is full: try the next worker.
    Full,
    /// No such worker.
    Gone,
}

/// Outcome of a control message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Controlled {
    /// On its way; also when what it cancels was still waiting in the inbox and is now removed.
    Sent,
    /// No such worker.
    Gone,
}

/// Outcome of a token message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// The gateway will read it.
    Delivered,
    /// The gateway reads too slowly and the message is lost: it will see the gap in the sequence
    /// and place its requests again.
    Dropped,
    /// No such gateway: drop its requests.
    GatewayGone,
}

/// Moves messages between gateways and workers.
#[async_trait]
pub trait Queue: Send + Sync + 'static {
    /// Puts a request into a worker's inbox; never waits for room.
    async fn place(&self, worker_id: &str, request: Request) -> crate::Result<Placed>;

    /// Sends a control message past the requests; never lost to a full inbox (it waits instead).
    /// A cancel of a request that still waits in the inbox removes it: the worker sees neither.
    async fn control(&self, worker_id: &str, message: ToWorker) -> crate::Result<Controlled>;

    /// Tells every worker that a job's row changed.
    async fn nudge_job(&self, job_id: &str) -> crate::Result<()>;

    /// The workers alive, by id.
    async fn workers(&self) -> crate::Result<Vec<WorkerPresence>>;

    /// The workers alive as this process saw them within the last second, with what it has placed
    /// on them since: for a choice that [`Queue::place`] judges. It costs no call where somebody
    /// asks for [`Queue::workers`] regularly.
    async fn workers_lately(&self) -> crate::Result<Arc<Vec<WorkerPresence>>> {
        self.workers().await.map(Arc::new)
    }

    /// Announces a gateway and opens its stream of token messages; dropping the receiver ends its
    /// presence. A second receiver for one id ends the first.
    async fn gateway_tokens(&self, gateway_id: &str) -> crate::Result<TokenReceiver>;

    /// Announces a worker and opens its inbox; dropping the inbox ends its presence, and what
    /// waited in it is gone (gateways see the presence go and place again). A second inbox for one
    /// id ends the first.
    async fn open_inbox(&self, presence: WorkerPresence) -> crate::Result<Inbox>;

    /// Updates a worker's presence. Ignored if it has no inbox, or one of another incarnation.
    async fn refresh(&self, presence: WorkerPresence) -> crate::Result<()>;

    /// Sends a token message; waits a little for a slow gateway.
    async fn publish(&self, gateway_id: &str, message: TokenMessage) -> crate::Result<Delivered>;

    /// The gateways alive, by id.
    async fn gateways(&self) -> crate::Result<Vec<String>>;
}

/// What a gateway receives.
#[derive(Clone, Debug, PartialEq)]
pub enum Received {
    /// A token message.
    Message(TokenMessage),
    /// The gateway's presence had run out or was lost, and messages, requests that waited in
    /// inboxes and running ones may have been lost with it: every request must be placed again,
    /// and sequences begin anew.
    Lost,
}

/// A gateway's stream of token messages. Dropping it ends the gateway's presence.
pub struct TokenReceiver {
    messages: BoxStream<'static, Received>,
}

impl TokenReceiver {
    /// The next message; None once another receiver took over this gateway's id. Nothing is lost
    /// when the wait is given up.
    pub async fn recv(&mut self) -> Option<Received> {
        self.messages.next().await
    }
}

impl fmt::Debug for TokenReceiver {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("TokenReceiver").finish_non_exhaustive()
    }
}

/// A worker's inbox. Dropping it ends the worker's presence.
pub struct Inbox {
    messages: BoxStream<'static, ToWorker>,
    /// Comes, or is dropped, when the presence is taken back.
    closed: Option<oneshot::Receiver<()>>,
}

impl Inbox {
    /// The next message, control before requests; None once another inbox took over this id.
    /// Nothing is lost when the wait is given up.
    pub async fn recv(&mut self) -> Option<ToWorker> {
        self.messages.next().await
    }

    /// Ends the worker's presence and waits until nobody sees it any more, or the queue is away
    /// and it runs out.
    pub async fn close(self) {
        let Self { messages, closed } = self;
        drop(messages);
        if let Some(closed) = closed {
            // A dropped sender says the same.
            let _ = closed.await;
        }
    }

    /// The next message if one lies in this process: over Redis none may, where
    /// [`Inbox::recv`] would find one.
    pub fn try_recv(&mut self) -> Option<ToWorker> {
        self.recv().now_or_never().flatten()
    }
}

impl fmt::Debug for Inbox {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Inbox").finish_non_exhaustive()
    }
}
