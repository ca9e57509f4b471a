//! Output head and cross-entropy in chunks of rows, so that logits never exist for all of them.

use super::Cuda;
use super::launch::{Grid, launch};
use super::linear::{linear, linear_backward};
use super::memory::Address;
use crate::{In, LinearShape, LossArgs, Out, Result};

/// Loss, correctness and, where wanted, `d_hidden = scale · (softmax − onehot) · W`. A chunk's
/// logits are replaced by their gradient before they go back through the head.
pub(super) fn lm_head_loss(
    cuda: &Cuda,
    mut args: LossArgs<'_, Cuda>,
    hidden: usize,
    vocab: usize,
) -> Result<()> {
    let (rows, chunk) = (args.labels.len, args.logits.len / vocab);
    assert!(chunk > 0, "logits hold no row");
    assert!(args.loss.len == rows && args.correct.len == rows, "rows of a loss");
    assert_eq!(args.scale.len, rows, "factors of a loss");
    let (x, head) = (args.hidden, args.lm_head);
    assert_eq!((x.len, head.len), (rows * hidden, vocab * hidden), "shapes of a loss");
    let gradient = args.d_hidden.is_some();
    for first in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - first);
        let shape = LinearShape { rows: count, input: hidden, output: vocab };
        let (start, len) = (first * hidden, count * hidden);
        let x = In::range(x.buffer, x.start + start, len);
        let mut logits = Out::range(args.logits.buffer, args.logits.start, count * vocab);
        linear(cuda, logits.reborrow(), x, head, None, shape)?;
        let word = (first * size_of::<f32>()) as u64;
        launch!(
            cuda,
            "loss_rows",
            Grid::line(count, vocab.div_ceil(8).next_multiple_of(32).min(1024) as u32),
            logits.address(),
            args.loss.address() + word,
            args.correct.address() + word,
            args.labels.address() + word,
            args.scale.address() + word,
            vocab as i32,
            i32::from(gradient),
        )?;
        if let Some(out) = &mut args.d_hidden {
            let d_hidden = Out::range(out.buffer, out.start + start, len);
            linear_backward(cuda, d_hidden, logits.as_in(), head, shape)?;
        }
    }
    Ok(())
}
