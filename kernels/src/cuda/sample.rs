//! Sampling: a scan of all rows by many warps, then one block per row that draws.

use half::bf16;

use super::launch::{Grid, launch};
use super::memory::{Address, Buf};
use super::{Cuda, SCRATCH_BYTES};
use crate::tables::{SampleArgs, SampleOut, SampleRow, SampleShape};
use crate::{Out, Result};

/// Logits that one warp scans; as in `sample.cuh`.
const PART: usize = 1024;
/// Ids that the selection's keys have room for, and masses that add up without overflow.
const MAX_VOCAB: usize = 1 << 19;

/// Draws one token per row.
pub(super) fn sample(
    cuda: &Cuda,
    out: SampleOut<'_, Cuda>,
    logits: Out<'_, Buf<bf16>>,
    args: &SampleArgs<'_, Cuda>,
    shape: SampleShape,
) -> Result<()> {
    let SampleShape { rows, vocab, top } = shape;
    assert!(logits.len == rows * vocab && vocab > 0, "logits to sample");
    assert!(vocab <= MAX_VOCAB, "vocabulary {vocab} above {MAX_VOCAB}");
    assert!(out.tokens.len == rows && out.logprobs.len == rows, "rows to sample");
    assert!(out.top_ids.len == rows * top && out.top_logprobs.len == rows * top, "alternatives");
    assert_eq!(args.wide.len, rows * SampleRow::WIDE, "parameters of rows to sample");
    assert_eq!(args.int.len, rows * SampleRow::INT, "parameters of rows to sample");
    let parts = vocab.div_ceil(PART);
    let chunk = SCRATCH_BYTES / Scratch::bytes(1, parts, top.max(1));
    for first in (0..rows).step_by(chunk) {
        let part = SampleShape { rows: chunk.min(rows - first), ..shape };
        sample_rows(cuda, &out, &logits, args, first, part)?;
    }
    Ok(())
}

/// Where the scan leaves its results.
struct Scratch {
    values: u64,
    sums: u64,
    bests: u64,
}

impl Scratch {
    /// Bytes for `rows` rows of `parts` parts that report `kept` logits each.
    fn bytes(rows: usize, parts: usize, kept: usize) -> usize {
        rows * parts * (PART * size_of::<f32>() + 2 * size_of::<f32>() + kept * size_of::<u32>())
    }
    fn take(cuda: &Cuda, rows: usize, parts: usize, kept: usize) -> Result<Self> {
        let values = cuda.scratch(Self::bytes(rows, parts, kept))?;
        let sums = values + (rows * parts * PART * size_of::<f32>()) as u64;
        let bests = sums + (rows * parts * 2 * size_of::<f32>()) as u64;
        Ok(Self { values, sums, bests })
    }
}

/// Rows from `first`, as many as `shape` says and the scratch memory holds.
fn sample_rows(
    cuda: &Cuda,
    out: &SampleOut<'_, Cuda>,
    logits: &Out<'_, Buf<bf16>>,
    args: &SampleArgs<'_, Cuda>,
    first: usize,
    shape: SampleShape,
) -> Result<()> {
    let SampleShape { rows, vocab, top } = shape;
    let (parts, kept) = (vocab.div_ceil(PART), top.max(1));
    let Scratch { values, sums, bests } = Scratch::take(cuda, rows, parts, kept)?;
    // All elements beside logits have four bytes.
    let words = |count: usize| (first * count * size_of::<u32>()) as u64;
    let logits = logits.address() + (first * vocab * size_of::<bf16>()) as u64;
    let ints = args.int.address() + words(SampleRow::INT);
    launch!(
        cuda,
        "sample_scan",
        Grid::line((rows * parts).div_ceil(8), 256),
        logits,
        ints,
        values,
        sums,
        bests,
        rows as i32,
        vocab as i32,
        parts as i32,
        kept as i32,
    )?;
    launch!(
        cuda,
        "sample_draw",
        Grid::line(rows, 1024),
        logits,
        args.wide.address() + words(SampleRow::WIDE),
        ints,
        args.history.address(),
        args.bias_ids.address(),
        args.bias.address(),
        values,
        sums,
        bests,
        out.tokens.address() + words(1),
        out.logprobs.address() + words(1),
        out.top_ids.address() + words(top),
        out.top_logprobs.address() + words(top),
        vocab as i32,
        parts as i32,
        kept as i32,
        top as i32,
    )
}
