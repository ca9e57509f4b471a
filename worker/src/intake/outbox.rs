//! What the engine has told of a job and its rows do not say yet, in order and bounded: while the
//! stores are away a job trains on only as far as this holds its news. Plain data.

use super::requests::unix_time;
use crate::engine::command::{Purpose, Snapshot};
use crate::train::StepMetrics;
use crate::train::metrics::{self, JobNotice};
use std::collections::VecDeque;
use std::time::Instant;
use storage::db::{EventType, JobWrite, Level, NewEvent, Progress};

/// Events of one write: its transaction is short.
const WRITE_EVENTS: usize = 256;
/// Events that may wait before training does: some 2 MiB.
const EVENTS: usize = 4096;
/// States that are to be listed, with the one being stored, that may wait before training does:
/// each is three times an adapter in f32.
const STATES: usize = 3;

/// The row of a notice.
pub fn event(notice: &JobNotice) -> NewEvent {
    NewEvent {
        kind: notice.kind,
        key: notice.key,
        level: if notice.warn { Level::Warn } else { Level::Info },
        event_type: match notice.data.is_empty() {
            true => EventType::Message,
            false => EventType::Metrics,
        },
        message: notice.message.clone(),
        data: notice.data.clone(),
    }
}

/// A state with what was known of the job when it was handed out.
#[derive(Clone, Debug)]
pub struct Saved {
    /// The state.
    pub snapshot: Snapshot,
    /// `step_metrics.csv` up to it.
    pub csv: String,
    /// Tokens trained up to it.
    pub trained_tokens: u64,
    /// Its last step.
    pub last: Option<StepMetrics>,
    /// Events noted before it.
    pub mark: u64,
}

/// See the module.
pub struct Outbox {
    total_steps: usize,
    began: (Instant, usize),
    csv: String,
    trained_tokens: u64,
    last: Option<StepMetrics>,
    events: VecDeque<NewEvent>,
    /// Events that were taken to be written.
    taken: u64,
    states: VecDeque<Saved>,
    storing: bool,
}

impl Outbox {
    /// Of a job that starts.
    pub fn new(total_steps: usize) -> Self {
        Self {
            total_steps,
            began: (Instant::now(), 0),
            csv: metrics::CSV_HEADER.to_owned(),
            trained_tokens: 0,
            last: None,
            events: VecDeque::new(),
            taken: 0,
            states: VecDeque::new(),
            storing: false,
        }
    }

    /// Takes over what an earlier run had written.
    pub fn resume(&mut self, step: usize, trained_tokens: u64, csv: &str) {
        self.began.1 = step;
        self.trained_tokens = trained_tokens;
        csv.clone_into(&mut self.csv);
    }

    /// Training begins now: what the end is estimated by.
    pub fn begin(&mut self) {
        self.began.0 = Instant::now();
    }

    /// Notes a step.
    pub fn step(&mut self, step: StepMetrics) {
        self.trained_tokens += step.tokens;
        self.csv.push_str(&metrics::csv_row(&step));
        if step.skipped {
            self.events.push_back(event(&JobNotice::skipped(&step)));
        }
        self.events.push_back(event(&JobNotice::step(&step)));
        self.last = Some(step);
    }

    /// Notes a state to keep. A resume point that still waits is of no use once a newer state is
    /// there.
    pub fn save(&mut self, snapshot: Snapshot) {
        if self.states.back().is_some_and(|saved| saved.snapshot.purpose == Purpose::Resume) {
            self.states.pop_back();
        }
        self.states.push_back(Saved {
            snapshot,
            csv: self.csv.clone(),
            trained_tokens: self.trained_tokens,
            last: self.last.clone(),
            mark: self.taken + self.events.len() as u64,
        });
    }

    /// Whether training has to wait until some of this is written.
    pub fn is_full(&self) -> bool {
        let listed = |saved: &&Saved| saved.snapshot.purpose != Purpose::Resume;
        let states = self.states.iter().filter(listed).count() + usize::from(self.storing);
        self.events.len() >= EVENTS || states >= STATES
    }

    /// Whether steps wait.
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// The oldest state that waits, to be stored before the next one is.
    pub fn next_state(&mut self) -> Option<Saved> {
        let next = self.states.pop_front();
        self.storing = next.is_some();
        next
    }

    /// The state taken last is stored.
    pub fn stored(&mut self) {
        self.storing = false;
    }

