//! Device memory of adapters: a pool of compute weights with a slot table, and the optimizer
//! state of those that train. Which run of pages belongs to whom is decided in `adapters`.

use super::Sizes;
use crate::footprint::Footprint;
use kernels::tables::{PAGE, SlotRow};
use kernels::{Device, Out, Result};

/// Compute weights of all resident adapters, and the table that names their runs.
pub struct AdapterPool<D: Device> {
    /// `pool_pages · PAGE` elements.
    pub weights: D::Act,
    /// `(slots, SlotRow::WIDTH)`.
    pub table: D::Int,
}

impl<D: Device> AdapterPool<D> {
    pub(super) fn new(device: &D, sizes: &Sizes) -> Result<Self> {
        Ok(Self {
            weights: device.alloc_act(sizes.pool_pages * PAGE)?,
            table: device.alloc_int(sizes.slots * SlotRow::WIDTH)?,
        })
    }

    /// What [`AdapterPool::new`] takes.
    pub(super) fn footprint(sizes: &Sizes) -> Footprint {
        Footprint::act(sizes.pool_pages * PAGE) + Footprint::int(sizes.slots * SlotRow::WIDTH)
    }

    /// Points `slot` at a run.
    pub fn set_slot(&mut self, device: &D, slot: usize, row: &[i32; SlotRow::WIDTH]) -> Result<()> {
        let range = Out::range(&mut self.table, slot * SlotRow::WIDTH, SlotRow::WIDTH);
        device.upload_int(range, row)
    }

    /// Writes weights (canonical layout, f32) to the run that starts at `page`.
    pub fn write(&mut self, device: &D, page: usize, values: &[f32]) -> Result<()> {
        device.upload_act(Out::range(&mut self.weights, page * PAGE, values.len()), values)
    }

    /// Copies a run of `len` elements onto another.
    pub fn copy(&mut self, device: &D, from: usize, to: usize, len: usize) -> Result<()> {
        device.move_act(&mut self.weights, from * PAGE, to * PAGE, len)
    }

    /// Overwrites a freed run with NaN, so that a stale slot cannot go unnoticed.
    pub fn poison(&mut self, device: &D, page: usize, pages: usize) -> Result<()> {
        let range = Out::range(&mut self.weights, page * PAGE, pages * PAGE);
        device.fill_act(range, f32::NAN)
    }
}

/// Optimizer state of training adapters; runs are at the same page in all four buffers.
pub struct TrainPool<D: Device> {
    /// Master weights.
    pub params: D::Wide,
    /// Summed gradients of the optimizer step under way.
    pub grads: D::Wide,
    /// First moments.
    pub m: D::Wide,
    /// Second moments.
    pub v: D::Wide,
    /// Gradient norm and finite flag of the last [`Device::grad_norm`].
    pub norm: D::Wide,
}

impl<D: Device> TrainPool<D> {
    pub(super) fn new(device: &D, sizes: &Sizes) -> Result<Self> {
        let wide = || device.alloc_wide(sizes.train_pages * PAGE);
        Ok(Self {
            params: wide()?,
            grads: wide()?,
            m: wide()?,
            v: wide()?,
            norm: device.alloc_wide(2)?,
        })
    }

    /// What [`TrainPool::new`] takes.
    pub(super) fn footprint(sizes: &Sizes) -> Footprint {
        Footprint::wide(4 * sizes.train_pages * PAGE + 2)
    }

    /// Loads a job's state: masters, and moments where it has trained before. Clears gradients.
    pub fn load(
        &mut self,
        device: &D,
        page: usize,
        params: &[f32],
        moments: Option<(&[f32], &[f32])>,
    ) -> Result<()> {
        let (start, len) = (page * PAGE, params.len());
        device.upload_wide(Out::range(&mut self.params, start, len), params)?;
        device.fill_wide(Out::range(&mut self.grads, start, len), 0.0)?;
        if let Some((m, v)) = moments {
            device.upload_wide(Out::range(&mut self.m, start, len), m)?;
            return device.upload_wide(Out::range(&mut self.v, start, len), v);
        }
        device.fill_wide(Out::range(&mut self.m, start, len), 0.0)?;
        device.fill_wide(Out::range(&mut self.v, start, len), 0.0)
    }
}
