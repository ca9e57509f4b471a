//! What an operator may set about a worker. The memory sizes that follow are in [`crate::plan`].

use crate::engine::Options as EngineOptions;
use kernels::Memory;
use std::time::Duration;

/// Labelled rows of one loss slice on the CPU: short enough that a decode is not kept waiting.
const LOSS_ROWS: usize = 128;
/// Rows of logits at once on the CPU, where a product gains nothing from more.
const LOSS_CHUNK_ROWS: usize = 16;

/// See the module. Defaults suit the CPU; [`WorkerOptions::suited`] knows other devices.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// Stable name, also its inbox address.
    pub worker_id: String,
    /// Name under which the base is served.
    pub base_name: String,
    /// Rows of one step, all kinds together: bounds a step's time and memory.
    pub step_rows: usize,
    /// Sequences that run at once; more wait.
    pub max_sequences: usize,
    /// Sequences that may wait or run; more are refused with 503.
    pub max_queue: usize,
    /// Longest sequence; none: the base's context, as far as KV memory holds it.
    pub max_context: Option<usize>,
    /// Most tokens of KV cache; none: what is left of the device's memory, or on the CPU about
    /// 1 GiB, at most 32 768 tokens.
    pub kv_tokens: Option<usize>,
    /// Rows of the training arena: longest example and largest micro-batch.
    pub arena_rows: usize,
    /// Rows that a micro-batch aims at: smaller means shorter backward slices.
    pub micro_rows: usize,
    /// Labelled rows of one loss slice: bounds how long a decode may wait for it.
    pub loss_rows: usize,
    /// Rows of logits that a loss slice holds at once.
    pub loss_chunk_rows: usize,
    /// Share of the device's free memory that may be taken, where the device says how much is free.
    pub memory_fraction: f64,
    /// Adapters on the device beside those of jobs.
    pub resident_adapters: usize,
    /// Jobs that train at once.
    pub max_jobs: usize,
    /// Largest rank.
    pub max_rank: usize,
    /// Objective for the time between two tokens of a stream while jobs train.
    pub tpot: Duration,
    /// Lease of a job: another worker takes over when it is not renewed for so long.
    pub lease: Duration,
    /// How often rows are looked at for work when no message comes.
    pub poll: Duration,
    /// How long requests wait for weights while the object store is away; then they fail.
    pub cold_wait: Duration,
    /// Bytes of adapter weights kept in host memory.
    pub host_cache_bytes: usize,
    /// No other process can be this worker (the embedded form): leases under its name that are
    /// left from an earlier run end at start.
    pub sole: bool,
    /// Fill freed memory with NaN.
    pub poison: bool,
}

impl Default for WorkerOptions {
    fn default() -> Self {
        Self {
            worker_id: "worker".to_owned(),
            base_name: "base".to_owned(),
            step_rows: 256,
            max_sequences: 64,
            max_queue: 1024,
            max_context: None,
            kv_tokens: None,
            arena_rows: 2048,
            micro_rows: 512,
            loss_rows: LOSS_ROWS,
            loss_chunk_rows: LOSS_CHUNK_ROWS,
            memory_fraction: 0.92,
            resident_adapters: 32,
            max_jobs: 4,
            max_rank: 256,
            tpot: Duration::from_millis(45),
            lease: Duration::from_secs(15),
            poll: Duration::from_millis(500),
            cold_wait: Duration::from_secs(10),
            host_cache_bytes: 1 << 30,
            sole: false,
            poison: false,
        }
    }
}

impl WorkerOptions {
    /// Defaults for a device with `memory`: one that reports it is wide, and wants many rows at
    /// once to be busy.
    pub fn suited(memory: Option<Memory>) -> Self {
        if memory.is_none() {
            return Self::default();
        }
        Self {
            step_rows: 2048,
            max_sequences: 256,
            arena_rows: 8192,
            micro_rows: 8192,
            loss_rows: 1024,
            loss_chunk_rows: 1024,
            ..Self::default()
        }
    }

    /// Bounds and objectives of the engine's loop.
    pub fn engine(&self) -> EngineOptions {
        EngineOptions {
            max_queue: self.max_queue,
            max_jobs: self.max_jobs,
            target_rows: self.micro_rows,
            tpot: self.tpot,
            least_rows: 16,
            graphs: false,
            trace: None,
            poison: self.poison,
        }
    }
}
