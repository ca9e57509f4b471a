//! The memory plan: how large each part of device memory becomes, decided once at start.
//!
//! Where the device says how much is free, everything but the KV cache has a size from the options
//! and the cache takes what is left; where it does not (the CPU), the cache has a size as well.

use crate::adapters::{AdapterLayout, AdapterShape};
use crate::base::BaseConfig;
use crate::footprint::Footprint;
use crate::model::{Part, Sizes};
use crate::options::WorkerOptions;
use kernels::{Device, Memory, Module};
use std::fmt;

/// Rank that default pool sizes are reckoned with.
const USUAL_RANK: usize = 16;
/// Rank that a job is reckoned with, so that all jobs at once fit the training pool.
const USUAL_JOB_RANK: usize = 64;
/// Key/value memory taken where the device does not say what is free, in elements per layer pair;
/// about 1 GiB of f32 in all.
const KV_ELEMENTS: usize = 1 << 28;
/// Rows of a KV block.
const BLOCK_SIZE: usize = 16;
/// Pairs of token and count for penalties, of all sequences together: 32 MiB.
const HISTORY_PAIRS: usize = 1 << 22;
/// Left to the device's libraries and recorded graphs.
const WORKSPACE_BYTES: u64 = 512 << 20;
/// Tokens of KV cache below which serving is not worth a start.
const LEAST_KV_TOKENS: usize = 2048;

/// The parts of device memory and their sum. Displays as a table.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryPlan {
    /// Sizes that follow.
    pub sizes: Sizes,
    /// Bytes by part.
    pub parts: Vec<(&'static str, u64)>,
    /// What was free, where the device says so.
    pub free: Option<u64>,
    /// What of it may be taken.
    pub usable: Option<u64>,
}

/// A model and its buffers do not fit.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error(
    "the model does not fit into device memory: {wanted} are needed, {usable} may be taken of \
         {free} that are free\n{table}\
         Take less with --arena-rows, --max-jobs, --resident-adapters, --max-rank, --step-rows, \
         --max-sequences or --kv-tokens"
)]
pub struct DoesNotFit {
    wanted: Bytes,
    usable: Bytes,
    free: Bytes,
    table: String,
}

/// A number of bytes; displays in GiB or MiB.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Bytes(u64);

impl MemoryPlan {
    /// All bytes.
    pub fn total(&self) -> u64 {
        self.parts.iter().map(|part| part.1).sum()
    }
}

impl WorkerOptions {
    /// Memory sizes for a base of these shapes on a device of type `D` that has `memory`.
    pub fn plan<D: Device>(
        &self,
        config: &BaseConfig,
        memory: Option<Memory>,
    ) -> Result<MemoryPlan, DoesNotFit> {
        let Some(memory) = memory else {
            let per_token = 2 * config.layers * config.heads.kv_width();
            let usual = (KV_ELEMENTS / per_token).clamp(BLOCK_SIZE, 32_768);
            let kv_tokens = self.kv_tokens.unwrap_or(usual).max(BLOCK_SIZE);
            return Ok(table::<D>(config, self.sizes(config, kv_tokens / BLOCK_SIZE), None));
        };
        let free = (memory.free, (memory.free as f64 * self.memory_fraction) as u64);
        let longest = self.max_context.unwrap_or(config.context).min(config.context);
        let useful = (self.max_sequences * longest).min(self.kv_tokens.unwrap_or(usize::MAX));
        let wanted = useful.div_ceil(BLOCK_SIZE).max(1);
        // With all the context; a cache too small for it makes other parts smaller, not larger.
        let rest = table::<D>(config, self.sizes(config, wanted), Some(free));
        let kv_bytes = rest.parts.last().map_or(0, |kv| kv.1);
        let per_block = kv_bytes / wanted as u64;
        let left = free.1.saturating_sub(rest.total() - kv_bytes);
        let blocks = ((left / per_block) as usize).min(wanted);
        let least = LEAST_KV_TOKENS.min(longest).min(useful).div_ceil(BLOCK_SIZE);
        let plan = table::<D>(config, self.sizes(config, blocks.max(least)), Some(free));
        if blocks < least {
            return Err(DoesNotFit {
                wanted: Bytes(plan.total()),
                usable: Bytes(free.1),
                free: Bytes(free.0),
                table: plan.to_string(),
            });
        }
        Ok(plan)
    }

    /// Sizes with so many KV blocks.
    fn sizes(&self, config: &BaseConfig, blocks: usize) -> Sizes {
        let longest = self.max_context.unwrap_or(config.context).min(config.context);
        let context = longest.min(blocks * BLOCK_SIZE);
        let arena_rows = self.arena_rows.min(config.context);
        let usual = pages(config, USUAL_RANK);
        let job = pages(config, self.max_rank.min(USUAL_JOB_RANK));
        let largest = pages(config, self.max_rank);
        Sizes {
            step_rows: self.step_rows,
            sample_rows: self.max_sequences,
            history: (self.max_sequences * context).min(HISTORY_PAIRS.max(context)),
            arena_rows,
            arena_rank_rows: arena_rows * self.max_rank,
            loss_rows: self.loss_rows,
            loss_chunk_rows: self.loss_chunk_rows.min(self.loss_rows),
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
}

fn table<D: Device>(config: &BaseConfig, sizes: Sizes, free: Option<(u64, u64)>) -> MemoryPlan {
    // A device that reports its memory computes in bf16; the CPU in f32.
    let act_bytes = if free.is_some() { 2 } else { 4 };
    let bytes = |(part, footprint): (Part, Footprint)| (part.name(), footprint.bytes(act_bytes));
    let mut parts: Vec<_> = sizes.footprints::<D>(config).map(bytes).into();
    if free.is_some() {
        parts.insert(parts.len() - 1, ("device workspace", WORKSPACE_BYTES));
    }
    MemoryPlan { sizes, parts, free: free.map(|free| free.0), usable: free.map(|free| free.1) }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sizes = &self.sizes;
        for (name, bytes) in &self.parts {
            let note = match *name {
                name if name == Part::Step.name() => format!("{} rows", sizes.step_rows),
                name if name == Part::Arena.name() => format!("{} rows", sizes.arena_rows),
                name if name == Part::AdapterPool.name() => format!("{} slots", sizes.slots),
                name if name == Part::Kv.name() => {
                    format!("{} tokens", sizes.blocks * sizes.block_size)
                }
                _ => String::new(),
            };
            writeln!(f, "{}", format!("  {name:<18}{:>11}  {note}", Bytes(*bytes)).trim_end())?;
        }
        writeln!(f, "  {:<18}{:>11}", "total", Bytes(self.total()))?;
        if let (Some(free), Some(usable)) = (self.free, self.usable) {
            let (free, usable) = (Bytes(free), Bytes(usable));
            writeln!(f, "  {:<18}{free:>11}  {usable} may be taken", "free")?;
        }
        Ok(())
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.0 as f64 / (1 << 20) as f64;
        let text = match mib {
            mib if mib >= 1024.0 => format!("{:.2} GiB", mib / 1024.0),
            mib => format!("{mib:.1} MiB"),
        };
        f.pad(&text)
    }
}

/// Pages of an adapter of `rank` on all modules.
fn pages(config: &BaseConfig, rank: usize) -> usize {
    let shape = AdapterShape { rank, alpha: 1.0, use_rslora: false, targets: Module::ALL.to_vec() };
    AdapterLayout::new(&config.dims(), &shape).pages()
}
