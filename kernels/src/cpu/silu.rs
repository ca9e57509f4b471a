//! SwiGLU, forward beside backward.

use super::float::Float;
use super::threads::Threads;

/// `1 / (1 + exp(−x))`.
#[inline(always)]
fn sigmoid<T: Float>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exp())
}

/// `y = silu(gate) * up`.
pub(super) fn silu_mul<T: Float>(threads: &Threads, y: &mut [T], gate_up: &[T], ffn: usize) {
    assert!(gate_up.len() == 2 * y.len() && y.len().is_multiple_of(ffn), "shapes of silu_mul");
    let work = 20 * y.len();
    threads.each_chunk(
        y,
        ffn,
        work,
        #[inline(always)]
        |row, y| {
            let (gate, up) = gate_up[row * 2 * ffn..][..2 * ffn].split_at(ffn);
            for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                *y = *gate * sigmoid(*gate) * *up;
            }
        },
    );
}

/// `d_gate_up` from `dy`.
pub(super) fn silu_mul_backward<T: Float>(
    threads: &Threads,
    d_gate_up: &mut [T],
    dy: &[T],
    gate_up: &[T],
    ffn: usize,
) {
    assert_eq!(d_gate_up.len(), gate_up.len(), "shapes of silu_mul_backward");
    assert!(gate_up.len() == 2 * dy.len() && dy.len().is_multiple_of(ffn), "rows of dy");
    threads.each_chunk(
        d_gate_up,
        2 * ffn,
        20 * gate_up.len(),
        #[inline(always)]
        |row, d_gate_up| {
            let (gate, up) = gate_up[row * 2 * ffn..][..2 * ffn].split_at(ffn);
            let (d_gate, d_up) = d_gate_up.split_at_mut(ffn);
            for (index, dy) in dy[row * ffn..][..ffn].iter().enumerate() {
                let (gate, sigmoid) = (gate[index], sigmoid(gate[index]));
                d_up[index] = *dy * gate * sigmoid;
                d_gate[index] = *dy * up[index] * sigmoid * (T::ONE + gate * (T::ONE - sigmoid));
            }
        },
    );
}
