//! Takes this gateway's token messages apart and hands each item to the request it belongs to.
//!
//! One task reads for all requests. It never waits for one of them: a reader whose buffer is full
//! loses its request. It watches the sequence of every worker and the presence of all of them, and
//! tells the requests of a worker that lost a message or is gone.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use storage::queue::message::{ToWorker, TokenMessage, Update, WorkerPresence};
use storage::queue::{Queue, Received, TokenReceiver};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

/// How often presence is looked at; a lost worker is noticed within this and its presence time.
const PRESENCE_PERIOD: Duration = Duration::from_millis(500);

/// What a request hears.
#[derive(Debug)]
pub enum Signal {
    /// Its worker, at this attempt.
    Update {
        /// Placement number.
        attempt: u32,
        /// What happened.
        update: Update,
    },
    /// A message of this attempt's worker was lost, or the worker is gone.
    Lost {
        /// Placement number.
        attempt: u32,
    },
}

#[derive(Debug)]
struct Slot {
    attempt: u32,
    /// The worker it was placed on.
    worker_id: String,
    /// Of that worker; empty while the request is between workers.
    incarnation: String,
    signals: mpsc::Sender<Signal>,
}

/// Where a worker incarnation stands in its sequence.
#[derive(Debug, Default)]
struct Sequences(HashMap<String, u64>);

#[derive(Debug, PartialEq, Eq)]
enum Arrival {
    Next,
    Gap,
    Repeat,
}

impl Sequences {
    fn observe(&mut self, incarnation: &str, sequence: u64) -> Arrival {
        let expected = match self.0.get_mut(incarnation) {
            Some(expected) => expected,
            None => self.0.entry(incarnation.to_owned()).or_default(),
        };
        if sequence < *expected {
            return Arrival::Repeat;
        }
        let gap = sequence > *expected;
        *expected = sequence + 1;
        if gap { Arrival::Gap } else { Arrival::Next }
    }
}

/// The open requests of this gateway by id.
pub struct Relay {
    /// This process, as workers address it.
    pub gateway_id: String,
    queue: Arc<dyn Queue>,
    buffer_messages: usize,
    slots: Mutex<HashMap<String, Slot>>,
}

impl Relay {
    /// Without requests yet.
    pub fn new(gateway_id: String, queue: Arc<dyn Queue>, buffer_messages: usize) -> Relay {
        Relay { gateway_id, queue, buffer_messages, slots: Mutex::default() }
    }

    /// Every change leaves the map whole, so a panic elsewhere does not spoil it.
    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the line of a request; what arrives before [`Relay::expect`] is dropped.
    pub fn open(&self, request_id: &str) -> mpsc::Receiver<Signal> {
        let (signals, receiver) = mpsc::channel(self.buffer_messages);
        let (worker_id, incarnation) = (String::new(), String::new());
        let slot = Slot { attempt: 0, worker_id, incarnation, signals };
        self.slots().insert(request_id.to_owned(), slot);
        receiver
    }

    /// From now on only this attempt on this worker is heard.
    pub fn expect(&self, request_id: &str, attempt: u32, worker: &WorkerPresence) {
        if let Some(slot) = self.slots().get_mut(request_id) {
            slot.attempt = attempt;
            slot.worker_id.clone_from(&worker.worker_id);
            slot.incarnation.clone_from(&worker.incarnation);
        }
    }

    /// Closes the line.
    pub fn close(&self, request_id: &str) {
        self.slots().remove(request_id);
    }

    /// Open requests.
    pub fn open_requests(&self) -> usize {
        self.slots().len()
    }

