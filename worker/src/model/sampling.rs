//! From the final residual to tokens: the output head on the rows that are due, and sampling.

use super::buffers::{StepBuffers, Table, rows, rows_mut};
use super::{MAX_BIAS, Model, Sizes};
use crate::base::{BaseConfig, BaseWeights};
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
    /// Whether any row's log-probability is wanted.
    pub logprobs: bool,
}

/// Downloads of a sampled step, one entry per row.
pub struct Sampled {
    /// Drawn tokens.
    pub tokens: Ticket<Vec<i32>>,
    /// Their raw log-probabilities; empty where nobody wants them.
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
        for (dst, src) in ints.into_iter().filter(|(_, src)| !src.is_empty()) {
            device.upload_int(Out::range(dst, 0, src.len()), src)?;
        }
        let wides = [(&mut self.wide, &host.wide), (&mut self.bias, &host.bias)];
        for (dst, src) in wides.into_iter().filter(|(_, src)| !src.is_empty()) {
            device.upload_wide(Out::range(dst, 0, src.len()), src)?;
        }
        Ok(())
    }
}

impl<D: Device> Model<D> {
    /// Logits `(count, V)` of the batch's sample rows, in the step buffers.
    pub fn head(&mut self, count: usize) -> Result<()> {
        output_head(&self.device, &self.config, &self.base, &mut self.step, count)
    }

    /// Logits of the last [`Model::head`] or [`Model::decode`] on the host: what tests compare.
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
        let told = if host.logprobs { n } else { 0 };
        Ok(Sampled {
            tokens: device.download_int(rows(tokens, 0, n, 1))?,
            logprobs: wide_of(device, rows(logprobs, 0, told, 1))?,
            top_ids: match host.top {
                0 => Ticket::ready(Vec::new()),
                top => device.download_int(rows(top_ids, 0, n, top))?,
            },
            top_logprobs: wide_of(device, rows(top_logprobs, 0, n, host.top))?,
        })
    }
}

/// Wide values on the host; none costs nothing.
fn wide_of<D: Device>(device: &D, values: In<'_, D::Wide>) -> Result<Ticket<Vec<f32>>> {
    match values.len {
        0 => Ok(Ticket::ready(Vec::new())),
        _ => device.download_wide(values),
    }
}

/// Logits `(count, V)` of the rows to sample, from the final residual in the step buffers.
pub(super) fn output_head<D: Device>(
    device: &D,
    config: &BaseConfig,
    base: &BaseWeights<D>,
    step: &mut StepBuffers<D>,
    count: usize,
) -> Result<()> {
    let hidden = config.hidden;
    let at = step.tables.get(Table::SampleRows);
    let at = In::range(at.buffer, at.start, count);
    let gathered = rows_mut(&mut step.last_x, 0, count, hidden);
    device.gather_rows(gathered, In::all(&step.x), at, hidden)?;
    let gathered = rows(&step.last_x, 0, count, hidden);
    let normed = rows_mut(&mut step.last, 0, count, hidden);
    device.rms_norm(normed, gathered, In::all(&base.final_norm), config.rms_eps)?;
    let shape = LinearShape { rows: count, input: hidden, output: config.vocab };
    let logits = rows_mut(&mut step.logits, 0, count, config.vocab);
    device.linear(logits, rows(&step.last, 0, count, hidden), In::all(base.head()), None, shape)
}
