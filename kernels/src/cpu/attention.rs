//! Causal attention of one query head over keys in order. Training, prefill in chunks and decode
//! all call [`attend`], so that equal inputs give equal bits wherever keys and values lie.

use super::float::Float;
use super::lanes::{add_scaled, dot, sum};

/// `1 / sqrt(D)`.
pub(super) fn score_scale<T: Float>(head_dim: usize) -> T {
    T::ONE / T::from_f64(head_dim as f64).sqrt()
}

/// `o = softmax(q · kᵀ / sqrt(D)) · v` over keys `0..keys`; returns the log-sum-exp of the scores.
/// All sums go in key order, in an order that the number of keys gives.
#[inline(always)]
pub(super) fn attend<'a, T: Float>(
    o: &mut [T],
    q: &[T],
    keys: usize,
    key: impl Fn(usize) -> &'a [T],
    value: impl Fn(usize) -> &'a [T],
) -> T {
    let scale = score_scale::<T>(q.len());
    let mut weights = vec![T::ZERO; keys];
    let mut largest = T::NEG_INFINITY;
    for (index, weight) in weights.iter_mut().enumerate() {
        *weight = dot(q, key(index)) * scale;
        if *weight > largest {
            largest = *weight;
        }
    }
    for weight in &mut weights {
        *weight = (*weight - largest).exp();
    }
    let total = sum(&weights);
    o.fill(T::ZERO);
    for (index, weight) in weights.iter().enumerate() {
        add_scaled(o, *weight, value(index));
    }
    for o in o {
        *o /= total;
    }
    largest + total.ln()
}
