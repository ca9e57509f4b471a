//! The micro-batch in flight: a cursor that stops anywhere, in both directions.
//!
//! Forward goes in chunks of rows that ride in serving steps; then the loss in chunks of labelled
//! rows; then backward layer by layer over all rows. Between any two of these the engine may run
//! whatever else is due. Where the cuts fall changes no result.

use super::Sequence;
use crate::model::{Batch, Extent, LossRows, LossTicket};
use kernels::tables::SegmentRow;
use kernels::{Result, Ticket};
use std::collections::VecDeque;

/// Whether gradients are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Forward, loss, backward.
    Train,
    /// Forward and loss.
    Evaluate,
}

/// One sequence of an example in a micro-batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// The job's number in the engine.
    pub job: u64,
    /// Slot of its training weights.
    pub slot: usize,
    /// Its rank.
    pub rank: usize,
    /// Dropout seed of the example in this step.
    pub dropout_seed: u64,
    /// Dropout probability; 0 in evaluation.
    pub dropout: f32,
    /// Gradient factor: 1 / trained tokens of the optimizer step.
    pub scale: f32,
}

/// What one sequence came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ItemResult {
    /// The job's number in the engine.
    pub job: u64,
    /// Summed cross-entropy over its labels, in row order.
    pub loss: f64,
    /// Labels that were the likeliest token.
    pub correct: u64,
    /// Labels.
    pub labels: u64,
}

/// The next piece of work after forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slice {
    /// Loss of labelled rows `[first, first + count)`.
    Loss {
        /// First labelled row.
        first: usize,
        /// How many.
        count: usize,
    },
    /// Backward of a layer.
    Layer(usize),
    /// All is enqueued; results come when their copies have.
    Settle,
}

struct Placed {
    item: Item,
    first: usize,
    rows: usize,
    labels: usize,
}

/// See the module.
pub struct Cursor {
    kind: Kind,
    placed: Vec<Placed>,
    ids: Vec<i32>,
    ranks: Vec<u32>,
    tables: LossRows,
    forwarded: usize,
    lost: usize,
    layers_left: usize,
    pending: VecDeque<LossTicket>,
    losses: Vec<f32>,
    correct: Vec<i32>,
}

impl Cursor {
    /// Lays sequences out one after another, without padding.
    pub fn new(kind: Kind, layers: usize, items: Vec<(Item, &Sequence)>) -> Self {
        let mut cursor = Self {
            kind,
            placed: Vec::with_capacity(items.len()),
            ids: Vec::new(),
            ranks: Vec::new(),
            tables: LossRows::default(),
            forwarded: 0,
            lost: 0,
            layers_left: if kind == Kind::Train { layers } else { 0 },
            pending: VecDeque::new(),
            losses: Vec::new(),
            correct: Vec::new(),
        };
        let mut rank_rows = 0;
        for (item, sequence) in items {
            cursor.place(item, sequence, &mut rank_rows);
        }
        cursor
    }

    fn place(&mut self, item: Item, sequence: &Sequence, rank_rows: &mut usize) {
        let (first, rows) = (self.ids.len(), sequence.rows());
        let tables = &mut self.tables;
        push_segment(&mut tables.segments, first, rows, *rank_rows, &item, 0);
        for row in 0..rows {
            self.ids.push(sequence.tokens[row] as i32);
            self.ranks.push(item.rank as u32);
            tables.positions.push(row as i32);
            tables.examples.push(first as i32);
            if let Some(label) = sequence.label(row) {
                tables.labelled.push((first + row) as i32);
                tables.labels.push(label as i32);
                tables.scale.push(item.scale);
            }
        }
        *rank_rows += rows * item.rank;
        self.placed.push(Placed { item, first, rows, labels: sequence.labels() });
    }

    /// Tables of the whole micro-batch.
    pub fn tables(&self) -> &LossRows {
        &self.tables
    }

    /// Whether gradients are wanted.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// How much of the arena it uses.
    pub fn extent(&self) -> Extent {
        Extent {
            rows: self.ids.len(),
            rank_rows: self.ranks.iter().map(|rank| *rank as usize).sum(),
            segments: self.tables.segments.len(),
        }
    }

    /// Rows of the micro-batch.
    pub fn rows(&self) -> usize {
        self.ids.len()
    }

