//! What an operator may set about a worker, and the memory sizes that follow from it.

use crate::adapters::{AdapterLayout, AdapterShape};
use crate::base::BaseConfig;
use crate::engine::Options as EngineOptions;
use crate::model::Sizes;
use kernels::Module;
use std::time::Duration;

/// Rank that default pool sizes are reckoned with.
const USUAL_RANK: usize = 16;
/// Rank that a job is reckoned with, so that all jobs at once fit the training pool.
const USUAL_JOB_RANK: usize = 64;
/// Key/value memory taken by default, in elements per layer pair; about 1 GiB of f32 in all.
const KV_ELEMENTS: usize = 1 << 28;
/// Labelled rows of one loss slice: short enough that a decode is not kept waiting.
const LOSS_ROWS: usize = 128;
/// Rows of a KV block.
const BLOCK_SIZE: usize = 16;

/// See the module. Every bound has a default that suits the CPU device.
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
    /// Tokens of KV cache; none: about 1 GiB, at most 32 768 tokens.
    pub kv_tokens: Option<usize>,
    /// Rows of the training arena: longest example and largest micro-batch.
    pub arena_rows: usize,
    /// Rows that a micro-batch aims at: smaller means shorter backward slices.
    pub micro_rows: usize,
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
            resident_adapters: 32,
            max_jobs: 4,
            max_rank: 256,
            tpot: Duration::from_millis(45),
            lease: Duration::from_secs(15),
            poll: Duration::from_secs(1),
            host_cache_bytes: 1 << 30,
            sole: false,
            poison: false,
        }
    }
}

impl WorkerOptions {
    /// Memory of a base of these shapes.
    pub fn sizes(&self, config: &BaseConfig) -> Sizes {
        let per_token = 2 * config.layers * config.heads.kv_width();
        let default_kv = (KV_ELEMENTS / per_token).clamp(BLOCK_SIZE, 32_768);
        let kv_tokens = self.kv_tokens.unwrap_or(default_kv).max(BLOCK_SIZE);
        let blocks = kv_tokens / BLOCK_SIZE;
        let longest = self.max_context.unwrap_or(config.context).min(config.context);
        let context = longest.min(blocks * BLOCK_SIZE);
        let arena_rows = self.arena_rows.min(config.context);
        let usual = pages(config, USUAL_RANK);
        let job = pages(config, self.max_rank.min(USUAL_JOB_RANK));
        let largest = pages(config, self.max_rank);
        Sizes {
            step_rows: self.step_rows,
            sample_rows: self.max_sequences,
            arena_rows,
            arena_rank_rows: arena_rows * self.max_rank,
            loss_rows: LOSS_ROWS,
            max_rank: self.max_rank,
            slots: self.resident_adapters + 3 * self.max_jobs,
            // A job takes three runs: one that trains and two that are published in turn.
            pool_pages: (self.resident_adapters * usual + 3 * self.max_jobs * job).max(3 * largest),
            train_pages: (self.max_jobs * job).max(largest),
            blocks,
            block_size: BLOCK_SIZE,
            context,
            max_positions: context.max(arena_rows),
            sequences: self.max_sequences,
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
            poison: self.poison,
        }
    }
}

/// Pages of an adapter of `rank` on all modules.
fn pages(config: &BaseConfig, rank: usize) -> usize {
    let shape = AdapterShape { rank, alpha: 1.0, use_rslora: false, targets: Module::ALL.to_vec() };
    AdapterLayout::new(&config.dims(), &shape).pages()
}
