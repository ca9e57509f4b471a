//! Buffers that a forward step overwrites, and the paged key/value cache.

use super::{Batch, Sizes};
use crate::base::BaseConfig;
use crate::footprint::Footprint;
use kernels::tables::{SegmentRow, SequenceRow};
use kernels::{Buffer, Device, In, Out, Result};

/// Activations of one step, `N = sizes.step_rows`.
pub struct StepBuffers<D: Device> {
    /// Residual stream `(N, H)`.
    pub x: D::Act,
    /// Normed residual `(N, H)`.
    pub h: D::Act,
    /// Fused queries, keys, values `(N, (Q+2K)·D)`.
    pub qkv: D::Act,
    /// Attention output `(N, Q·D)`.
    pub o: D::Act,
    /// What a block adds to the residual `(N, H)`.
    pub delta: D::Act,
    /// Fused gate and up `(N, 2F)`.
    pub gate_up: D::Act,
    /// Gated activation `(N, F)`.
    pub act: D::Act,
    /// S of the group at work.
    pub s: D::Act,
    /// Final-normed rows to sample `(sample_rows, H)`, and their gathered residual.
    pub last: D::Act,
    /// Gathered residual `(sample_rows, H)`.
    pub last_x: D::Act,
    /// Logits `(sample_rows, V)`.
    pub logits: D::Act,
    /// Tables of the batch on the device.
    pub tables: BatchTables<D>,
}

/// Device copies of a [`Batch`]'s tables, one behind another so that one copy carries them all.
pub struct BatchTables<D: Device> {
    packed: D::Int,
    host: Vec<i32>,
    /// Where the batch's tables lie, in the order of [`Table`].
    places: [(usize, usize); 7],
}

/// The tables of a batch.
#[derive(Clone, Copy, Debug)]
pub enum Table {
    /// Token ids `(N)`.
    Ids,
    /// Positions `(N)`.
    Positions,
    /// KV rows `(N)`.
    KvRows,
    /// Rows to sample.
    SampleRows,
    /// Sequence table.
    Sequences,
    /// Segment table.
    Segments,
    /// Block list.
    Blocks,
}

/// Tables start at multiples of so many values.
const TABLE_ALIGN: usize = 8;

impl<D: Device> StepBuffers<D> {
    pub(super) fn new(device: &D, config: &BaseConfig, sizes: &Sizes) -> Result<Self> {
        let n = sizes.step_rows;
        let act = |len: usize| device.alloc_act(len);
        Ok(Self {
            x: act(n * config.hidden)?,
            h: act(n * config.hidden)?,
            qkv: act(n * config.heads.qkv_width())?,
            o: act(n * config.heads.q_width())?,
            delta: act(n * config.hidden)?,
            gate_up: act(n * 2 * config.ffn)?,
            act: act(n * config.ffn)?,
            s: act(n * sizes.max_rank * 3)?,
            last: act(sizes.sample_rows * config.hidden)?,
            last_x: act(sizes.sample_rows * config.hidden)?,
            logits: act(sizes.sample_rows * config.vocab)?,
            tables: BatchTables::new(device, sizes)?,
        })
    }
}

impl<D: Device> StepBuffers<D> {
    /// What [`StepBuffers::new`] takes.
    pub(super) fn footprint(config: &BaseConfig, sizes: &Sizes) -> Footprint {
        let heads = config.heads;
        let residual = 3 * config.hidden + heads.qkv_width() + heads.q_width();
        let row = residual + 3 * config.ffn + 3 * sizes.max_rank;
        let head = 2 * config.hidden + config.vocab;
        let tables = Footprint::int(BatchTables::<D>::capacity(sizes));
        Footprint::act(row * sizes.step_rows + head * sizes.sample_rows) + tables
    }
}

