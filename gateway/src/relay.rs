//! Reads this gateway's token messages and hands what the [`Switchboard`] makes of them to the
//! requests.
//!
//! One task reads for all requests. It never waits for one of them: a reader whose buffer is full
//! loses its request. It also watches the presence of all workers.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use storage::queue::message::{ToWorker, TokenMessage};
use storage::queue::{Queue, Received, TokenReceiver};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, timeout};

use crate::strays::Stray;
pub use crate::switchboard::Signal;
use crate::switchboard::Switchboard;

/// How often presence is looked at: a lost worker is noticed within this and its presence time, and
/// a new request is placed by what was seen last.
const PRESENCE_PERIOD: Duration = Duration::from_millis(250);

/// How long the cancel of a stray waits for room at its worker.
const STRAY_PATIENCE: Duration = Duration::from_secs(1);

/// Cancels every placement of a request.
pub const ALL_ATTEMPTS: u32 = u32::MAX;

/// The open requests, and who reads their signals.
#[derive(Default)]
struct Lines {
    board: Switchboard,
    readers: HashMap<String, mpsc::Sender<Signal>>,
}

/// The open requests of this gateway by id.
pub struct Relay {
    /// This process, as workers address it.
    pub gateway_id: String,
    queue: Arc<dyn Queue>,
    buffer_messages: usize,
    lines: Mutex<Lines>,
}

impl Relay {
    /// Without requests yet.
    pub fn new(gateway_id: String, queue: Arc<dyn Queue>, buffer_messages: usize) -> Relay {
        Relay { gateway_id, queue, buffer_messages, lines: Mutex::default() }
    }

    /// Every change leaves the lines whole, so a panic elsewhere does not spoil them.
    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the line of a request; what arrives before [`Relay::expect`] is dropped.
    pub fn open(&self, request_id: &str) -> mpsc::Receiver<Signal> {
        let (signals, receiver) = mpsc::channel(self.buffer_messages);
        let mut lines = self.lines();
        lines.board.open(request_id);
        lines.readers.insert(request_id.to_owned(), signals);
        receiver
    }

    /// From now on only this attempt on this worker is heard.
    pub fn expect(&self, request_id: &str, attempt: u32, worker_id: &str, incarnation: &str) {
        self.lines().board.expect(request_id, attempt, worker_id, incarnation);
    }

    /// Closes the line.
    pub fn close(&self, request_id: &str) {
        let mut lines = self.lines();
        lines.board.close(request_id);
        lines.readers.remove(request_id);
    }

    /// Open requests.
    pub fn open_requests(&self) -> usize {
        self.lines().board.len()
    }

    /// Reads until another process takes over this gateway's id.
    pub async fn run(self: Arc<Relay>, mut messages: TokenReceiver) {
        let mut presence = tokio::time::interval(PRESENCE_PERIOD);
        presence.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                received = messages.recv() => match received {
                    Some(Received::Message(message)) => self.receive(message),
                    Some(Received::Lost) => {
                        tracing::warn!("the queue lost what was under way; placing all again");
                        self.hand_out(Switchboard::begin_anew);
                    }
                    None => break,
                },
                _ = presence.tick() => self.watch().await,
            }
        }
        tracing::error!("the stream of token messages ended");
        *self.lines() = Lines::default();
    }

    fn receive(self: &Arc<Relay>, message: TokenMessage) {
        let mut strays = Vec::new();
        self.hand_out(|board| {
            let heard = board.take(message);
            strays = heard.strays;
            heard.signals
        });
        for Stray { worker_id, request_id, attempt } in strays {
            tracing::info!(worker.id = worker_id, request.id = request_id, attempt, "a stray");
            let relay = Arc::clone(self);
            tokio::spawn(async move {
                let cancel = relay.cancel(&worker_id, &request_id, attempt);
                // One that finds no room is asked for again as long as the stray is heard.
                let _ = timeout(STRAY_PATIENCE, cancel).await;
            });
        }
    }

    /// Hands signals out; the request of a reader that is too slow is ended. Its end of the line
    /// sees the close when it reads on; the worker stops now.
    fn hand_out(self: &Arc<Relay>, heard: impl FnOnce(&mut Switchboard) -> Vec<(String, Signal)>) {
        let mut lines = self.lines();
        for (request_id, signal) in heard(&mut lines.board) {
            let reader = lines.readers.get(&request_id);
            if reader.is_none_or(|reader| reader.try_send(signal).is_ok()) {
                continue;
            }
            lines.readers.remove(&request_id);
            let Some(worker_id) = lines.board.close(&request_id) else { continue };
            let relay = Arc::clone(self);
            tokio::spawn(async move {
                relay.cancel(&worker_id, &request_id, ALL_ATTEMPTS).await;
            });
        }
    }

    /// Tells the requests whose worker is no longer alive.
    async fn watch(self: &Arc<Relay>) {
        let workers = match self.queue.workers().await {
            Ok(workers) => workers,
            Err(error) => {
                tracing::warn!(%error, "presence could not be read");
                return;
            }
        };
        self.hand_out(|board| board.watch(&workers));
    }

    /// Tells a worker that nobody reads the placements up to `attempt` any more.
    pub async fn cancel(&self, worker_id: &str, request_id: &str, attempt: u32) {
        let message = ToWorker::Cancel { request_id: request_id.to_owned(), attempt };
        if let Err(error) = self.queue.control(worker_id, message).await {
            tracing::warn!(%error, request.id = request_id, "a cancel could not be sent");
        }
    }
}
