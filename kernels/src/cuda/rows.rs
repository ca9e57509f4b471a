//! Copies of whole rows by index, moves, fills and conversions.

use half::bf16;

use super::launch::{Grid, launch};
use super::memory::{Address, Buf};
use super::{Cuda, SCRATCH_BYTES};
use crate::{In, Out, Result};

const THREADS: u32 = 256;
/// Elements of a row that one block copies; as in `rows.cu`.
const ROW_PART: usize = 2048;
/// Elements that a block converts: eight per thread.
const BLOCK_PART: usize = 2048;

/// `x[i] = table[ids[i]]`.
pub(super) fn embed(
    cuda: &Cuda,
    x: Out<'_, Buf<bf16>>,
    table: In<'_, Buf<bf16>>,
    ids: In<'_, Buf<i32>>,
    hidden: usize,
) -> Result<()> {
    gather_rows(cuda, x, table, ids, hidden)
}

/// `y[i] = x[rows[i]]`.
pub(super) fn gather_rows(
    cuda: &Cuda,
    y: Out<'_, Buf<bf16>>,
    x: In<'_, Buf<bf16>>,
    rows: In<'_, Buf<i32>>,
    width: usize,
) -> Result<()> {
    assert_eq!(y.len, rows.len * width, "rows to gather");
    if y.len == 0 {
        return Ok(());
    }
    let grid = Grid::plane(rows.len, width.div_ceil(ROW_PART), THREADS);
    let (y, x, rows) = (y.address(), x.address(), rows.address());
    launch!(cuda, "rows_gather", grid, y, x, rows, width as i32)
}

/// `y[rows[i]] = x[i]`.
pub(super) fn scatter_rows(
    cuda: &Cuda,
    y: Out<'_, Buf<bf16>>,
    x: In<'_, Buf<bf16>>,
    rows: In<'_, Buf<i32>>,
    width: usize,
) -> Result<()> {
    assert_eq!(x.len, rows.len * width, "rows to scatter");
    if x.len == 0 {
        return Ok(());
    }
    let grid = Grid::plane(rows.len, width.div_ceil(ROW_PART), THREADS);
    let (y, x, rows) = (y.address(), x.address(), rows.address());
    launch!(cuda, "rows_scatter", grid, y, x, rows, width as i32)
}

/// Sets every element to `value`.
pub(super) fn fill_act(cuda: &Cuda, dst: Out<'_, Buf<bf16>>, value: f32) -> Result<()> {
    let bits = u32::from(bf16::from_f32(value).to_bits());
    fill(cuda, dst.address(), dst.bytes(), bits << 16 | bits)
}

/// As [`fill_act`].
pub(super) fn fill_wide(cuda: &Cuda, dst: Out<'_, Buf<f32>>, value: f32) -> Result<()> {
    fill(cuda, dst.address(), dst.bytes(), value.to_bits())
}

fn fill(cuda: &Cuda, address: u64, bytes: usize, pattern: u32) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let grid = strided_grid(cuda, bytes);
    launch!(cuda, "rows_fill", grid, address, (bytes / 2) as u64, pattern)
}

/// Element i becomes `bound · (2u − 1)`, u from the hash of (seed, i).
pub(super) fn fill_uniform(
    cuda: &Cuda,
    dst: Out<'_, Buf<bf16>>,
    seed: u64,
    bound: f32,
) -> Result<()> {
    if dst.len == 0 {
        return Ok(());
    }
    let grid = Grid::line(dst.len.div_ceil(BLOCK_PART), THREADS);
    launch!(cuda, "rows_fill_uniform", grid, dst.address(), dst.len as u64, seed, bound)
}

/// `dst[i] = bf16(src[i])`.
pub(super) fn narrow(cuda: &Cuda, dst: Out<'_, Buf<bf16>>, src: In<'_, Buf<f32>>) -> Result<()> {
    assert_eq!(dst.len, src.len, "lengths of a conversion");
    if dst.len == 0 {
        return Ok(());
    }
    let grid = Grid::line(dst.len.div_ceil(BLOCK_PART), THREADS);
    launch!(cuda, "rows_narrow", grid, dst.address(), src.address(), dst.len as u64)
}

/// Copies `bytes` from one address to another; the ranges may overlap. A run that overlaps goes
/// through scratch memory piece by piece, in the order in which no piece is written before it is
/// read.
pub(super) fn move_bytes(cuda: &Cuda, from: u64, to: u64, bytes: usize) -> Result<()> {
    assert!(bytes.is_multiple_of(2), "odd bytes to move");
    if from == to {
        return Ok(());
    }
    if from.abs_diff(to) >= bytes as u64 {
        return copy(cuda, to, from, bytes);
    }
    let scratch = cuda.scratch(bytes.min(SCRATCH_BYTES))?;
    let pieces = bytes.div_ceil(SCRATCH_BYTES);
    for index in 0..pieces {
        let piece = if to < from { index } else { pieces - 1 - index };
        let start = piece * SCRATCH_BYTES;
        let len = SCRATCH_BYTES.min(bytes - start);
        copy(cuda, scratch, from + start as u64, len)?;
        copy(cuda, to + start as u64, scratch, len)?;
    }
    Ok(())
}

/// Copies between ranges that do not overlap.
fn copy(cuda: &Cuda, to: u64, from: u64, bytes: usize) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    launch!(cuda, "rows_copy", strided_grid(cuda, bytes), to, from, (bytes / 2) as u64)
}

/// Blocks that stride over `bytes`: enough to fill the GPU, no more than there is work for.
fn strided_grid(cuda: &Cuda, bytes: usize) -> Grid {
    let enough = bytes.div_ceil(16 * THREADS as usize);
    Grid::line(enough.min(8 * cuda.processors()), THREADS)
}