impl<D: Device> BatchTables<D> {
    fn new(device: &D, sizes: &Sizes) -> Result<Self> {
        let packed = device.alloc_int(Self::capacity(sizes))?;
        Ok(Self { packed, host: Vec::with_capacity(Self::capacity(sizes)), places: [(0, 0); 7] })
    }

    fn capacity(sizes: &Sizes) -> usize {
        let lens = [
            sizes.step_rows,
            sizes.step_rows,
            sizes.step_rows,
            sizes.sample_rows,
            sizes.sequences * SequenceRow::WIDTH,
            sizes.step_rows * SegmentRow::WIDTH,
            sizes.blocks.max(sizes.sequences),
        ];
        lens.map(|len| len.next_multiple_of(TABLE_ALIGN)).iter().sum()
    }

    /// Sends the batch's tables to the device. With `whole`, the block list reaches to the end of
    /// the buffer: where tables lie and how long they are then depends on the number of rows only.
    pub(super) fn upload(&mut self, device: &D, batch: &Batch, whole: bool) -> Result<()> {
        let tables = [
            &batch.ids,
            &batch.positions,
            &batch.kv_rows,
            &batch.sample_rows,
            &batch.sequences,
            &batch.segments,
            &batch.blocks,
        ];
        self.host.clear();
        for (table, place) in tables.into_iter().zip(&mut self.places) {
            self.host.resize(self.host.len().next_multiple_of(TABLE_ALIGN), 0);
            *place = (self.host.len(), table.len());
            self.host.extend_from_slice(table);
        }
        device.upload_int(Out::range(&mut self.packed, 0, self.host.len()), &self.host)?;
        let blocks = &mut self.places[Table::Blocks as usize];
        if whole {
            blocks.1 = self.packed.len() - blocks.0;
        }
        Ok(())
    }

    /// One of the tables.
    pub(super) fn get(&self, table: Table) -> In<'_, D::Int> {
        let (start, len) = self.places[table as usize];
        In::range(&self.packed, start, len)
    }
}

/// Paged keys and values, one pair of buffers per layer: `(blocks · block_size, K·D)`.
pub struct KvCache<D: Device> {
    /// Keys after rotation, per layer.
    pub k: Vec<D::Act>,
    /// Values, per layer.
    pub v: Vec<D::Act>,
    block_elements: usize,
}

impl<D: Device> KvCache<D> {
    pub(super) fn new(device: &D, config: &BaseConfig, sizes: &Sizes) -> Result<Self> {
        let block_elements = sizes.block_size * config.heads.kv_width();
        let layer = |_| device.alloc_act(sizes.blocks * block_elements);
        let k = (0..config.layers).map(layer).collect::<Result<_>>()?;
        let v = (0..config.layers).map(layer).collect::<Result<_>>()?;
        Ok(Self { k, v, block_elements })
    }

    /// What [`KvCache::new`] takes.
    pub(super) fn footprint(config: &BaseConfig, sizes: &Sizes) -> Footprint {
        let row = 2 * config.layers * config.heads.kv_width();
        Footprint::act(row * sizes.block_size * sizes.blocks)
    }

    pub(super) fn poison(&mut self, device: &D, blocks: &[u32]) -> Result<()> {
        for buffer in self.k.iter_mut().chain(self.v.iter_mut()) {
            for &block in blocks {
                let start = block as usize * self.block_elements;
                device.fill_act(Out::range(buffer, start, self.block_elements), f32::NAN)?;
            }
        }
        Ok(())
    }
}

/// Rows `[first, first + count)` of a buffer with rows of `width`.
pub(super) fn rows<B: kernels::Buffer>(
    buffer: &B,
    first: usize,
    count: usize,
    width: usize,
) -> In<'_, B> {
    In::range(buffer, first * width, count * width)
}

/// Writable rows, as [`rows`].
pub(super) fn rows_mut<B: kernels::Buffer>(
    buffer: &mut B,
    first: usize,
    count: usize,
    width: usize,
) -> Out<'_, B> {
    Out::range(buffer, first * width, count * width)
}
