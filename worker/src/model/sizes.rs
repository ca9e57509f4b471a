//! Sizes of all device memory beside the base, and what each part of it takes.

use super::arena::Arena;
use super::buffers::{KvCache, StepBuffers};
use super::pool::{AdapterPool, TrainPool};
use super::sampling::SampleBuffers;
use crate::base::{BaseConfig, BaseWeights};
use crate::footprint::Footprint;
use kernels::Device;

/// Sizes of all device memory beside the base, fixed at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Rows of one forward step, all kinds together.
    pub step_rows: usize,
    /// Rows whose next token may be sampled in one step.
    pub sample_rows: usize,
    /// Pairs of token and count that all sampled rows of a step may hold together: what penalties
    /// need. A sequence runs only while the running ones leave room for all it may come to.
    pub history: usize,
    /// Rows of the training arena: the longest micro-batch.
    pub arena_rows: usize,
    /// Bound of Σ rows × rank over a micro-batch: what the arena keeps of S.
    pub arena_rank_rows: usize,
    /// Labelled rows of one loss slice.
    pub loss_rows: usize,
    /// Rows of logits that a loss slice holds at once.
    pub loss_chunk_rows: usize,
    /// Largest adapter rank.
    pub max_rank: usize,
    /// Entries of the slot table.
    pub slots: usize,
    /// Pages of the adapter pool (compute precision).
    pub pool_pages: usize,
    /// Pages of the training pool (master weights, gradients, two moments).
    pub train_pages: usize,
    /// KV blocks.
    pub blocks: usize,
    /// Rows of one KV block.
    pub block_size: usize,
    /// Longest sequence that may be served: prompt and generated tokens.
    pub context: usize,
    /// Positions of the rotary tables: of sequences and of training examples.
    pub max_positions: usize,
    /// Sequences in one step.
    pub sequences: usize,
}

/// A part of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The base with its rotary tables.
    Base,
    /// What a forward step overwrites.
    Step,
    /// What a micro-batch keeps, and the backward slice at work.
    Arena,
    /// Adapters' compute weights and the slot table.
    AdapterPool,
    /// Master weights, gradients and moments.
    TrainPool,
    /// Parameters and results of drawing.
    Sampling,
    /// Keys and values.
    Kv,
}

impl Part {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Base => "base weights",
            Self::Step => "step buffers",
            Self::Arena => "training arena",
            Self::AdapterPool => "adapter pool",
            Self::TrainPool => "training pool",
            Self::Sampling => "sampling",
            Self::Kv => "KV cache",
        }
    }
}

impl Sizes {
    /// Longest sequence that can be served: one that has all KV blocks to itself must be able to
    /// end. Training examples may be longer, they use no blocks.
    pub fn longest_sequence(&self) -> usize {
        self.context.min(self.blocks * self.block_size)
    }

    /// What [`super::Model::new`] and the load of the base take, part by part: exactly, as tests
    /// hold it against a device that counts.
    pub fn footprints<D: Device>(&self, config: &BaseConfig) -> [(Part, Footprint); 7] {
        [
            (Part::Base, BaseWeights::<D>::footprint(config, self.max_positions)),
            (Part::Step, StepBuffers::<D>::footprint(config, self)),
            (Part::Arena, Arena::<D>::footprint(config, self)),
            (Part::AdapterPool, AdapterPool::<D>::footprint(self)),
            (Part::TrainPool, TrainPool::<D>::footprint(self)),
            (Part::Sampling, SampleBuffers::<D>::footprint(self)),
            (Part::Kv, KvCache::<D>::footprint(config, self)),
        ]
    }
}
