//! Placements that no longer count though their workers go on with them, as plain data: one that
//! was placed elsewhere while its worker stood still, or whose client has gone unheard. Each is to
//! be cancelled where it runs, or it would hold blocks to its full length for nobody.

use std::collections::{HashMap, HashSet};

use storage::queue::message::{Item, Update, WorkerPresence};

/// Cancels between two looks at presence; what is not told then is told after the next.
const CANCELS_MAX: usize = 256;

/// A placement to be cancelled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stray {
    /// Where it runs.
    pub worker_id: String,
    /// Which request.
    pub request_id: String,
    /// Which placement of it; later ones are not meant.
    pub attempt: u32,
}

/// Where strays run, and which of them were told of.
#[derive(Debug, Default)]
pub struct Strays {
    /// Worker ids by incarnation.
    homes: HashMap<String, String>,
    /// Since the last look at presence: a cancel that is lost is not the last one.
    told: HashSet<(String, u32, String)>,
}

impl Strays {
    /// A placement goes to this worker.
    pub fn meet(&mut self, incarnation: &str, worker_id: &str) {
        if !self.homes.contains_key(incarnation) {
            self.homes.insert(incarnation.to_owned(), worker_id.to_owned());
        }
    }

    /// These workers are alive.
    pub fn watch(&mut self, workers: &[WorkerPresence]) {
        let home = |worker: &WorkerPresence| (worker.incarnation.clone(), worker.worker_id.clone());
        self.homes = workers.iter().map(home).collect();
        self.told.clear();
    }

    /// An item that nobody waits for: the stray to cancel, unless that was asked for lately, its
    /// worker has let go of it with this word, or it is not known where it runs.
    pub fn hear(&mut self, incarnation: &str, item: Item) -> Option<Stray> {
        if matches!(item.update, Update::Moved | Update::Failed(_)) {
            return None;
        }
        let worker_id = self.homes.get(incarnation)?.clone();
        let Item { request_id, attempt, .. } = item;
        let told = (request_id.clone(), attempt, incarnation.to_owned());
        let new = self.told.len() < CANCELS_MAX && self.told.insert(told);
        new.then_some(Stray { worker_id, request_id, attempt })
    }
}

#[cfg(test)]
mod tests {
    use storage::queue::message::PROTOCOL_VERSION;

    use super::*;

    fn presence(worker_id: &str, incarnation: &str) -> WorkerPresence {
        WorkerPresence {
            worker_id: worker_id.to_owned(),
            incarnation: incarnation.to_owned(),
            protocol: vec![PROTOCOL_VERSION],
            base: "b".to_owned(),
            base_fingerprint: "print".to_owned(),
            device: "cpu".to_owned(),
            adapters: Vec::new(),
            requests: 0,
            free_blocks: 1,
            total_blocks: 1,
            training_jobs: 0,
            training_room: 0,
            draining: false,
        }
    }

    fn item(request: usize, attempt: u32) -> Item {
        let (prompt_tokens, fingerprint) = (1, String::new());
        let update = Update::Admitted { prompt_tokens, fingerprint };
        Item { request_id: format!("r{request}"), attempt, update }
    }

    #[test]
    fn a_stray_is_told_once_until_presence_is_looked_at_again() {
        let mut strays = Strays::default();
        assert_eq!(strays.hear("i", item(0, 2)), None, "nobody knows where it runs");
        let workers = [presence("w", "i")];
        for _ in 0..3 {
            strays.watch(&workers);
            let stray = Stray { worker_id: "w".into(), request_id: "r0".into(), attempt: 2 };
            assert_eq!(strays.hear("i", item(0, 2)), Some(stray));
            assert_eq!(strays.hear("i", item(0, 2)), None);
            assert_eq!(strays.hear("i", item(0, 3)).map(|stray| stray.attempt), Some(3));
        }
        strays.watch(&[]);
        assert_eq!(strays.hear("i", item(0, 2)), None, "gone");
    }

    #[test]
    fn many_strays_are_told_of_a_few_at_a_time_and_last_words_never() {
        let mut strays = Strays::default();
        strays.meet("i", "w");
        let last = Item { update: Update::Moved, ..item(0, 0) };
        assert_eq!(strays.hear("i", last), None);
        let told = |strays: &mut Strays| {
            (0..1000).filter(|request| strays.hear("i", item(*request, 0)).is_some()).count()
        };
        assert_eq!((told(&mut strays), told(&mut strays)), (CANCELS_MAX, 0));
        strays.watch(&[presence("w", "i")]);
        assert_eq!(told(&mut strays), CANCELS_MAX);
    }
}