    /// Rows that still have to go forward.
    pub fn forward_left(&self) -> usize {
        self.ids.len() - self.forwarded
    }

    /// Puts the next `rows` rows into an empty batch.
    pub fn fill(&self, batch: &mut Batch, rows: usize) {
        let (first, end) = (self.forwarded, self.forwarded + rows);
        batch.micro = LossRows::chunk(&self.ranks, first, rows);
        batch.ids.extend_from_slice(&self.ids[first..end]);
        batch.positions.extend_from_slice(&self.tables.positions[first..end]);
        batch.kv_rows.resize(rows, -1);
        for placed in &self.placed {
            let from = placed.first.max(first);
            let to = (placed.first + placed.rows).min(end);
            if from < to {
                let (rows, start) = (to - from, batch.rank_rows);
                let position = from - placed.first;
                push_segment(
                    &mut batch.segments,
                    from - first,
                    rows,
                    start,
                    &placed.item,
                    position,
                );
                batch.rank_rows += rows * placed.item.rank;
            }
        }
    }

    /// The chunk of `rows` went through.
    pub fn advance(&mut self, rows: usize) {
        self.forwarded += rows;
    }

    /// What comes next; `None` while rows still have to go forward.
    pub fn slice(&self, loss_rows: usize) -> Option<Slice> {
        if self.forward_left() > 0 {
            return None;
        }
        let count = (self.tables.labelled.len() - self.lost).min(loss_rows);
        Some(match (count, self.layers_left) {
            (0, 0) => Slice::Settle,
            (0, left) => Slice::Layer(left - 1),
            _ => Slice::Loss { first: self.lost, count },
        })
    }

    /// A loss slice was enqueued.
    pub fn loss_enqueued(&mut self, count: usize, ticket: LossTicket) {
        self.lost += count;
        self.pending.push_back(ticket);
    }

    /// A layer's backward was enqueued.
    pub fn layer_enqueued(&mut self) {
        self.layers_left -= 1;
    }

    /// Per sequence, once all copies have come; `None` before.
    pub fn settle(&mut self) -> Result<Option<Vec<ItemResult>>> {
        while let Some(front) = self.pending.front() {
            if !(front.losses.is_ready() && front.correct.is_ready()) {
                return Ok(None);
            }
            if let Some(ticket) = self.pending.pop_front() {
                self.losses.extend(Ticket::wait(ticket.losses)?);
                self.correct.extend(Ticket::wait(ticket.correct)?);
            }
        }
        let mut at = 0;
        let sum = |placed: &Placed| {
            let range = at..at + placed.labels;
            at += placed.labels;
            ItemResult {
                job: placed.item.job,
                loss: self.losses[range.clone()].iter().map(|loss| f64::from(*loss)).sum(),
                correct: self.correct[range].iter().filter(|hit| **hit != 0).count() as u64,
                labels: placed.labels as u64,
            }
        };
        Ok(Some(self.placed.iter().map(sum).collect()))
    }

    /// Job of each sequence, in order.
    pub fn jobs(&self) -> Vec<u64> {
        self.placed.iter().map(|placed| placed.item.job).collect()
    }

    /// Whether its rows read or train slots of a job.
    pub fn uses(&self, job: u64) -> bool {
        self.placed.iter().any(|placed| placed.item.job == job)
    }
}

fn push_segment(
    table: &mut Vec<i32>,
    row: usize,
    rows: usize,
    rank_rows: usize,
    item: &Item,
    position: usize,
) {
    let mut entry = [0; SegmentRow::WIDTH];
    entry[SegmentRow::ROW] = row as i32;
    entry[SegmentRow::ROWS] = rows as i32;
    entry[SegmentRow::SLOT] = item.slot as i32;
    entry[SegmentRow::S_START] = rank_rows as i32;
    entry[SegmentRow::SEED_LO] = item.dropout_seed as u32 as i32;
    entry[SegmentRow::SEED_HI] = (item.dropout_seed >> 32) as u32 as i32;
    entry[SegmentRow::DROPOUT_BITS] = item.dropout.to_bits() as i32;
    entry[SegmentRow::POSITION] = position as i32;
    table.extend_from_slice(&entry);
}