    /// Whether events before `mark` need a write of their own before the one at `mark`.
    pub fn is_behind(&self, mark: u64) -> bool {
        mark.saturating_sub(self.taken) > WRITE_EVENTS as u64
    }

    /// The next write about steps: their events, in order, and how far the job is. With a mark,
    /// only events before it.
    pub fn next_write(&mut self, mark: Option<u64>) -> JobWrite {
        let within = mark.map_or(u64::MAX, |mark| mark.saturating_sub(self.taken));
        let count = self.events.len().min(WRITE_EVENTS).min(within as usize);
        self.taken += count as u64;
        let progress = self.last.as_ref().map(|last| Progress {
            step: last.step as i64,
            total_steps: self.total_steps as i64,
            estimated_finish: self.estimated_finish(last.step),
        });
        JobWrite { progress, events: self.events.drain(..count).collect(), ..JobWrite::default() }
    }

    fn estimated_finish(&self, step: usize) -> Option<i64> {
        let (began, first) = self.began;
        let done = step.checked_sub(first).filter(|done| *done > 0)?;
        let per_step = began.elapsed().as_secs_f64() / done as f64;
        let left = self.total_steps.saturating_sub(step) as f64 * per_step;
        Some(unix_time() + left.ceil() as i64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: usize) -> StepMetrics {
        StepMetrics { step, total_steps: 9, tokens: 10, ..StepMetrics::default() }
    }

    fn state(purpose: Purpose, step: usize) -> Snapshot {
        Snapshot { purpose, step, params: Vec::new(), m: Vec::new(), v: Vec::new() }
    }

    #[test]
    fn states_keep_what_was_known_and_newer_ones_replace_waiting_resume_points() {
        let mut outbox = Outbox::new(9);
        outbox.step(step(1));
        outbox.save(state(Purpose::Resume, 1));
        let first = outbox.next_state().expect("a state");
        for at in 2..=5 {
            outbox.step(step(at));
            outbox.save(state(Purpose::Resume, at));
        }
        outbox.step(step(6));
        assert!(!outbox.is_full(), "resume points alone never fill it");
        outbox.save(state(Purpose::Epoch, 6));
        outbox.save(state(Purpose::Resume, 7));
        assert!(!outbox.is_full());
        outbox.save(state(Purpose::Epoch, 8));
        assert!(outbox.is_full(), "one is being stored, two wait to be listed");
        outbox.save(state(Purpose::Resume, 9));
        assert_eq!((first.trained_tokens, first.csv.lines().count()), (10, 2));
        outbox.stored();
        assert!(!outbox.is_full());
        let epoch = outbox.next_state().expect("a state");
        assert_eq!((epoch.snapshot.step, epoch.trained_tokens), (6, 60));
        assert_eq!((epoch.csv.lines().count(), &epoch.last), (7, &Some(step(6))));
        outbox.step(step(7));
        let keys = |write: JobWrite| write.events.iter().map(|e| e.key).collect::<Vec<_>>();
        assert_eq!(keys(outbox.next_write(Some(first.mark))), [1]);
        assert_eq!(keys(outbox.next_write(Some(epoch.mark))), [2, 3, 4, 5, 6], "7 comes after it");
        assert_eq!(keys(outbox.next_write(Some(epoch.mark))), [0; 0]);
        assert_eq!(keys(outbox.next_write(None)), [7]);
        for step in [8, 9] {
            assert_eq!(outbox.next_state().map(|saved| saved.snapshot.step), Some(step));
        }
        assert!(outbox.next_state().is_none() && !outbox.is_full());
    }

    #[test]
    fn steps_are_written_in_order_and_in_pieces() {
        let mut outbox = Outbox::new(EVENTS);
        (1..EVENTS).for_each(|at| outbox.step(step(at)));
        assert!(!outbox.is_full());
        outbox.step(StepMetrics { skipped: true, ..step(EVENTS) });
        assert!(outbox.is_full());
        let mut keys = Vec::new();
        while outbox.has_events() {
            let write = outbox.next_write(None);
            assert!(write.events.len() <= WRITE_EVENTS);
            keys.extend(write.events.into_iter().map(|event| (event.key as usize, event.kind)));
        }
        let skipped = keys.remove(EVENTS - 1);
        assert!(skipped.0 == EVENTS && skipped.1 != "step", "{skipped:?}");
        assert_eq!(keys, (1..=EVENTS).map(|at| (at, "step")).collect::<Vec<_>>());
        assert_eq!(
            outbox.next_write(None).progress.map(|progress| progress.step),
            Some(EVENTS as i64)
        );
    }
}
