//! From a plan to a batch: flat rows, segment table, block lists.

use super::scheduler::{Plan, Scheduler, Share};
use super::sequence::Sequence;
use crate::model::Batch;
use kernels::tables::{SegmentRow, SequenceRow};

/// Appends the plan's rows to a batch that may hold a training chunk already.
pub fn append(batch: &mut Batch, plan: &Plan, scheduler: &Scheduler, block_size: usize) {
    let training = batch.segments.len();
    for share in &plan.shares {
        if let Some(sequence) = scheduler.get(share.id) {
            append_segment(batch, training, share, sequence);
            append_share(batch, share, sequence, block_size);
        }
    }
}

/// Adds rows to the segment table, `training` values of which are the training chunk's: to the
/// last segment where it has the same adapter and ends there, else as a new one.
fn append_segment(batch: &mut Batch, training: usize, share: &Share, sequence: &Sequence) {
    let Some(slot) = sequence.slot else { return };
    let row = batch.rows() as i32;
    let rank_rows = batch.rank_rows as i32;
    batch.rank_rows += share.rows * sequence.rank;
    let (_, inference) = batch.segments.split_at_mut(training);
    if let Some(last) = inference.chunks_exact_mut(SegmentRow::WIDTH).next_back()
        && last[SegmentRow::SLOT] == slot as i32
        && last[SegmentRow::ROW] + last[SegmentRow::ROWS] == row
    {
        last[SegmentRow::ROWS] += share.rows as i32;
        return;
    }
    let mut segment = [0; SegmentRow::WIDTH];
    segment[SegmentRow::ROW] = row;
    segment[SegmentRow::ROWS] = share.rows as i32;
    segment[SegmentRow::SLOT] = slot as i32;
    segment[SegmentRow::S_START] = rank_rows;
    batch.segments.extend_from_slice(&segment);
}

fn append_share(batch: &mut Batch, share: &Share, sequence: &Sequence, block_size: usize) {
    let row = batch.rows();
    for position in share.first..share.first + share.rows {
        let block = sequence.blocks[position / block_size] as usize;
        batch.ids.push(sequence.tokens[position] as i32);
        batch.positions.push(position as i32);
        batch.kv_rows.push((block * block_size + position % block_size) as i32);
    }
    let mut entry = [0; SequenceRow::WIDTH];
    entry[SequenceRow::ROW] = row as i32;
    entry[SequenceRow::ROWS] = share.rows as i32;
    entry[SequenceRow::POSITION] = share.first as i32;
    entry[SequenceRow::BLOCKS] = batch.blocks.len() as i32;
    batch.sequences.extend_from_slice(&entry);
    let held = (share.first + share.rows).div_ceil(block_size);
    batch.blocks.extend(sequence.blocks[..held].iter().map(|block| *block as i32));

    if share.sample {
        batch.sample_rows.push((row + share.rows - 1) as i32);
    }
}
