//! Linear layers of the frozen base: forward, and backward to the input only.

use super::float::Float;
use super::matmul::{Right, matmul};
use super::threads::Threads;
use crate::LinearShape;

/// `y = x Wᵀ + bias`.
pub(super) fn linear<T: Float>(
    threads: &Threads,
    y: &mut [T],
    x: &[T],
    weight: &[T],
    bias: Option<&[T]>,
    shape: LinearShape,
) {
    check(y.len(), x.len(), weight.len(), shape);
    assert!(bias.is_none_or(|bias| bias.len() == shape.output), "bias of a linear layer");
    let right = Right::transposed(weight, shape.input);
    matmul(threads, y, x, right, bias, (shape.input, shape.output));
}

/// `dx = dy W`.
pub(super) fn linear_backward<T: Float>(
    threads: &Threads,
    dx: &mut [T],
    dy: &[T],
    weight: &[T],
    shape: LinearShape,
) {
    check(dy.len(), dx.len(), weight.len(), shape);
    let right = Right::rows(weight, shape.input);
    matmul(threads, dx, dy, right, None, (shape.output, shape.input));
}

fn check(y: usize, x: usize, weight: usize, shape: LinearShape) {
    let LinearShape { rows, input, output } = shape;
    let wanted = (rows * output, rows * input, output * input);
    assert_eq!((y, x, weight), wanted, "shapes of a linear layer {shape:?}");
}
