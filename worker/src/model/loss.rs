//! The loss slice: final norm, output head and cross-entropy of some labelled rows, and back to
//! the gradient of the final residual.

use super::arena::Scratch;
use super::buffers::{rows, rows_mut};
use super::{Micro, Model};
use kernels::tables::SegmentRow;
use kernels::{Device, In, LossArgs, Out, Result, Ticket};

/// Tables of a micro-batch, as plain host data; see [`super::MicroTables`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LossRows {
    /// Position in its example, per arena row.
    pub positions: Vec<i32>,
    /// Arena row where the row's example starts.
    pub examples: Vec<i32>,
    /// Segment table, whole examples.
    pub segments: Vec<i32>,
    /// Labelled arena rows, ascending.
    pub labelled: Vec<i32>,
    /// Their labels.
    pub labels: Vec<i32>,
    /// Their gradient factors: 1 / trained tokens of the optimizer step.
    pub scale: Vec<f32>,
}

/// What a loss slice reports, per labelled row in order.
pub struct LossTicket {
    /// Cross-entropy.
    pub losses: Ticket<Vec<f32>>,
    /// 1 where the likeliest token is the label.
    pub correct: Ticket<Vec<i32>>,
}

impl<D: Device> Model<D> {
    /// Starts a micro-batch: its tables go to the device. Errors when a table leaves the arena.
    pub fn begin_micro(&mut self, tables: &LossRows) -> Result<()> {
        let device = &self.device;
        let arena = &mut self.arena.tables;
        let ints = [
            (&mut arena.positions, &tables.positions),
            (&mut arena.examples, &tables.examples),
            (&mut arena.segments, &tables.segments),
            (&mut arena.labelled, &tables.labelled),
            (&mut arena.labels, &tables.labels),
        ];
        for (dst, src) in ints {
            device.upload_int(Out::range(dst, 0, src.len()), src)?;
        }
        device.upload_wide(Out::range(&mut arena.scale, 0, tables.scale.len()), &tables.scale)?;
        self.arena.scratch.clear_dx(device, tables.positions.len(), self.config.hidden)
    }

    /// Loss of labelled rows `[first, first + count)`; with `gradient`, `dx` of those rows too.
    pub fn loss_slice(&mut self, first: usize, count: usize, gradient: bool) -> Result<LossTicket> {
        let Self { device, config, base, arena, .. } = self;
        let (hidden, eps) = (config.hidden, config.rms_eps);
        let tables = &arena.tables;
        let Scratch { dx, loss: [x, h, dh, d_rows], logits, losses, correct, .. } =
            &mut arena.scratch;
        let at = rows(&tables.labelled, first, count, 1);
        let norm = In::all(&base.final_norm);
        device.gather_rows(rows_mut(x, 0, count, hidden), In::all(&arena.x_out), at, hidden)?;
        let x = rows(x, 0, count, hidden);
        device.rms_norm(rows_mut(h, 0, count, hidden), x, norm, eps)?;
        let args = LossArgs {
            loss: rows_mut(losses, 0, count, 1),
            correct: rows_mut(correct, 0, count, 1),
            d_hidden: gradient.then(|| rows_mut(&mut *dh, 0, count, hidden)),
            hidden: rows(h, 0, count, hidden),
            lm_head: In::all(base.lm_head.as_ref().unwrap_or(&base.embed)),
            labels: rows(&tables.labels, first, count, 1),
            scale: rows(&tables.scale, first, count, 1),
            logits: Out::all(logits),
        };
        device.lm_head_loss(args, hidden, config.vocab)?;
        if gradient {
            device.fill_act(rows_mut(d_rows, 0, count, hidden), 0.0)?;
            let d = rows_mut(d_rows, 0, count, hidden);
            device.rms_norm_backward(d, rows(dh, 0, count, hidden), x, norm, eps)?;
            device.scatter_rows(Out::all(dx), rows(d_rows, 0, count, hidden), at, hidden)?;
        }
        Ok(LossTicket {
            losses: device.download_wide(rows(losses, 0, count, 1))?,
            correct: device.download_int(rows(correct, 0, count, 1))?,
        })
    }

    /// Losses of the last slice as the device holds them: for proofs that f32 is too coarse for.
    pub fn slice_losses(&self) -> &D::Wide {
        &self.arena.scratch.losses
    }
}

impl LossRows {
    /// Rows of the micro-batch.
    pub fn rows(&self) -> usize {
        self.positions.len()
    }

    /// The chunk of `[first, first + count)` rows, given each row's rank.
    pub fn chunk(ranks: &[u32], first: usize, count: usize) -> Micro {
        let sum = |range: &[u32]| range.iter().map(|&rank| rank as usize).sum();
        Micro {
            first,
            rows: count,
            rank_rows_before: sum(&ranks[..first]),
            rank_rows: sum(&ranks[first..first + count]),
        }
    }

    /// Number of segments.
    pub fn segment_count(&self) -> usize {
        self.segments.len() / SegmentRow::WIDTH
    }
}
