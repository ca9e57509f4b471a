//! Which message reaches which request, as plain data: the open requests of a gateway, and where
//! each worker stands in its sequence. No IO and no clock.
//!
//! Only the placement that counts is heard: of its worker's incarnation, of its attempt. A request
//! hears once that its worker is gone or lost a message, and nothing more until it is placed again.
//! A worker that goes on with a placement that no longer counts is to be told.

use std::collections::{BTreeMap, HashMap, HashSet};

use storage::queue::message::{TokenMessage, Update, WorkerPresence};

use crate::flight::Loss;
use crate::strays::{Stray, Strays};

/// What a request hears.
#[derive(Clone, Debug, PartialEq)]
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
        /// Which of the two.
        loss: Loss,
    },
}

/// What a message comes to; the signals in order.
#[derive(Debug, Default, PartialEq)]
pub struct Heard {
    /// For requests by their ids.
    pub signals: Vec<(String, Signal)>,
    /// To be cancelled.
    pub strays: Vec<Stray>,
}

#[derive(Debug, Default)]
struct Slot {
    attempt: u32,
    /// The worker it was placed on.
    worker_id: String,
    /// Of that worker; empty while the request is between workers.
    incarnation: String,
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

/// The open requests of a gateway. What it returns is to be handed on in order.
#[derive(Debug, Default)]
pub struct Switchboard {
    slots: BTreeMap<String, Slot>,
    sequences: Sequences,
    strays: Strays,
}

impl Switchboard {
    /// Opens the slot of a request; nothing is heard before [`Switchboard::expect`].
    pub fn open(&mut self, request_id: &str) {
        self.slots.insert(request_id.to_owned(), Slot::default());
    }

    /// From now on only this attempt on this worker is heard.
    pub fn expect(&mut self, request_id: &str, attempt: u32, worker_id: &str, incarnation: &str) {
        self.strays.meet(incarnation, worker_id);
        if let Some(slot) = self.slots.get_mut(request_id) {
            slot.attempt = attempt;
            worker_id.clone_into(&mut slot.worker_id);
            incarnation.clone_into(&mut slot.incarnation);
        }
    }

    /// Closes a slot; the worker that its request was placed on last, if it had one.
    pub fn close(&mut self, request_id: &str) -> Option<String> {
        let slot = self.slots.remove(request_id)?;
        (!slot.worker_id.is_empty()).then_some(slot.worker_id)
    }

    /// Closes all slots.
    pub fn clear(&mut self) {
        self.slots.clear();
    }

    /// Open requests.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// No request is open.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Takes a message apart. A hole before it loses what its worker ran.
    pub fn take(&mut self, message: TokenMessage) -> Heard {
        let incarnation = message.worker_incarnation;
        let mut heard = Heard::default();
        match self.sequences.observe(&incarnation, message.sequence) {
            Arrival::Next => {}
            Arrival::Repeat => return heard,
            Arrival::Gap => {
                tracing::warn!(worker.incarnation = incarnation, "a token message was lost");
                heard.signals = self.lose(Loss::Message, |slot| slot.incarnation == incarnation);
            }
        }
        for item in message.items {
            match self.slots.get(&item.request_id) {
                Some(slot) if slot.incarnation == incarnation && slot.attempt == item.attempt => {
                    let signal = Signal::Update { attempt: item.attempt, update: item.update };
                    heard.signals.push((item.request_id, signal));
                }
                // Between workers: whoever places it again cancels it here first.
                Some(slot) if slot.attempt <= item.attempt => {}
                Some(_) | None => heard.strays.extend(self.strays.hear(&incarnation, item)),
            }
        }
        heard
    }

    /// The queue lost what was under way: every worker may have lost its requests.
    pub fn begin_anew(&mut self) -> Vec<(String, Signal)> {
        self.sequences = Sequences::default();
        self.lose(Loss::Message, |slot| !slot.incarnation.is_empty())
    }

