//! What one forward step computes, as plain host data.
//!
//! Row order: the micro-batch's chunk first, then prefill and decode rows. Tables are in the
//! layouts of [`kernels::tables`].

/// The part of a micro-batch that rides in a step: its rows come first in the batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Micro {
    /// Arena row of the first batch row.
    pub first: usize,
    /// Number of rows.
    pub rows: usize,
    /// Σ rank over the arena rows before `first`: where this chunk's S goes.
    pub rank_rows_before: usize,
    /// Σ rank over this chunk's rows.
    pub rank_rows: usize,
}

/// One forward step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token id of each row `(N)`.
    pub ids: Vec<i32>,
    /// Position of each row in its sequence or example `(N)`.
    pub positions: Vec<i32>,
    /// KV cache row each row is written to, −1 for training rows `(N)`.
    pub kv_rows: Vec<i32>,
    /// Segment table: runs of rows with an adapter, ascending.
    pub segments: Vec<i32>,
    /// Sequence table of paged attention.
    pub sequences: Vec<i32>,
    /// Block numbers of those sequences.
    pub blocks: Vec<i32>,
    /// Batch rows whose next token is wanted.
    pub sample_rows: Vec<i32>,
    /// The training chunk.
    pub micro: Micro,
    /// Σ rank over all rows: next free unit of S.
    pub rank_rows: usize,
}

impl Batch {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.ids.len()
    }

    /// Empties the batch, keeping its memory.
    pub fn clear(&mut self) {
        let Self { ids, positions, kv_rows, segments, sequences, blocks, sample_rows, .. } = self;
        for list in [ids, positions, kv_rows, segments, sequences, blocks, sample_rows] {
            list.clear();
        }
        self.micro = Micro::default();
        self.rank_rows = 0;
    }
}
