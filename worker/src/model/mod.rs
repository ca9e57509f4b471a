//! The decoder: each layer's forward beside its backward, generic over the device.
//!
//! Sees a [`Batch`] of flat rows and device buffers; knows no request, job, file or queue.
//! All memory is taken in [`Model::new`]; nothing is allocated inside a step. The base is never
//! written after load.

mod arena;
mod backward;
mod batch;
mod buffers;
mod forward;
mod groups;
mod loss;
mod pool;
mod sampling;
mod sizes;

pub use backward::Extent;
pub use batch::{Batch, Micro, bucket};
use groups::Groups;
pub use loss::{LossRows, LossTicket};
pub use pool::{AdapterPool, TrainPool};
pub use sampling::{MAX_TOP, SampleRows, Sampled};
pub use sizes::{Part, Sizes};

use arena::Arena;
use buffers::{KvCache, StepBuffers};
use sampling::SampleBuffers;

use crate::base::{BaseConfig, BaseWeights};
use kernels::Device;

/// Most biased tokens of one request.
pub const MAX_BIAS: usize = 1024;

/// A base on a device with all buffers a step needs.
pub struct Model<D: Device> {
    /// The device.
    pub device: D,
    /// Shapes of the base.
    pub config: BaseConfig,
    /// Memory sizes.
    pub sizes: Sizes,
    /// Frozen weights.
    pub base: BaseWeights<D>,
    /// Adapters' compute weights and the slot table.
    pub pool: AdapterPool<D>,
    /// Master weights, gradients and moments of training adapters.
    pub train: TrainPool<D>,
    groups: Groups,
    step: StepBuffers<D>,
    kv: KvCache<D>,
    arena: Arena<D>,
    sampling: SampleBuffers<D>,
}

impl<D: Device> Model<D> {
    /// Takes all memory. Errors when it does not fit.
    pub fn new(
        device: D,
        config: BaseConfig,
        base: BaseWeights<D>,
        sizes: Sizes,
    ) -> kernels::Result<Self> {
        let groups = Groups::new(&config);
        let step = StepBuffers::new(&device, &config, &sizes)?;
        let kv = KvCache::new(&device, &config, &sizes)?;
        let arena = Arena::new(&device, &config, &sizes)?;
        let pool = AdapterPool::new(&device, &sizes)?;
        let train = TrainPool::new(&device, &sizes)?;
        let sampling = SampleBuffers::new(&device, &sizes)?;
        Ok(Self { device, config, sizes, base, pool, train, groups, step, kv, arena, sampling })
    }

    /// Fills the training arena with NaN: what tests do between micro-batches.
    pub fn poison_arena(&mut self) -> kernels::Result<()> {
        self.arena.poison(&self.device)
    }

    /// Fills freed KV blocks with NaN, likewise.
    pub fn poison_blocks(&mut self, blocks: &[u32]) -> kernels::Result<()> {
        self.kv.poison(&self.device, blocks)
    }
}
