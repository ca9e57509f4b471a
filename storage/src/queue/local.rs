//! The queue inside one process. Presence is the receiving end's life: no clock, no expiry.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::{StreamExt, stream};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::SendTimeoutError;

use super::local_inbox::{InboxEnd, InboxState};
use super::message::{Request, ToWorker, TokenMessage, WorkerPresence};
use super::{Controlled, Delivered, Inbox, Placed, Queue, Received, TokenReceiver};
use crate::Result;

/// Bounds of the in-process queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    /// Requests waiting per worker; a full inbox is a 503, so this is how many may wait for
    /// tokenisation (each holds its prompt in memory).
    pub inbox_requests: usize,
    /// Control messages waiting per worker; a cancel waits when it is full, so this only has to
    /// cover the requests a worker holds.
    pub inbox_controls: usize,
    /// Token messages waiting per gateway: worker steps a gateway may fall behind.
    pub token_messages: usize,
    /// How long a token message waits for a gateway that has fallen so far behind before it is
    /// lost; the worker's outlet waits with it.
    pub publish_patience: Duration,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self {
            inbox_requests: 256,
            inbox_controls: 1024,
            token_messages: 1024,
            publish_patience: Duration::from_secs(2),
        }
    }
}

/// The in-process queue. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct LocalQueue {
    shared: Arc<Shared>,
    limits: QueueLimits,
}

#[derive(Debug, Default)]
struct Shared {
    workers: Mutex<BTreeMap<String, Worker>>,
    gateways: Mutex<BTreeMap<String, mpsc::Sender<TokenMessage>>>,
}

#[derive(Debug)]
struct Worker {
    presence: WorkerPresence,
    inbox: Arc<InboxState>,
}

impl Shared {
    fn workers(&self) -> MutexGuard<'_, BTreeMap<String, Worker>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gateways(&self) -> MutexGuard<'_, BTreeMap<String, mpsc::Sender<TokenMessage>>> {
        self.gateways.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inbox_of(&self, worker_id: &str) -> Option<Arc<InboxState>> {
        self.workers().get(worker_id).map(|worker| Arc::clone(&worker.inbox))
    }
}

/// Ends a worker's presence when dropped, unless another inbox has taken its id over.
#[derive(Debug)]
struct WorkerEntry {
    shared: Arc<Shared>,
    worker_id: String,
    inbox: Arc<InboxState>,
}

impl Drop for WorkerEntry {
    fn drop(&mut self) {
        let mut workers = self.shared.workers();
        if workers
            .get(&self.worker_id)
            .is_some_and(|worker| Arc::ptr_eq(&worker.inbox, &self.inbox))
        {
            workers.remove(&self.worker_id);
        }
    }
}

/// Ends a gateway's presence when dropped, unless another receiver has taken its id over.
#[derive(Debug)]
struct GatewayPresence {
    shared: Arc<Shared>,
    gateway_id: String,
    sender: mpsc::WeakSender<TokenMessage>,
}

impl Drop for GatewayPresence {
    fn drop(&mut self) {
        let mut gateways = self.shared.gateways();
        let ours = self.sender.upgrade();
        if let (Some(current), Some(ours)) = (gateways.get(&self.gateway_id), &ours)
            && current.same_channel(ours)
        {
            gateways.remove(&self.gateway_id);
        }
    }
}

impl LocalQueue {
    /// An empty queue.
    pub fn new(limits: QueueLimits) -> Self {
        Self { shared: Arc::default(), limits }
    }
}

#[async_trait]
impl Queue for LocalQueue {
    async fn place(&self, worker_id: &str, request: Request) -> Result<Placed> {
        let inbox = self.shared.inbox_of(worker_id);
        Ok(inbox.map_or(Placed::Gone, |inbox| inbox.place(request)))
    }

    async fn control(&self, worker_id: &str, message: ToWorker) -> Result<Controlled> {
        match self.shared.inbox_of(worker_id) {
            Some(inbox) => Ok(inbox.control(message).await),
            None => Ok(Controlled::Gone),
        }
    }

    async fn nudge_job(&self, job_id: &str) -> Result<()> {
        let inboxes: Vec<_> =
            self.shared.workers().values().map(|worker| Arc::clone(&worker.inbox)).collect();
        for inbox in inboxes {
            // A worker that went meanwhile needs no nudge.
            inbox.control(ToWorker::JobNudge { job_id: job_id.to_owned() }).await;
        }
        Ok(())
    }

    async fn workers(&self) -> Result<Vec<WorkerPresence>> {
        Ok(self.shared.workers().values().map(|worker| worker.presence.clone()).collect())
    }

    async fn gateway_tokens(&self, gateway_id: &str) -> Result<TokenReceiver> {
        let (sender, messages) = mpsc::channel(self.limits.token_messages);
        let presence = GatewayPresence {
            shared: Arc::clone(&self.shared),
            gateway_id: gateway_id.to_owned(),
            sender: sender.downgrade(),
        };
        self.shared.gateways().insert(gateway_id.to_owned(), sender);
        let messages = stream::unfold((messages, presence), |(mut messages, presence)| async {
            let message = messages.recv().await?;
            Some((Received::Message(message), (messages, presence)))
        });
        Ok(TokenReceiver { messages: messages.boxed() })
    }

    async fn open_inbox(&self, presence: WorkerPresence) -> Result<Inbox> {
        let inbox = InboxState::new(self.limits.inbox_requests, self.limits.inbox_controls);
        let entry = WorkerEntry {
            shared: Arc::clone(&self.shared),
            worker_id: presence.worker_id.clone(),
            inbox: Arc::clone(&inbox),
        };
        let worker = Worker { inbox: Arc::clone(&inbox), presence };
        let before = self.shared.workers().insert(entry.worker_id.clone(), worker);
        if let Some(before) = before {
            before.inbox.close();
        }
        let state = (InboxEnd::new(inbox), entry);
        let messages = stream::unfold(state, |(mut end, entry)| async {
            let message = end.recv().await?;
            Some((message, (end, entry)))
        });
        Ok(Inbox { messages: messages.boxed(), closed: None })
    }

    async fn refresh(&self, presence: WorkerPresence) -> Result<()> {
        if let Some(worker) = self.shared.workers().get_mut(&presence.worker_id)
            && worker.presence.incarnation == presence.incarnation
        {
            worker.presence = presence;
        }
        Ok(())
    }

    async fn publish(&self, gateway_id: &str, message: TokenMessage) -> Result<Delivered> {
        let sender = self.shared.gateways().get(gateway_id).cloned();
        let Some(sender) = sender else { return Ok(Delivered::GatewayGone) };
        Ok(match sender.send_timeout(message, self.limits.publish_patience).await {
            Ok(()) => Delivered::Delivered,
            Err(SendTimeoutError::Timeout(_)) => Delivered::Dropped,
            Err(SendTimeoutError::Closed(_)) => Delivered::GatewayGone,
        })
    }

    async fn gateways(&self) -> Result<Vec<String>> {
        Ok(self.shared.gateways().keys().cloned().collect())
    }
}
