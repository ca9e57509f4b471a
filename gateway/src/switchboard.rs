//! Which message reaches which request, as plain data: the open requests of a gateway, and where
//! each worker stands in its sequence. No IO and no clock.
//!
//! Only the placement that counts is heard: of its worker's incarnation, of its attempt. A request
//! hears once that its worker is gone or lost a message, and nothing more until it is placed again.

use std::collections::{BTreeMap, HashMap, HashSet};

use storage::queue::message::{TokenMessage, Update};

use crate::flight::Loss;

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
}

impl Switchboard {
    /// Opens the slot of a request; nothing is heard before [`Switchboard::expect`].
    pub fn open(&mut self, request_id: &str) {
        self.slots.insert(request_id.to_owned(), Slot::default());
    }

    /// From now on only this attempt on this worker is heard.
    pub fn expect(&mut self, request_id: &str, attempt: u32, worker_id: &str, incarnation: &str) {
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
    pub fn take(&mut self, message: TokenMessage) -> Vec<(String, Signal)> {
        let incarnation = message.worker_incarnation;
        let mut heard = match self.sequences.observe(&incarnation, message.sequence) {
            Arrival::Next => Vec::new(),
            Arrival::Repeat => return Vec::new(),
            Arrival::Gap => {
                tracing::warn!(worker.incarnation = incarnation, "a token message was lost");
                self.lose(Loss::Message, |slot| slot.incarnation == incarnation)
            }
        };
        for item in message.items {
            let Some(slot) = self.slots.get(&item.request_id) else { continue };
            if slot.incarnation == incarnation && slot.attempt == item.attempt {
                let signal = Signal::Update { attempt: item.attempt, update: item.update };
                heard.push((item.request_id, signal));
            }
        }
        heard
    }

    /// The queue lost what was under way: every worker may have lost its requests.
    pub fn begin_anew(&mut self) -> Vec<(String, Signal)> {
        self.sequences = Sequences::default();
        self.lose(Loss::Message, |slot| !slot.incarnation.is_empty())
    }

    /// Only these incarnations are alive.
    pub fn watch(&mut self, alive: &HashSet<&str>) -> Vec<(String, Signal)> {
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

    fn message(incarnation: &str, sequence: u64, attempt: u32) -> TokenMessage {
        let item = Item { request_id: "a".to_owned(), attempt, update: Update::Moved };
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
        assert_eq!(board.take(message("i", 0, 9)), [], "another attempt");
        let lost = [("a".to_owned(), Signal::Lost { attempt: 3, loss: Loss::Message })];
        assert_eq!(board.begin_anew(), lost, "b is on no worker");
        assert_eq!(board.begin_anew(), []);
        board.expect("a", 4, "w", "i");
        let heard = Signal::Update { attempt: 4, update: Update::Moved };
        assert_eq!(board.take(message("i", 0, 4)), [("a".to_owned(), heard)], "not a repeat");
    }

    #[test]
    fn behind_a_hole_and_of_another_incarnation_nothing_is_heard() {
        let mut board = Switchboard::default();
        board.open("a");
        board.expect("a", 0, "w", "i");
        assert_eq!(board.take(message("j", 0, 0)), []);
        let lost = [("a".to_owned(), Signal::Lost { attempt: 0, loss: Loss::Message })];
        assert_eq!(board.take(message("i", 1, 0)), lost);
        assert_eq!(board.take(message("i", 0, 0)), [], "what came late");
        assert_eq!(board.close("a"), Some("w".to_owned()));
        assert!(board.is_empty());
    }
}
