//! The jobs that run here and those that an operator moves away, as plain data. One thing, so that
//! the word to move a job and the job's end can't miss each other.

use crate::engine::command::JobEvent;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};

/// News of one job that its runner has not read yet; it reads them as they come.
const JOB_NEWS: usize = 4096;
/// How long this worker leaves a job alone that was moved away and that nobody else takes.
const LEFT_ALONE: Duration = Duration::from_secs(10);

/// A job that runs here.
#[derive(Clone)]
pub struct Running {
    /// Number of the claim.
    pub attempt: i64,
    /// News from the engine.
    pub news: mpsc::Sender<JobEvent>,
    /// Rings when its row may have changed.
    pub bell: Arc<Notify>,
    /// The engine trains it: its id can be asked as a model.
    pub live: bool,
}

/// A job that is to go to another worker.
#[derive(Clone, Debug)]
struct Moved {
    /// The worker to hear of it first; none: all.
    to: Option<String>,
    /// Once it was let go: when this worker may have it again.
    until: Option<Instant>,
}

/// See the module.
#[derive(Default)]
pub struct Runs {
    running: HashMap<String, Running>,
    moved: HashMap<String, Moved>,
}

impl Runs {
    /// A new entry, and the end that its runner reads. None while an earlier run of the job has
    /// not ended.
    pub fn open(
        &mut self,
        job: &str,
        attempt: i64,
    ) -> Option<(mpsc::Receiver<JobEvent>, Arc<Notify>)> {
        if self.running.contains_key(job) {
            return None;
        }
        let (news, reader) = mpsc::channel(JOB_NEWS);
        let bell = Arc::new(Notify::new());
        let running = Running { attempt, news, bell: bell.clone(), live: false };
        self.running.insert(job.to_owned(), running);
        Some((reader, bell))
    }

    /// The run has ended. A job that was to move has surely been let go now, also where the word
    /// came when its runner no longer listened.
    pub fn close(&mut self, job: &str, now: Instant) {
        self.running.remove(job);
        if let Some(moved) = self.moved.get_mut(job) {
            moved.until.get_or_insert(now + LEFT_ALONE);
        }
    }

    /// A job that runs here.
    pub fn get(&self, job: &str) -> Option<&Running> {
        self.running.get(job)
    }

    /// Whether the engine trains a job.
    pub fn set_live(&mut self, job: &str, live: bool) {
        if let Some(running) = self.running.get_mut(job) {
            running.live = live;
        }
    }

    /// All that run, with their ids.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Running)> {
        self.running.iter()
    }

    /// How many run.
    pub fn len(&self) -> usize {
        self.running.len()
    }

    /// None runs.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// A job is to go to another worker; its runner is rung. Nothing where it does not run.
    pub fn leave(&mut self, job: String, to: Option<String>) {
        let Some(running) = self.running.get(&job) else { return };
        running.bell.notify_one();
        self.moved.insert(job, Moved { to, until: None });
    }

    /// Whether a job is to go to another worker.
    pub fn is_moved(&self, job: &str) -> bool {
        self.moved.contains_key(job)
    }

    /// Whether some job is; while one waits to be taken, this worker takes none: it might be that
    /// one.
    pub fn moves(&self) -> bool {
        !self.moved.is_empty()
    }

    /// A job was let go at `now`: the worker to hear of it first.
    pub fn let_go(&mut self, job: &str, now: Instant) -> Option<String> {
        let moved = self.moved.get_mut(job)?;
        moved.until = Some(now + LEFT_ALONE);
        moved.to.clone()
    }

    /// Moved jobs that were let go, and whether they were left alone for long enough.
    pub fn left_alone(&self, now: Instant) -> Vec<(String, bool)> {
        let until = |(job, moved): (&String, &Moved)| Some((job.clone(), moved.until? <= now));
        self.moved.iter().filter_map(until).collect()
    }

    /// A moved job is another's, or nobody's wish any more.
    pub fn forget(&mut self, job: &str) {
        self.moved.remove(job);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_listed_once_and_until_its_end() {
        let (mut runs, now) = (Runs::default(), Instant::now());
        let _ends = runs.open("j", 3).expect("a new run");
        assert!(runs.open("j", 4).is_none(), "the earlier one has not ended");
        runs.set_live("j", true);
        assert_eq!(runs.get("j").map(|run| (run.attempt, run.live)), Some((3, true)));
        runs.close("j", now);
        assert!(runs.is_empty() && !runs.moves());
        assert!(runs.open("j", 4).is_some());
    }

    #[test]
    fn a_moved_job_is_left_alone_for_a_while() {
        let (mut runs, now) = (Runs::default(), Instant::now());
        let _ends = runs.open("j", 1).expect("a new run");
        runs.leave("j".to_owned(), Some("w".to_owned()));
        assert!(runs.is_moved("j") && runs.left_alone(now).is_empty(), "it is not let go yet");
        assert_eq!(runs.let_go("j", now), Some("w".to_owned()));
        let later = now + LEFT_ALONE;
        runs.close("j", later);
        assert_eq!(runs.left_alone(now), [("j".to_owned(), false)]);
        assert_eq!(runs.left_alone(later), [("j".to_owned(), true)]);
        runs.forget("j");
        assert!(!runs.moves());
    }

    #[test]
    fn a_word_to_move_a_job_that_just_ends_does_not_stay_for_ever() {
        let (mut runs, now) = (Runs::default(), Instant::now());
        let _ends = runs.open("j", 1).expect("a new run");
        // Its runner has looked for the last time whether it is moved.
        runs.leave("j".to_owned(), None);
        runs.close("j", now);
        assert_eq!(runs.left_alone(now + LEFT_ALONE), [("j".to_owned(), true)]);
        runs.forget("j");
        runs.leave("j".to_owned(), None);
        assert!(!runs.moves(), "what does not run here cannot leave");
    }
}
