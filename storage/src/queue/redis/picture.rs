//! What presence said lately, so that a placement needs no look at it. The load is what it was then
//! and what this process has placed since.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::super::message::WorkerPresence;

/// How old it may be.
const AGE_MAX: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Seen {
    asked: Instant,
    workers: Arc<Vec<WorkerPresence>>,
}

/// The picture of the last look that came back.
#[derive(Debug, Default)]
pub struct Picture {
    seen: Mutex<Option<Seen>>,
}

impl Picture {
    /// Every change leaves the value whole, so a panic elsewhere does not spoil it.
    fn seen(&self) -> MutexGuard<'_, Option<Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a look that was begun at `asked` has shown.
    pub fn show(&self, asked: Instant, workers: Vec<WorkerPresence>) {
        let mut seen = self.seen();
        // Of two looks at once the later one counts.
        if seen.as_ref().is_none_or(|seen| seen.asked <= asked) {
            *seen = Some(Seen { asked, workers: Arc::new(workers) });
        }
    }

    /// A request was placed on a worker.
    pub fn placed(&self, worker_id: &str) {
        if let Some(seen) = &mut *self.seen() {
            let workers = Arc::make_mut(&mut seen.workers);
            if let Some(worker) = workers.iter_mut().find(|one| one.worker_id == worker_id) {
                worker.requests += 1;
            }
        }
    }

    /// It was wrong: somebody in it has gone.
    pub fn forget(&self) {
        *self.seen() = None;
    }

    /// The workers, if somebody looked lately.
    pub fn recent(&self, now: Instant) -> Option<Arc<Vec<WorkerPresence>>> {
        let seen = self.seen();
        let seen = seen.as_ref().filter(|seen| now.duration_since(seen.asked) < AGE_MAX)?;
        Some(Arc::clone(&seen.workers))
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::message::PROTOCOL_VERSION;
    use super::*;

    fn worker(id: &str) -> WorkerPresence {
        WorkerPresence {
            worker_id: id.to_owned(),
            incarnation: format!("{id}-1"),
            protocol: vec![PROTOCOL_VERSION],
            base: "b".to_owned(),
            base_fingerprint: "print".to_owned(),
            device: "cpu".to_owned(),
            adapters: Vec::new(),
            requests: 2,
            free_blocks: 1,
            total_blocks: 1,
            training_jobs: 0,
            training_room: 0,
            draining: false,
        }
    }

    fn loads(picture: &Picture, now: Instant) -> Option<Vec<u32>> {
        picture.recent(now).map(|workers| workers.iter().map(|worker| worker.requests).collect())
    }

    #[test]
    fn the_last_look_counts_with_what_was_placed_since_until_it_is_old() {
        let picture = Picture::default();
        let early = Instant::now();
        let now = early + Duration::from_millis(5);
        assert_eq!(loads(&picture, now), None);
        picture.show(now, vec![worker("a"), worker("b")]);
        picture.show(early, Vec::new());
        let held = picture.recent(now);
        for id in ["b", "b", "elsewhere"] {
            picture.placed(id);
        }
        assert_eq!(loads(&picture, now), Some(vec![2, 4]));
        assert_eq!(held.map(|workers| workers[1].requests), Some(2), "as it was taken");
        let later = now + AGE_MAX;
        assert_eq!(loads(&picture, later), None, "too old");
        picture.show(later, vec![worker("a")]);
        assert_eq!(loads(&picture, later), Some(vec![2]), "begun anew");
        picture.forget();
        assert_eq!(loads(&picture, later), None);
    }
}
