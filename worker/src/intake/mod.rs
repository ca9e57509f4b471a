//! Intake: what comes from storage into the engine. With `outlet` the only modules that know both.
//!
//! - [`inbox`]: what comes from gateways; [`requests`]: text → engine.
//! - [`adapters`]: object store → host cache → engine, while everything else goes on.
//! - [`jobs`]: leases; [`job_check`]: validation; [`job_run`]: one job from claim to result, with
//!   [`job_keep`] for its lease and [`job_write`] for its rows.
//! - [`presence`]: what others may know of this worker; [`drain`]: how it leaves.
//! - [`routes`], [`mail`], [`hold`], [`outbox`], [`runs`]: the state behind them, as plain data.

pub mod adapters;
pub mod drain;
pub mod examples;
pub mod hold;
pub mod inbox;
pub mod job_check;
pub mod job_keep;
pub mod job_run;
pub mod job_write;
pub mod jobs;
pub mod mail;
pub mod outbox;
pub mod presence;
pub mod requests;
pub mod routes;
pub mod runs;

use crate::base::BaseConfig;
use crate::engine::command::Command;
use crate::engine::gauges::Gauges;
use crate::options::WorkerOptions;
use crate::text::Text;
use adapters::Adapters;
use routes::Routes;
use runs::Runs;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use storage::Storage;
use tokio::sync::{Notify, mpsc};

/// How soon work that may be left notices that this worker drains.
const DRAIN_LOOK: Duration = Duration::from_millis(100);

/// What all of a worker's tasks share.
pub struct Shared {
    /// What the operator set.
    pub options: WorkerOptions,
    /// Rows, queue, objects.
    pub storage: Storage,
    /// Tokenizer and template.
    pub text: Text,
    /// Shapes of the base.
    pub config: BaseConfig,
    /// Fingerprint of its weights and tokenizer.
    pub base_fingerprint: String,
    /// Device in words.
    pub device: String,
    /// Device numerics: part of every fingerprint.
    pub numerics: String,
    /// Rows and rank-rows of the training arena.
    pub bounds: Bounds,
    /// Random per process start.
    pub incarnation: String,
    /// Into the engine.
    pub commands: mpsc::Sender<Command>,
    /// From the engine.
    pub gauges: Arc<Gauges>,
    /// Where answers go.
    pub routes: Mutex<Routes>,
    /// Weights in host memory.
    pub adapters: Adapters,
    /// Jobs that run here.
    pub runs: Mutex<Runs>,
    /// Rings when a job's row may have changed.
    pub job_bell: Notify,
    /// Takes no new work.
    pub draining: AtomicBool,
    /// Rings when somebody tells this worker to drain.
    pub told_to_drain: Notify,
    /// Rings when the inbox is to be read no more.
    pub closing: Notify,
    /// Adapters to bring onto the device before requests come.
    pub wanted: mpsc::Sender<String>,
}

/// Bounds that intake checks before the engine does.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Rows of the training arena.
    pub arena_rows: usize,
    /// Rank-rows of the training arena.
    pub arena_rank_rows: usize,
}

impl Shared {
    /// Whether a job that runs here is to be saved and left to another worker.
    pub fn gives_up(&self, job: &str) -> bool {
        self.draining.load(Relaxed) || lock(&self.runs).is_moved(job)
    }

    /// Waits until this worker drains.
    pub async fn drains(&self) {
        while !self.draining.load(Relaxed) {
            tokio::time::sleep(DRAIN_LOOK).await;
        }
    }

    /// Sends a command; false when the engine is gone.
    pub async fn command(&self, command: Command) -> bool {
        self.commands.send(command).await.is_ok()
    }
}

/// Locks a mutex whose holders never leave it half changed, so that poison means nothing.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
