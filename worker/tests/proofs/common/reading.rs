//! Prefill and decode without the engine: rows of sequences put into batches by hand.

use kernels::Device;
use kernels::tables::{SegmentRow, SequenceRow};
use worker::model::{Batch, Model};

/// A sequence with its cache blocks.
#[derive(Clone)]
pub struct Reader {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Slot and rank of its adapter.
    pub adapter: Option<(usize, usize)>,
    /// Its blocks, in order.
    pub blocks: Vec<u32>,
    /// Tokens that went through the model.
    pub cached: usize,
}

impl Reader {
    /// Over `blocks`, which hold all tokens.
    pub fn new(tokens: &[u32], adapter: Option<(usize, usize)>, blocks: Vec<u32>) -> Self {
        Self { tokens: tokens.to_vec(), adapter, blocks, cached: 0 }
    }

    /// Appends its next rows to a batch; every row's logits are wanted.
    pub fn append(&mut self, batch: &mut Batch, rows: usize, block_size: usize) {
        let (first, row) = (self.cached, batch.rows());
        for position in first..first + rows {
            let block = self.blocks[position / block_size] as usize;
            batch.ids.push(self.tokens[position] as i32);
            batch.positions.push(position as i32);
            batch.kv_rows.push((block * block_size + position % block_size) as i32);
            batch.sample_rows.push((row + position - first) as i32);
        }
        let mut entry = [0; SequenceRow::WIDTH];
        entry[SequenceRow::ROW] = row as i32;
        entry[SequenceRow::ROWS] = rows as i32;
        entry[SequenceRow::POSITION] = first as i32;
        entry[SequenceRow::BLOCKS] = batch.blocks.len() as i32;
        batch.sequences.extend_from_slice(&entry);
        batch.blocks.extend(self.blocks.iter().map(|block| *block as i32));
        if let Some((slot, rank)) = self.adapter {
            let mut segment = [0; SegmentRow::WIDTH];
            segment[SegmentRow::ROW] = row as i32;
            segment[SegmentRow::ROWS] = rows as i32;
            segment[SegmentRow::SLOT] = slot as i32;
            segment[SegmentRow::S_START] = batch.rank_rows as i32;
            segment[SegmentRow::POSITION] = first as i32;
            batch.segments.extend_from_slice(&segment);
            batch.rank_rows += rows * rank;
        }
        self.cached += rows;
    }
}

/// Blocks that `tokens` tokens need, from block `first` on.
pub fn blocks(first: u32, tokens: usize, block_size: usize) -> Vec<u32> {
    (first..first + tokens.div_ceil(block_size) as u32).collect()
}

/// Logits of the batch's wanted rows.
pub fn logits<D: Device>(model: &mut Model<D>, batch: &Batch) -> Vec<f32> {
    let count = batch.sample_rows.len();
    model.head(count).unwrap();
    model.logits(count).unwrap().wait().unwrap()
}

/// Logits of all tokens, fed in chunks of `cuts` rows (the rest at once), over poisoned memory.
pub fn read<D: Device>(
    model: &mut Model<D>,
    tokens: &[u32],
    adapter: Option<(usize, usize)>,
    cuts: &[usize],
) -> Vec<f32> {
    let all: Vec<u32> = (0..model.sizes.blocks as u32).collect();
    model.poison_blocks(&all).unwrap();
    model.poison_arena().unwrap();
    let size = model.sizes.block_size;
    // Blocks out of order, so that the block table matters.
    let mut held = blocks(3, tokens.len(), size);
    held.reverse();
    let mut reader = Reader::new(tokens, adapter, held);
    let mut found = Vec::new();
    let mut cuts = cuts.iter().copied();
    while reader.cached < tokens.len() {
        let left = tokens.len() - reader.cached;
        let mut batch = Batch::default();
        reader.append(&mut batch, cuts.next().unwrap_or(left).min(left), size);
        model.forward(&batch).unwrap();
        found.extend(logits(model, &batch));
    }
    found
}
