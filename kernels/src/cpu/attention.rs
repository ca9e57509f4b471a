//! Causal attention of one query head over keys in order. Training, prefill in chunks and decode
//! all call [`attend`], so that equal inputs give equal bits wherever keys and values lie.

use super::float::Float;
use super::lanes::{add_scaled, dot};

/// `1 / sqrt(D)`.
pub(super) fn score_scale<T: Float>(head_dim: usize) -> T {
    T::ONE / T::from_f64(head_dim as f64).sqrt()
}

/// `o = softmax(q · kᵀ / sqrt(D)) · v` over keys `0..keys`; returns the log-sum-exp of the scores.
/// Scores, their exponents' sum and the weighted values all go in key order.
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
    let mut sum = T::ZERO;
    for weight in &mut weights {
        *weight = (*weight - largest).exp();
        sum += *weight;
    }
    o.fill(T::ZERO);
    for (index, weight) in weights.iter().enumerate() {
        add_scaled(o, *weight, value(index));
    }
    for o in o {
        *o /= sum;
    }
    largest + sum.ln()
}
