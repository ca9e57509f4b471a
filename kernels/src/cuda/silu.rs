//! SwiGLU, forward beside backward.

use half::bf16;

use super::Cuda;
use super::launch::{Grid, launch};
use super::memory::{Address, Buf};
use crate::{In, Out, Result};

/// A block takes 2048 columns of one row.
fn grid(rows: usize, ffn: usize) -> Grid {
    Grid::plane(rows, ffn.div_ceil(2048), 256)
}

/// `y = silu(gate) * up`.
pub(super) fn silu_mul(
    cuda: &Cuda,
    y: Out<'_, Buf<bf16>>,
    gate_up: In<'_, Buf<bf16>>,
    ffn: usize,
) -> Result<()> {
    assert!(gate_up.len == 2 * y.len && y.len.is_multiple_of(ffn), "shapes of silu_mul");
    if y.len == 0 {
        return Ok(());
    }
    let grid = grid(y.len / ffn, ffn);
    launch!(cuda, "silu_mul", grid, y.address(), gate_up.address(), ffn as i32)
}

/// `d_gate_up` from `dy`.
pub(super) fn silu_mul_backward(
    cuda: &Cuda,
    d_gate_up: Out<'_, Buf<bf16>>,
    dy: In<'_, Buf<bf16>>,
    gate_up: In<'_, Buf<bf16>>,
    ffn: usize,
) -> Result<()> {
    assert_eq!(d_gate_up.len, gate_up.len, "shapes of silu_mul_backward");
    assert!(gate_up.len == 2 * dy.len && dy.len.is_multiple_of(ffn), "rows of dy");
    if dy.len == 0 {
        return Ok(());
    }
    let grid = grid(dy.len / ffn, ffn);
    let (d_gate_up, dy, gate_up) = (d_gate_up.address(), dy.address(), gate_up.address());
    launch!(cuda, "silu_mul_backward", grid, d_gate_up, dy, gate_up, ffn as i32)
}
