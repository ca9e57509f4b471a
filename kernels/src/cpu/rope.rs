//! QK norm and rotary embedding of fused query/key/value rows, in place, forward beside backward;
//! then the write of keys and values to the paged cache.

use super::Host;
use super::float::Float;
use super::norm::{gradient_factors, inverse_rms};
use super::threads::Threads;
use crate::{HeadShape, KvOut, QkNorm, Rope};

/// Cosines and sines of one position, D/2 each.
struct Turn<'a, T> {
    cos: &'a [T],
    sin: &'a [T],
}

impl<'a, T: Float> Turn<'a, T> {
    fn of_row<D: Host<T>>(rope: &Rope<'a, D>, row: usize, head_dim: usize) -> Self {
        let half = head_dim / 2;
        let start = rope.positions.slice()[row] as usize * half;
        Self {
            cos: &rope.cos.slice()[start..start + half],
            sin: &rope.sin.slice()[start..start + half],
        }
    }
    /// Turns a head by its angles: pairs are `(i, i + D/2)`.
    #[inline(always)]
    fn forward(&self, head: &mut [T]) {
        let (low, high) = head.split_at_mut(self.cos.len());
        for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(self.cos).zip(self.sin) {
            (*a, *b) = (*a * *cos - *b * *sin, *b * *cos + *a * *sin);
        }
    }
    /// The transpose of [`Turn::forward`].
    #[inline(always)]
    fn backward(&self, head: &mut [T]) {
        let (low, high) = head.split_at_mut(self.cos.len());
        for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(self.cos).zip(self.sin) {
            (*a, *b) = (*a * *cos + *b * *sin, *b * *cos - *a * *sin);
        }
    }
}

/// Norm weights of head `head` of a row, query heads first.
fn head_weight<'a, T: Float, D: Host<T>>(
    norm: &QkNorm<'a, D>,
    head: usize,
    heads: HeadShape,
) -> &'a [T] {
    if head < heads.q_heads { norm.q.slice() } else { norm.k.slice() }
}

/// Norm, rotation, cache write.
pub(super) fn forward<T: Float, D: Host<T>>(
    threads: &Threads,
    qkv: &mut [T],
    kv: Option<KvOut<'_, D>>,
    norm: Option<&QkNorm<'_, D>>,
    rope: &Rope<'_, D>,
    heads: HeadShape,
) {
    let (width, work) = (heads.qkv_width(), 8 * qkv.len());
    assert!(heads.head_dim.is_multiple_of(2), "odd head dimension");
    assert!(qkv.len().is_multiple_of(width), "rows of qk_norm_rope_kv_write");
    threads.each_chunk(
        qkv,
        width,
        work,
        #[inline(always)]
        |row, qkv| {
            let turn = Turn::of_row(rope, row, heads.head_dim);
            let turned = &mut qkv[..heads.q_width() + heads.kv_width()];
            for (index, head) in turned.chunks_exact_mut(heads.head_dim).enumerate() {
                if let Some(norm) = norm {
                    let factor = inverse_rms(head, T::from_f64(norm.eps));
                    for (x, weight) in head.iter_mut().zip(head_weight(norm, index, heads)) {
                        *x = *x * factor * *weight;
                    }
                }
                turn.forward(head);
            }
        },
    );
    if let Some(kv) = kv {
        cache_rows(qkv, kv, heads);
    }
}

fn cache_rows<T: Float, D: Host<T>>(qkv: &[T], kv: KvOut<'_, D>, heads: HeadShape) {
    let (rows, keys, values) = (kv.rows.slice(), kv.k.slice_mut(), kv.v.slice_mut());
    let width = heads.kv_width();
    assert_eq!(rows.len() * heads.qkv_width(), qkv.len(), "cache rows of a batch");
    for (qkv, row) in qkv.chunks_exact(heads.qkv_width()).zip(rows) {
        if let Ok(row) = usize::try_from(*row) {
            let (k, v) = qkv[heads.q_width()..].split_at(width);
            keys[row * width..][..width].copy_from_slice(k);
            values[row * width..][..width].copy_from_slice(v);
        }
    }
}

/// Undoes the rotation, then goes back through the norm.
pub(super) fn backward<T: Float, D: Host<T>>(
    threads: &Threads,
    d_qkv: &mut [T],
    qkv_raw: Option<&[T]>,
    norm: Option<&QkNorm<'_, D>>,
    rope: &Rope<'_, D>,
    heads: HeadShape,
) {
    let (width, work) = (heads.qkv_width(), 12 * d_qkv.len());
    assert!(d_qkv.len().is_multiple_of(width), "rows of qk_norm_rope_backward");
    assert!(norm.is_none() || qkv_raw.is_some(), "the norm's backward needs its input");
    let raw = qkv_raw.unwrap_or_default();
    threads.each_chunk(
        d_qkv,
        width,
        work,
        #[inline(always)]
        |row, d_qkv| {
            let turn = Turn::of_row(rope, row, heads.head_dim);
            let turned = &mut d_qkv[..heads.q_width() + heads.kv_width()];
            for (index, d) in turned.chunks_exact_mut(heads.head_dim).enumerate() {
                turn.backward(d);
                if let Some(norm) = norm {
                    let x = &raw[row * width + index * heads.head_dim..][..heads.head_dim];
                    let weight = head_weight(norm, index, heads);
                    let (near, far) = gradient_factors(d, x, weight, T::from_f64(norm.eps));
                    for ((d, x), weight) in d.iter_mut().zip(x).zip(weight) {
                        *d = near * *weight * *d - far * *x;
                    }
                }
            }
        },
    );
}
