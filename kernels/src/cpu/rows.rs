//! Copies of whole rows by index: embedding, gather, scatter.

use super::float::Float;
use super::random::{hash, uniform};

/// `y[i] = bound · (2u − 1)`, u a hash of (seed, i).
pub(super) fn fill_uniform<T: Float>(y: &mut [T], seed: u64, bound: f32) {
    let words = |x: u64| [x as u32, (x >> 32) as u32];
    let [seed_lo, seed_hi] = words(seed);
    for (index, y) in y.iter_mut().enumerate() {
        let [low, high] = words(index as u64);
        let u = uniform(hash([seed_lo, seed_hi, low, high]));
        *y = T::from_f32((2.0 * u - 1.0) * bound);
    }
}

/// `y[i] = x[rows[i]]`.
pub(super) fn gather<T: Copy>(y: &mut [T], x: &[T], rows: &[i32], width: usize) {
    assert_eq!(y.len(), rows.len() * width, "rows to gather");
    for (y, row) in y.chunks_exact_mut(width).zip(rows) {
        y.copy_from_slice(&x[*row as usize * width..][..width]);
    }
}

/// `y[rows[i]] = x[i]`.
pub(super) fn scatter<T: Copy>(y: &mut [T], x: &[T], rows: &[i32], width: usize) {
    assert_eq!(x.len(), rows.len() * width, "rows to scatter");
    for (x, row) in x.chunks_exact(width).zip(rows) {
        y[*row as usize * width..][..width].copy_from_slice(x);
    }
}
