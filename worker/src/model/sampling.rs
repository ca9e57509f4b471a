//! From the final residual to tokens: the output head on the rows that are due, and sampling.

use super::buffers::{rows, rows_mut};
use super::{MAX_BIAS, Model, Sizes};
use crate::footprint::Footprint;
use kernels::tables::{SampleArgs, SampleOut, SampleRow, SampleShape};
use kernels::{Device, In, LinearShape, Out, Result, Ticket};

/// Most alternatives reported per token.
pub const MAX_TOP: usize = 20;

/// Sampling parameters of one step as plain host data; columns as [`SampleRow`] says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SampleRows {
    /// `(rows, SampleRow::WIDE)`.
    pub wide: Vec<f32>,
    /// `(rows, SampleRow::INT)`.
    pub int: Vec<i32>,
    /// Pairs of token and count.
    pub history: Vec<i32>,
    /// Biased token ids.
    pub bias_ids: Vec<i32>,
    /// Their biases.
    pub bias: Vec<f32>,
    /// Alternatives wanted by the most demanding row.
    pub top: usize,
}

/// Downloads of a sampled step, one entry per row.
pub struct Sampled {
    /// Drawn tokens.
    pub tokens: Ticket<Vec<i32>>,
    /// Their raw log-probabilities.
    pub logprobs: Ticket<Vec<f32>>,
    /// `(rows, top)` likeliest ids.
    pub top_ids: Ticket<Vec<i32>>,
    /// `(rows, top)` their log-probabilities.
    pub top_logprobs: Ticket<Vec<f32>>,
}

/// Device buffers of sampling.
pub struct SampleBuffers<D: Device> {
    wide: D::Wide,
    int: D::Int,
    history: D::Int,
    bias_ids: D::Int,
    bias: D::Wide,
    tokens: D::Int,
    logprobs: D::Wide,
    top_ids: D::Int,
    top_logprobs: D::Wide,
}

impl<D: Device> SampleBuffers<D> {
    pub(super) fn new(device: &D, sizes: &Sizes) -> Result<Self> {
        let n = sizes.sample_rows;
        let bias = n * MAX_BIAS;
        Ok(Self {
            wide: device.alloc_wide(n * SampleRow::WIDE)?,
            int: device.alloc_int(n * SampleRow::INT)?,
            history: device.alloc_int(sizes.history * 2)?,
            bias_ids: device.alloc_int(bias)?,
            bias: device.alloc_wide(bias)?,
            tokens: device.alloc_int(n)?,
            logprobs: device.alloc_wide(n)?,
            top_ids: device.alloc_int(n * MAX_TOP)?,
            top_logprobs: device.alloc_wide(n * MAX_TOP)?,
        })
    }

    /// What [`SampleBuffers::new`] takes.
    pub(super) fn footprint(sizes: &Sizes) -> Footprint {
        let parameters = Footprint::wide(SampleRow::WIDE) + Footprint::int(SampleRow::INT);
        let bias = Footprint::wide(MAX_BIAS) + Footprint::int(MAX_BIAS);
        let result = Footprint::wide(1 + MAX_TOP) + Footprint::int(1 + MAX_TOP);
        (parameters + bias + result) * sizes.sample_rows + Footprint::int(sizes.history * 2)
    }

    fn upload(&mut self, device: &D, host: &SampleRows) -> Result<()> {
        let ints = [
            (&mut self.int, &host.int),
            (&mut self.history, &host.history),
            (&mut self.bias_ids, &host.bias_ids),
        ];
        for (dst, src) in ints {
            device.upload_int(Out::range(dst, 0, src.len()), src)?;
        }
        device.upload_wide(Out::range(&mut self.wide, 0, host.wide.len()), &host.wide)?;
        device.upload_wide(Out::range(&mut self.bias, 0, host.bias.len()), &host.bias)
    }
}

impl<D: Device> Model<D> {
    /// Logits `(count, V)` of the batch's sample rows, in the step buffers.
    pub fn head(&mut self, count: usize) -> Result<()> {
        let Self { device, config, base, step, .. } = self;
        let hidden = config.hidden;
        let at = rows(&step.tables.sample_rows, 0, count, 1);
        let gathered = rows_mut(&mut step.last_x, 0, count, hidden);
        device.gather_rows(gathered, In::all(&step.x), at, hidden)?;
        let gathered = rows(&step.last_x, 0, count, hidden);
        let normed = rows_mut(&mut step.last, 0, count, hidden);
        device.rms_norm(normed, gathered, In::all(&base.final_norm), config.rms_eps)?;
        let shape = LinearShape { rows: count, input: hidden, output: config.vocab };
        let weight = In::all(base.lm_head.as_ref().unwrap_or(&base.embed));
        let logits = rows_mut(&mut step.logits, 0, count, config.vocab);
        device.linear(logits, rows(&step.last, 0, count, hidden), weight, None, shape)
    }

    /// Logits of the last [`Model::head`] on the host: what tests compare.
    pub fn logits(&self, count: usize) -> Result<Ticket<Vec<f32>>> {
        self.device.download_act(rows(&self.step.logits, 0, count, self.config.vocab))
    }

    /// Draws a token for each of the first rows of logits.
    pub fn sample(&mut self, host: &SampleRows) -> Result<Sampled> {
        let Self { device, config, step, sampling, .. } = self;
        sampling.upload(device, host)?;
        let n = host.int.len() / SampleRow::INT;
        let shape = SampleShape { rows: n, vocab: config.vocab, top: host.top };
        let SampleBuffers {
            wide,
            int,
            history,
            bias_ids,
            bias,
            tokens,
            logprobs,
            top_ids,
            top_logprobs,
        } = sampling;
        let args = SampleArgs {
            wide: rows(wide, 0, n, SampleRow::WIDE),
            int: rows(int, 0, n, SampleRow::INT),
            history: rows(history, 0, host.history.len(), 1),
            bias_ids: rows(bias_ids, 0, host.bias_ids.len(), 1),
            bias: rows(bias, 0, host.bias.len(), 1),
        };
        let out = SampleOut {
            tokens: rows_mut(tokens, 0, n, 1),
            logprobs: rows_mut(logprobs, 0, n, 1),
            top_ids: rows_mut(top_ids, 0, n, host.top),
            top_logprobs: rows_mut(top_logprobs, 0, n, host.top),
        };
        device.sample(out, rows_mut(&mut step.logits, 0, n, config.vocab), &args, shape)?;
        Ok(Sampled {
            tokens: device.download_int(rows(tokens, 0, n, 1))?,
            logprobs: device.download_wide(rows(logprobs, 0, n, 1))?,
            top_ids: device.download_int(rows(top_ids, 0, n, host.top))?,
            top_logprobs: device.download_wide(rows(top_logprobs, 0, n, host.top))?,
        })
    }
}
