//! RMSNorm over rows, forward beside backward, and the residual sum that goes before it.

use half::bf16;

use super::Cuda;
use super::launch::{Grid, launch};
use super::memory::{Address, Buf};
use crate::{In, Out, Result};

/// A block per row, eight columns per thread where 1024 threads reach so far.
fn grid(len: usize, width: usize) -> Grid {
    let threads = width.div_ceil(8).next_multiple_of(32).min(1024);
    Grid::line(len / width, threads as u32)
}

/// `y = rms_norm(x)`.
pub(super) fn rms_norm(
    cuda: &Cuda,
    y: Out<'_, Buf<bf16>>,
    x: In<'_, Buf<bf16>>,
    weight: In<'_, Buf<bf16>>,
    eps: f64,
) -> Result<()> {
    let width = weight.len;
    assert!(y.len == x.len && x.len.is_multiple_of(width), "shapes of rms_norm");
    if x.len == 0 {
        return Ok(());
    }
    let grid = grid(x.len, width);
    let (y, x, weight) = (y.address(), x.address(), weight.address());
    launch!(cuda, "norm_rms", grid, y, x, weight, width as i32, eps as f32)
}

/// `x += delta`, then `y = rms_norm(x)`.
pub(super) fn add_rms_norm(
    cuda: &Cuda,
    y: Out<'_, Buf<bf16>>,
    x: Out<'_, Buf<bf16>>,
    delta: In<'_, Buf<bf16>>,
    weight: In<'_, Buf<bf16>>,
    eps: f64,
) -> Result<()> {
    let width = weight.len;
    assert!(y.len == x.len && delta.len == x.len, "shapes of add_rms_norm");
    assert!(x.len.is_multiple_of(width), "rows of add_rms_norm");
    if x.len == 0 {
        return Ok(());
    }
    let grid = grid(x.len, width);
    let (y, x, delta, weight) = (y.address(), x.address(), delta.address(), weight.address());
    launch!(cuda, "norm_add_rms", grid, y, x, delta, weight, width as i32, eps as f32)
}

/// Adds to `dx` the gradient through [`rms_norm`].
pub(super) fn rms_norm_backward(
    cuda: &Cuda,
    dx: Out<'_, Buf<bf16>>,
    dy: In<'_, Buf<bf16>>,
    x: In<'_, Buf<bf16>>,
    weight: In<'_, Buf<bf16>>,
    eps: f64,
) -> Result<()> {
    let width = weight.len;
    assert!(dx.len == x.len && dy.len == x.len, "shapes of rms_norm_backward");
    assert!(x.len.is_multiple_of(width), "rows of rms_norm_backward");
    if x.len == 0 {
        return Ok(());
    }
    let grid = grid(x.len, width);
    let (dx, dy, x, weight) = (dx.address(), dy.address(), x.address(), weight.address());
    launch!(cuda, "norm_rms_backward", grid, dx, dy, x, weight, width as i32, eps as f32)
}

/// `x += delta`.
pub(super) fn add(cuda: &Cuda, x: Out<'_, Buf<bf16>>, delta: In<'_, Buf<bf16>>) -> Result<()> {
    assert_eq!(x.len, delta.len, "lengths of a sum");
    if x.len == 0 {
        return Ok(());
    }
    let grid = Grid::line(x.len.div_ceil(2048), 256);
    launch!(cuda, "norm_add", grid, x.address(), delta.address(), x.len as u64)
}
