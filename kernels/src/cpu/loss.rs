//! Output head and cross-entropy in chunks of rows, so that logits never exist for all of them.

use super::Host;
use super::float::Float;
use super::lanes::sum;
use super::matmul::{Right, matmul};
use super::threads::{Shared, Threads};
use crate::LossArgs;

/// Loss, correctness and, where wanted, `d_hidden = scale · (softmax − onehot) · W`.
pub(super) fn lm_head_loss<T: Float, D: Host<T>>(
    threads: &Threads,
    args: LossArgs<'_, D>,
    hidden: usize,
    vocab: usize,
) {
    let (labels, scale, lm_head) = (args.labels.slice(), args.scale.slice(), args.lm_head.slice());
    let (loss, correct) = (args.loss.slice_mut(), args.correct.slice_mut());
    let (x, logits) = (args.hidden.slice(), args.logits.slice_mut());
    let mut d_hidden = args.d_hidden.map(|out| out.slice_mut());
    let (rows, chunk) = (labels.len(), logits.len() / vocab);
    assert!(chunk > 0, "logits hold no row");
    assert!(loss.len() == rows && correct.len() == rows && scale.len() == rows, "rows of a loss");
    assert_eq!((x.len(), lm_head.len()), (rows * hidden, vocab * hidden), "shapes of a loss");
    for first in (0..rows).step_by(chunk) {
        let part = first..rows.min(first + chunk);
        let logits = &mut logits[..part.len() * vocab];
        let x = &x[first * hidden..][..part.len() * hidden];
        let head = Right::transposed(lm_head, hidden);
        matmul(threads, logits, x, head, None, (hidden, vocab));
        let (loss, correct) =
            (Shared::new(&mut loss[part.clone()]), Shared::new(&mut correct[part.clone()]));
        let work = 20 * logits.len();
        threads.each_chunk(
            logits,
            vocab,
            work,
            #[inline(always)]
            |row, logits| {
                // SAFETY: one task per row.
                let (loss, correct) = unsafe { (loss.slice(row, 1), correct.slice(row, 1)) };
                let label = labels[first + row] as usize;
                (loss[0], correct[0]) = row_loss(logits, label, scale[first + row]);
            },
        );
        if let Some(d_hidden) = &mut d_hidden {
            let d_hidden = &mut d_hidden[first * hidden..][..part.len() * hidden];
            matmul(threads, d_hidden, logits, Right::rows(lm_head, hidden), None, (vocab, hidden));
        }
    }
}

/// Loss and correctness of one row; its logits become their scaled gradient.
#[inline(always)]
fn row_loss<T: Float>(logits: &mut [T], label: usize, scale: T) -> (T, i32) {
    let mut best = 0;
    for (index, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = index;
        }
    }
    let (largest, own) = (logits[best], logits[label]);
    for logit in logits.iter_mut() {
        *logit = (*logit - largest).exp();
    }
    let total = sum(logits);
    let factor = scale / total;
    for logit in logits.iter_mut() {
        *logit *= factor;
    }
    logits[label] -= scale;
    (total.ln() + (largest - own), i32::from(best == label))
}
