//! What was really done to the service, and when: printed as it happens, and what the endings of
//! requests are judged by.

use super::blows::{Process, Store, Target};
use super::clients::Ended;
use super::operator::Word;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// A state of affairs that may make requests fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Killed, or a worker asked to end, until its successor is ready.
    Down(Process),
    /// A gateway from SIGTERM until its end.
    Leaving(Process),
    /// A gateway from this end until its successor is ready.
    Gone(Process),
    /// Between SIGSTOP and SIGCONT.
    Frozen(Process),
    /// For all processes.
    Away(Store),
    /// For one process.
    CutOff(Process, Store),
    /// A job is moved, paused and resumed, or cancelled.
    Steered(usize),
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

/// A gateway knew a model's name.
#[derive(Clone, Debug)]
pub struct Known {
    /// Which.
    pub gateway: usize,
    /// The name.
    pub model: String,
    /// When it was asked.
    pub from: Instant,
    /// When it answered 200.
    pub at: Instant,
}

/// All that has happened.
#[derive(Clone, Debug, Default)]
pub struct Story {
    /// In the order of their beginnings.
    pub entries: Vec<Entry>,
    /// In the order of the answers' ends.
    pub known: Vec<Known>,
}

/// See the module.
pub struct Diary {
    /// What times in print count from.
    pub start: Instant,
    story: Mutex<Story>,
    words: Mutex<Vec<Word>>,
}

impl Diary {
    /// An empty one that counts from now.
    pub fn new() -> Self {
        Self { start: Instant::now(), story: Mutex::default(), words: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Story> {
        self.story.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prints a line with the time.
    pub fn say(&self, line: impl fmt::Display) {
        println!("{:7.1} s  {line}", self.start.elapsed().as_secs_f64());
    }

    /// Notes that a trouble begins; its number ends it.
    pub fn begin(&self, trouble: Trouble) -> usize {
        self.say(format_args!("{trouble}"));
        let entries = &mut self.lock().entries;
        entries.push(Entry { trouble, from: Instant::now(), until: None });
        entries.len() - 1
    }

    /// Notes that it is over.
    pub fn end(&self, number: usize) {
        let trouble = {
            let entries = &mut self.lock().entries;
            entries[number].until = Some(Instant::now());
            entries[number].trouble
        };
        self.say(format_args!("over: {trouble}"));
    }

    /// Keeps the answer to a word.
    pub fn word(&self, word: Word) {
        self.words.lock().unwrap_or_else(PoisonError::into_inner).push(word);
    }

    /// All words that have not been taken yet.
    pub fn take_words(&self) -> Vec<Word> {
        std::mem::take(&mut self.words.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Keeps which name a gateway knew by this answer.
    pub fn answered(&self, model: &str, ended: &Ended) {
        let Some(at) = ended.admitted else { return };
        let (gateway, model, from) = (ended.gateway, model.to_owned(), ended.from);
        self.lock().known.push(Known { gateway, model, from, at });
    }

    /// All of it.
    pub fn story(&self) -> Story {
        self.lock().clone()
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Down(process) => write!(f, "{process} is down"),
            Self::Leaving(process) => write!(f, "{process} is leaving"),
            Self::Gone(process) => write!(f, "{process} has left"),
            Self::Frozen(process) => write!(f, "{process} is frozen"),
            Self::Away(store) => write!(f, "{store} is away"),
            Self::CutOff(process, store) => write!(f, "{process} is cut off from {store}"),
            Self::Steered(job) => write!(f, "{} is steered", Target::Job(*job)),
        }
    }
}
