//! What can be hit, and how.

use std::fmt;
use std::time::Duration;

/// What all processes share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Store {
    /// Rows.
    Postgres,
    /// Messages and presence.
    Redis,
    /// Objects.
    Objects,
}

/// A process of the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Process {
    /// By its number.
    Gateway(usize),
    /// By its number.
    Worker(usize),
}

/// What is hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// One process.
    Process(Process),
    /// A store, for all.
    Store(Store),
    /// An adapter of the calm day, by its number: streams ask it.
    Adapter(usize),
    /// A job of the storm, by its number.
    Job(usize),
}

/// What is done to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Blow {
    /// SIGKILL; started again, a worker under its old id.
    Kill,
    /// SIGKILL; a worker that is started again has a new id.
    Replace,
    /// SIGTERM; started again so long after it has ended.
    Terminate,
    /// SIGSTOP, later SIGCONT.
    Freeze,
    /// A server is killed and started again: Redis empty, Postgres with what was committed.
    Restart,
    /// Connections break, new ones too.
    Cut,
    /// Connections say nothing any more; later they go on.
    Hush,
    /// One process alone is cut off from a store.
    CutOff(Store),
    /// An operator moves an adapter or a job to another worker.
    Migrate,
    /// An operator has all workers let go of an adapter.
    Evict,
    /// A client pauses a job, and resumes it so long after it was paused.
    Pause,
    /// A client cancels a job.
    Cancel,
}

/// One entry of a schedule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// From the start of the storm.
    pub at: Duration,
    /// Until it is repaired.
    pub lasts: Duration,
    /// Who.
    pub target: Target,
    /// What.
    pub blow: Blow,
    /// Whatever else there is to choose follows from this.
    pub pick: usize,
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Postgres => "Postgres",
            Self::Redis => "Redis",
            Self::Objects => "the object store",
        })
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gateway(number) => write!(f, "gateway {number}"),
            Self::Worker(number) => write!(f, "worker {number}"),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(process) => process.fmt(f),
            Self::Store(store) => store.fmt(f),
            Self::Adapter(number) => write!(f, "adapter {number}"),
            Self::Job(number) => write!(f, "job {number}"),
        }
    }
}

impl fmt::Display for Planned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.blow {
            Blow::Kill => "killed".to_owned(),
            Blow::Replace => "killed, comes back under another id".to_owned(),
            Blow::Terminate => "asked to end".to_owned(),
            Blow::Freeze => "frozen".to_owned(),
            Blow::Restart => "killed, comes back".to_owned(),
            Blow::Cut => "cuts all connections".to_owned(),
            Blow::Hush => "hangs".to_owned(),
            Blow::CutOff(store) => format!("cut off from {store}"),
            Blow::Migrate => "moved".to_owned(),
            Blow::Evict => "evicted".to_owned(),
            Blow::Pause => "paused".to_owned(),
            Blow::Cancel => "cancelled".to_owned(),
        };
        let (at, lasts) = (self.at.as_secs_f64(), self.lasts.as_secs_f64());
        write!(f, "{at:6.1} s  {}: {what}", self.target)?;
        match self.blow {
            Blow::Migrate | Blow::Evict | Blow::Cancel => Ok(()),
            _ => write!(f, ", for {lasts:.1} s"),
        }
    }
}
