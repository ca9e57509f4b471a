//! Gradient norm and AdamW.

use super::Cuda;
use super::launch::{Grid, launch};
use super::memory::{Address, Buf};
use crate::tables::PAGE;
use crate::{AdamW, AdamWState, In, Out, Result};

/// `[‖grads‖₂, finite ? 1 : 0]`: squares summed in f64, one partial per page.
pub(super) fn grad_norm(
    cuda: &Cuda,
    norm: Out<'_, Buf<f32>>,
    grads: In<'_, Buf<f32>>,
) -> Result<()> {
    assert_eq!(norm.len, 2, "values of a gradient norm");
    let pages = grads.len.div_ceil(PAGE);
    let partials = cuda.scratch(pages * size_of::<f64>())?;
    if pages > 0 {
        let grid = Grid::line(pages, 256);
        let len = grads.len as u64;
        launch!(cuda, "optimizer_squares", grid, partials, grads.address(), len)?;
    }
    let grid = Grid::line(1, 1024);
    launch!(cuda, "optimizer_norm", grid, norm.address(), partials, pages as i32)
}

/// One step: clip, decay the weights, move the moments, move the weights, renew the compute copy.
/// What does not depend on the norm is computed here, in f64.
pub(super) fn adamw(cuda: &Cuda, state: AdamWState<'_, Cuda>, step: AdamW) -> Result<()> {
    let len = state.grads.len;
    let all = [state.params.len, state.m.len, state.v.len, state.weights.len];
    assert_eq!(all, [len; 4], "lengths of an optimizer state");
    assert_eq!(state.norm.len, 2, "values of a gradient norm");
    if len == 0 {
        return Ok(());
    }
    let corrections = [step.beta1, step.beta2].map(|beta| 1.0 - beta.powf(step.step as f64));
    launch!(
        cuda,
        "optimizer_adamw",
        Grid::line(len.div_ceil(1024), 256),
        state.params.address(),
        state.grads.address(),
        state.m.address(),
        state.v.address(),
        state.weights.address(),
        state.norm.address(),
        len as u64,
        step.max_grad_norm as f32,
        step.beta1 as f32,
        step.beta2 as f32,
        (1.0 - step.beta1) as f32,
        (1.0 - step.beta2) as f32,
        (1.0 - step.learning_rate * step.weight_decay) as f32,
        (step.learning_rate / corrections[0]) as f32,
        corrections[1].sqrt() as f32,
        step.eps as f32,
    )
}