    /// Reads until another process takes over this gateway's id.
    pub async fn run(self: Arc<Relay>, mut messages: TokenReceiver) {
        let mut sequences = Sequences::default();
        let mut presence = tokio::time::interval(PRESENCE_PERIOD);
        presence.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                received = messages.recv() => match received {
                    Some(Received::Message(message)) => {
                        for (worker_id, request_id) in self.take(&mut sequences, message) {
                            let relay = Arc::clone(&self);
                            tokio::spawn(async move {
                                relay.cancel(&worker_id, &request_id).await;
                            });
                        }
                    }
                    Some(Received::Lost) => {
                        tracing::warn!("the queue lost what was under way; placing all again");
                        self.begin_anew(&mut sequences);
                    }
                    None => break,
                },
                _ = presence.tick() => self.watch(&mut sequences).await,
            }
        }
        tracing::error!("the stream of token messages ended");
        self.slots().clear();
    }

    /// Hands out a message; returns worker and request of each reader that was too slow.
    fn take(&self, sequences: &mut Sequences, message: TokenMessage) -> Vec<(String, String)> {
        let mut overrun = Vec::new();
        let incarnation = message.worker_incarnation;
        let mut slots = self.slots();
        match sequences.observe(&incarnation, message.sequence) {
            Arrival::Next => {}
            Arrival::Repeat => return overrun,
            Arrival::Gap => {
                tracing::warn!(worker.incarnation = incarnation, "a token message was lost");
                lose(&mut slots, |slot| slot.incarnation == incarnation);
            }
        }
        for item in message.items {
            let Some(slot) = slots.get_mut(&item.request_id) else { continue };
            if slot.incarnation != incarnation || slot.attempt != item.attempt {
                continue;
            }
            let signal = Signal::Update { attempt: item.attempt, update: item.update };
            if slot.signals.try_send(signal).is_err() {
                // Its end of the line sees the close when it reads on; the worker stops now.
                let worker_id = std::mem::take(&mut slot.worker_id);
                slots.remove(&item.request_id);
                overrun.push((worker_id, item.request_id));
            }
        }
        overrun
    }

    /// Tells every request that its worker may have lost it.
    fn begin_anew(&self, sequences: &mut Sequences) {
        *sequences = Sequences::default();
        lose(&mut self.slots(), |slot| !slot.incarnation.is_empty());
    }

    /// Tells the requests whose worker is no longer alive.
    async fn watch(&self, sequences: &mut Sequences) {
        let workers = match self.queue.workers().await {
            Ok(workers) => workers,
            Err(error) => {
                tracing::warn!(%error, "presence could not be read");
                return;
            }
        };
        let alive: HashSet<&str> = workers.iter().map(|w| w.incarnation.as_str()).collect();
        let mut slots = self.slots();
        let gone = |slot: &Slot| {
            !slot.incarnation.is_empty() && !alive.contains(slot.incarnation.as_str())
        };
        lose(&mut slots, gone);
        sequences.0.retain(|incarnation, _| alive.contains(incarnation.as_str()));
    }

    /// Tells a worker that nobody reads this request any more.
    pub async fn cancel(&self, worker_id: &str, request_id: &str) {
        let message = ToWorker::Cancel { request_id: request_id.to_owned() };
        if let Err(error) = self.queue.control(worker_id, message).await {
            tracing::warn!(%error, request.id = request_id, "a cancel could not be sent");
        }
    }
}

/// Tells the slots of a lost worker once; they are between workers from then on.
fn lose(slots: &mut HashMap<String, Slot>, lost: impl Fn(&Slot) -> bool) {
    slots.retain(|_, slot| {
        if !lost(slot) {
            return true;
        }
        slot.incarnation.clear();
        slot.signals.try_send(Signal::Lost { attempt: slot.attempt }).is_ok()
    });
}

#[cfg(test)]
mod tests {
    use storage::queue::LocalQueue;

    use super::*;

    #[test]
    fn sequences_start_at_zero_and_have_no_holes() {
        let mut sequences = Sequences::default();
        assert_eq!(sequences.observe("a", 0), Arrival::Next);
        assert_eq!(sequences.observe("a", 1), Arrival::Next);
        assert_eq!(sequences.observe("a", 1), Arrival::Repeat);
        assert_eq!(sequences.observe("a", 3), Arrival::Gap);
        assert_eq!(sequences.observe("a", 4), Arrival::Next);
        assert_eq!(sequences.observe("b", 2), Arrival::Gap);
    }

    #[test]
    fn what_may_be_lost_is_told_once_and_sequences_begin_anew() {
        let relay = Relay::new("g".to_owned(), Arc::new(LocalQueue::default()), 4);
        let (mut placed, mut between) = (relay.open("a"), relay.open("b"));
        let worker = WorkerPresence {
            worker_id: "w".to_owned(),
            incarnation: "i".to_owned(),
            protocol: vec![1],
            base: String::new(),
            base_fingerprint: String::new(),
            device: String::new(),
            adapters: Vec::new(),
            requests: 0,
            free_blocks: 0,
            total_blocks: 0,
            training_jobs: 0,
            training_room: 0,
            draining: false,
        };
        relay.expect("a", 3, &worker);
        let mut sequences = Sequences::default();
        assert_eq!(sequences.observe("i", 0), Arrival::Next);
        relay.begin_anew(&mut sequences);
        relay.begin_anew(&mut sequences);
        assert!(matches!(placed.try_recv(), Ok(Signal::Lost { attempt: 3 })));
        assert!(placed.try_recv().is_err() && between.try_recv().is_err());
        assert_eq!(sequences.observe("i", 0), Arrival::Next, "not a repeat");
    }
}
