//! What one forward step computes, as plain host data.
//!
//! Row order: the micro-batch's chunk first, then prefill and decode rows. Tables are in the
//! layouts of [`kernels::tables`].

use kernels::tables::{SegmentRow, SequenceRow};

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

    /// Whether it only decodes: one row a sequence, all of them drawn from, and nothing trains.
    pub fn is_decode(&self) -> bool {
        let rows = self.rows();
        rows > 0
            && self.micro.rows == 0
            && self.sample_rows.len() == rows
            && self.sequences.len() == rows * SequenceRow::WIDTH
    }

    /// Pads a batch that only decodes to `rows` rows, so that one recorded graph serves all smaller
    /// batches. Padded rows are token 0 at position 0; they are written nowhere, belong to no
    /// sequence and no adapter, and nobody reads what they come to. S gets `max_rank` for each row.
    pub fn pad(&mut self, rows: usize, max_rank: usize) {
        debug_assert!((self.is_decode() || self.rows() == 0) && rows >= self.rows());
        let padding = self.rows() as i32..rows as i32;
        self.ids.resize(rows, 0);
        self.positions.resize(rows, 0);
        self.kv_rows.resize(rows, -1);
        self.sample_rows.extend(padding);
        self.sequences.resize(rows * SequenceRow::WIDTH, 0);
        if self.segments.is_empty() {
            return;
        }
        let mut nobody = [0; SegmentRow::WIDTH];
        nobody[SegmentRow::SLOT] = -1;
        while self.segments.len() < rows * SegmentRow::WIDTH {
            self.segments.extend_from_slice(&nobody);
        }
        self.rank_rows = rows * max_rank;
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

/// Rows that a decode of `rows` sequences is padded to: few enough sizes that each is recorded
/// once, close enough together that padding costs little. At most `cap`, which holds all rows.
pub fn bucket(rows: usize, cap: usize) -> usize {
    let step = match rows {
        0..=4 => return rows.next_power_of_two().min(cap),
        5..=48 => 8,
        49..=96 => 16,
        97..=256 => 32,
        _ => 128,
    };
    rows.next_multiple_of(step).min(cap)
}

#[cfg(test)]
mod tests {
    use super::bucket;
    use std::collections::BTreeSet;

    #[test]
    fn buckets_are_few_and_hold_their_rows() {
        let all: BTreeSet<usize> = (1..=256).map(|rows| bucket(rows, 256)).collect();
        let expected = [1, 2, 4, 8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 224, 256];
        assert_eq!(all.into_iter().collect::<Vec<_>>(), expected);
        assert!((1..=700).all(|rows| (rows..=700).contains(&bucket(rows, 700))));
    }
}