    /// Only these workers are alive.
    pub fn watch(&mut self, workers: &[WorkerPresence]) -> Vec<(String, Signal)> {
        self.strays.watch(workers);
        let alive: HashSet<&str> = workers.iter().map(|w| w.incarnation.as_str()).collect();
        self.sequences.0.retain(|incarnation, _| alive.contains(incarnation.as_str()));
        self.lose(Loss::Worker, |slot| {
            !slot.incarnation.is_empty() && !alive.contains(slot.incarnation.as_str())
        })
    }

    /// Tells the slots of a lost worker once; they are between workers from then on.
    fn lose(&mut self, loss: Loss, lost: impl Fn(&Slot) -> bool) -> Vec<(String, Signal)> {
        let mut told = Vec::new();
        for (request_id, slot) in self.slots.iter_mut().filter(|(_, slot)| lost(slot)) {
            slot.incarnation.clear();
            told.push((request_id.clone(), Signal::Lost { attempt: slot.attempt, loss }));
        }
        told
    }
}

#[cfg(test)]
mod tests {
    use storage::queue::message::Item;

    use super::*;

    fn said() -> Update {
        Update::Admitted { prompt_tokens: 1, fingerprint: String::new() }
    }

    fn message(incarnation: &str, sequence: u64, attempt: u32) -> TokenMessage {
        let item = Item { request_id: "a".to_owned(), attempt, update: said() };
        let worker_incarnation = incarnation.to_owned();
        TokenMessage { worker_incarnation, sequence, items: vec![item] }
    }

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
        let mut board = Switchboard::default();
        board.open("a");
        board.open("b");
        board.expect("a", 3, "w", "i");
        assert_eq!(board.take(message("i", 0, 9)), Heard::default(), "another attempt");
        let lost = [("a".to_owned(), Signal::Lost { attempt: 3, loss: Loss::Message })];
        assert_eq!(board.begin_anew(), lost, "b is on no worker");
        assert_eq!(board.begin_anew(), []);
        board.expect("a", 4, "w", "i");
        let heard = Signal::Update { attempt: 4, update: said() };
        let heard = [("a".to_owned(), heard)];
        assert_eq!(board.take(message("i", 0, 4)).signals, heard, "not a repeat");
    }

    #[test]
    fn behind_a_hole_and_of_another_incarnation_nothing_is_heard() {
        let mut board = Switchboard::default();
        board.open("a");
        board.expect("a", 0, "w", "i");
        assert_eq!(board.take(message("j", 0, 0)), Heard::default());
        let lost = [("a".to_owned(), Signal::Lost { attempt: 0, loss: Loss::Message })];
        assert_eq!(board.take(message("i", 1, 0)).signals, lost);
        assert_eq!(board.take(message("i", 0, 0)), Heard::default(), "what came late");
        assert_eq!(board.close("a"), Some("w".to_owned()));
        assert!(board.is_empty());
    }

    #[test]
    fn what_runs_on_though_it_no_longer_counts_is_cancelled_and_nothing_later() {
        let stray = |attempt| {
            let (worker_id, request_id) = ("w".to_owned(), "a".to_owned());
            let strays = vec![Stray { worker_id, request_id, attempt }];
            Heard { signals: Vec::new(), strays }
        };
        let mut board = Switchboard::default();
        board.open("a");
        board.expect("a", 0, "w", "i");
        board.watch(&[]);
        assert_eq!(board.take(message("i", 0, 0)), Heard::default(), "it is being placed again");
        board.expect("a", 1, "w", "i");
        assert_eq!(board.take(message("i", 1, 0)), stray(0), "the same worker, back again");
        assert_eq!(board.take(message("i", 2, 0)), Heard::default(), "told already");
        assert_eq!(board.take(message("i", 3, 1)).signals.len(), 1, "the one that counts");
        board.close("a");
        assert_eq!(board.take(message("i", 4, 1)), stray(1), "its client has gone");
    }
}
