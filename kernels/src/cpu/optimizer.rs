//! Gradient norm and AdamW.

use super::Host;
use super::float::Float;
use super::threads::{Shared, Threads};
use crate::tables::PAGE;
use crate::{AdamW, AdamWState};

/// `[‖grads‖₂, finite ? 1 : 0]`: squares summed in f64, one partial per page, pages in order.
pub(super) fn grad_norm<T: Float>(threads: &Threads, norm: &mut [T], grads: &[T]) {
    let mut partials = vec![0.0f64; grads.len().div_ceil(PAGE)];
    threads.each_chunk(
        &mut partials,
        1,
        2 * grads.len(),
        #[inline(always)]
        |page, partial| {
            let end = grads.len().min((page + 1) * PAGE);
            let mut lanes = [0.0; 8];
            for values in grads[page * PAGE..end].chunks(lanes.len()) {
                for (lane, value) in lanes.iter_mut().zip(values) {
                    *lane += value.to_f64() * value.to_f64();
                }
            }
            partial[0] = lanes.iter().sum();
        },
    );
    let squares = partials.iter().fold(0.0, |sum, partial| sum + partial);
    let total = T::from_f64(squares.sqrt());
    norm[0] = total;
    norm[1] = if total.is_finite() { T::ONE } else { T::ZERO };
}

/// One step: clip, decay the weights, move the moments, move the weights, renew the compute copy.
pub(super) fn adamw<T: Float, D: Host<T>>(
    threads: &Threads,
    state: AdamWState<'_, D>,
    step: AdamW,
) {
    let norm = state.norm.slice();
    if norm[1] == T::ZERO {
        return;
    }
    let grads = state.grads.slice();
    let all = [state.params.len, state.m.len, state.v.len, state.weights.len];
    assert_eq!(all, [grads.len(); 4], "lengths of an optimizer state");
    let clip = match step.max_grad_norm {
        limit if limit > 0.0 => (limit / (norm[0].to_f64() + 1e-6)).min(1.0),
        _ => 1.0,
    };
    let corrections = [step.beta1, step.beta2].map(|beta| 1.0 - beta.powf(step.step as f64));
    let float = T::from_f64;
    let (clip, eps) = (float(clip), float(step.eps));
    let (beta1, beta2) = (float(step.beta1), float(step.beta2));
    let (rest1, rest2) = (float(1.0 - step.beta1), float(1.0 - step.beta2));
    let decay = float(1.0 - step.learning_rate * step.weight_decay);
    let rate = float(step.learning_rate / corrections[0]);
    let root = float(corrections[1].sqrt());
    let (m, v) = (Shared::new(state.m.slice_mut()), Shared::new(state.v.slice_mut()));
    let weights = Shared::new(state.weights.slice_mut());
    threads.each_chunk(
        state.params.slice_mut(),
        PAGE,
        16 * grads.len(),
        #[inline(always)]
        |page, params| {
            let (start, len) = (page * PAGE, params.len());
            // SAFETY: one task per page, and each state is a buffer of its own.
            let (m, v, weights) =
                unsafe { (m.slice(start, len), v.slice(start, len), weights.slice(start, len)) };
            for (index, param) in params.iter_mut().enumerate() {
                let grad = grads[start + index] * clip;
                m[index] = beta1 * m[index] + rest1 * grad;
                v[index] = beta2 * v[index] + rest2 * grad * grad;
                *param *= decay;
                *param -= rate * m[index] / (v[index].sqrt() / root + eps);
                weights[index] = *param;
            }
        },
    );
}
