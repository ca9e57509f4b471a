//! What was really done to the service, and when: printed as it happens, and what the endings of
//! requests are judged by.

use super::schedule::{Process, Store};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// A state of affairs that may make requests fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// From its end until its successor is ready.
    Down(Process),
    /// Between SIGSTOP and SIGCONT.
    Frozen(Process),
    /// For all processes.
    Away(Store),
    /// For one process.
    CutOff(Process, Store),
}

/// A trouble with its time; without an end it goes on.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// What.
    pub trouble: Trouble,
    /// Since when.
    pub from: Instant,
    /// Until when.
    pub until: Option<Instant>,
}

impl Entry {
    /// Whether it fell at all into the time between two moments.
    pub fn touches(&self, from: Instant, until: Instant) -> bool {
        self.from <= until && self.until.is_none_or(|end| end >= from)
    }
}

/// See the module.
pub struct Diary {
    /// What times in print count from.
    pub start: Instant,
    entries: Mutex<Vec<Entry>>,
}

impl Diary {
    /// An empty one that counts from now.
    pub fn new() -> Self {
        Self { start: Instant::now(), entries: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prints a line with the time.
    pub fn say(&self, line: impl fmt::Display) {
        println!("{:7.1} s  {line}", self.start.elapsed().as_secs_f64());
    }

    /// Notes that a trouble begins; its number ends it.
    pub fn begin(&self, trouble: Trouble) -> usize {
        self.say(format_args!("{trouble}"));
        let mut entries = self.lock();
        entries.push(Entry { trouble, from: Instant::now(), until: None });
        entries.len() - 1
    }

    /// Notes that it is over.
    pub fn end(&self, number: usize) {
        let trouble = {
            let mut entries = self.lock();
            entries[number].until = Some(Instant::now());
            entries[number].trouble
        };
        self.say(format_args!("over: {trouble}"));
    }

    /// All of it.
    pub fn entries(&self) -> Vec<Entry> {
        self.lock().clone()
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Down(process) => write!(f, "{process} is down"),
            Self::Frozen(process) => write!(f, "{process} is frozen"),
            Self::Away(store) => write!(f, "{store} is away"),
            Self::CutOff(process, store) => write!(f, "{process} is cut off from {store}"),
        }
    }
}
