//! Attention of training rows over their own example in the arena, forward beside backward.

use std::ops::Range;

use super::attention::{attend, score_scale};
use super::float::Float;
use super::lanes::{add_scaled, dot};
use super::threads::{Shared, Threads};
use crate::HeadShape;

/// Queries as the arena holds them; keys and values of rows `from ..` copied together by head,
/// `(K, rows, D)`: in the arena they lie so far apart that they would push each other out of cache.
struct Arena<'a, T> {
    qkv: &'a [T],
    heads: HeadShape,
    from: usize,
    keys: Vec<T>,
    values: Vec<T>,
}

impl<'a, T: Float> Arena<'a, T> {
    fn new(qkv: &'a [T], heads: HeadShape, rows: Range<usize>) -> Self {
        let column = |first: usize, head: usize| (first + head) * heads.head_dim;
        let pack = |first: usize| {
            let mut packed = Vec::with_capacity(rows.len() * heads.kv_width());
            for head in 0..heads.kv_heads {
                for row in rows.clone() {
                    let start = row * heads.qkv_width() + column(first, head);
                    packed.extend_from_slice(&qkv[start..start + heads.head_dim]);
                }
            }
            packed
        };
        let (keys, values) = (pack(heads.q_heads), pack(heads.q_heads + heads.kv_heads));
        Self { qkv, heads, from: rows.start, keys, values }
    }
    #[inline(always)]
    fn query(&self, row: usize, head: usize) -> &'a [T] {
        let dim = self.heads.head_dim;
        &self.qkv[row * self.heads.qkv_width() + head * dim..][..dim]
    }
    /// Keys and values of a head for arena rows `rows`, `(rows, D)` each.
    #[inline(always)]
    fn key_values(&self, head: usize, rows: Range<usize>) -> (&[T], &[T]) {
        let (dim, all) = (self.heads.head_dim, self.keys.len() / self.heads.kv_width());
        let start = (head * all + rows.start - self.from) * dim;
        let end = start + rows.len() * dim;
        (&self.keys[start..end], &self.values[start..end])
    }
}

/// `o (n, Q·D)` and `lse (n, Q)` for rows `first .. first + n`.
pub(super) fn forward<T: Float>(
    threads: &Threads,
    (o, lse): (&mut [T], &mut [T]),
    qkv: &[T],
    examples: &[i32],
    first: usize,
    heads: HeadShape,
) {
    let (rows, dim) = (lse.len() / heads.q_heads, heads.head_dim);
    assert_eq!(o.len(), lse.len() * dim, "outputs of attention_train");
    assert!(qkv.len() >= (first + rows) * heads.qkv_width(), "arena of attention_train");
    let examples = &examples[first..first + rows];
    let from = examples.first().map_or(first, |start| *start as usize);
    let arena = Arena::new(qkv, heads, from..first + rows);
    let pairs: usize =
        examples.iter().zip(first..).map(|(start, row)| row + 1 - *start as usize).sum();
    let (o, lse) = (Shared::new(o), Shared::new(lse));
    // All rows of a head follow each other, so that its keys and values stay in cache.
    threads.each(
        rows * heads.q_heads,
        4 * pairs * heads.q_width(),
        #[inline(always)]
        |task| {
            let (head, index) = (task / rows, task % rows);
            let (start, row) = (examples[index] as usize, first + index);
            let kv_head = head / (heads.q_heads / heads.kv_heads);
            let place = index * heads.q_heads + head;
            // SAFETY: one task per row and head.
            let (o, lse) = unsafe { (o.slice(place * dim, dim), lse.slice(place, 1)) };
            let (keys, values) = arena.key_values(kv_head, start..row + 1);
            lse[0] = attend(
                o,
                arena.query(row, head),
                row + 1 - start,
                #[inline(always)]
                |key| &keys[key * dim..][..dim],
                #[inline(always)]
                |key| &values[key * dim..][..dim],
            );
        },
    );
}

/// What backward reads beside the arena.
struct Saved<'a, T> {
    d_o: &'a [T],
    o: &'a [T],
    lse: &'a [T],
}

/// `d_qkv` over all rows, one task per (example, key/value head): rows ascending, in a row its
/// query heads ascending, for each its keys ascending.
pub(super) fn backward<T: Float>(
    threads: &Threads,
    d_qkv: &mut [T],
    (d_o, o, lse): (&[T], &[T], &[T]),
    qkv: &[T],
    examples: &[i32],
    heads: HeadShape,
) {
    let rows = examples.len();
    assert_eq!(d_qkv.len(), rows * heads.qkv_width(), "d_qkv of attention backward");
    assert!(d_o.len() == rows * heads.q_width() && o.len() == d_o.len(), "rows of d_o and o");
    assert!(lse.len() == rows * heads.q_heads && qkv.len() >= d_qkv.len(), "rows of lse, qkv");
    let spans = example_spans(examples);
    let pairs: usize = spans.iter().map(|(start, end)| (end - start) * (end - start + 1) / 2).sum();
    let (arena, saved) = (Arena::new(qkv, heads, 0..rows), Saved { d_o, o, lse });
    let d_qkv = Shared::new(d_qkv);
    threads.each(
        spans.len() * heads.kv_heads,
        10 * pairs * heads.q_width(),
        #[inline(always)]
        |task| {
            let span = spans[task / heads.kv_heads];
            example_backward(&d_qkv, &arena, &saved, span, task % heads.kv_heads);
        },
    );
}

/// Runs of rows with one example start: `(start, end)`.
fn example_spans(examples: &[i32]) -> Vec<(usize, usize)> {
    let mut spans: Vec<(usize, usize)> = Vec::new();
    for (row, start) in examples.iter().enumerate() {
        match spans.last_mut() {
            Some(span) if span.0 == *start as usize => span.1 = row + 1,
            _ => spans.push((row, row + 1)),
        }
    }
    spans
}

#[inline(always)]
fn example_backward<T: Float>(
    d_qkv: &Shared<'_, T>,
    arena: &Arena<'_, T>,
    saved: &Saved<'_, T>,
    (start, end): (usize, usize),
    kv_head: usize,
) {
    let heads = arena.heads;
    let (dim, scale) = (heads.head_dim, score_scale::<T>(heads.head_dim));
    let group = heads.q_heads / heads.kv_heads;
    // SAFETY: a task alone writes the gradients of its example's key/value head and of the query
    // heads that share it.
    let part = |row: usize, column: usize| unsafe {
        d_qkv.slice(row * heads.qkv_width() + column * dim, dim)
    };
    let (keys, values) = arena.key_values(kv_head, start..end);
    let mut dk = vec![T::ZERO; keys.len()];
    let mut dv = vec![T::ZERO; keys.len()];
    for row in start..end {
        for head in kv_head * group..(kv_head + 1) * group {
            let place = row * heads.q_heads + head;
            let (d_o, o) = (&saved.d_o[place * dim..][..dim], &saved.o[place * dim..][..dim]);
            let (q, lse, along) = (arena.query(row, head), saved.lse[place], dot(d_o, o));
            let dq = part(row, head);
            dq.fill(T::ZERO);
            let seen = (row + 1 - start) * dim;
            let sources = keys[..seen].chunks_exact(dim).zip(values[..seen].chunks_exact(dim));
            let gradients = dk.chunks_exact_mut(dim).zip(dv.chunks_exact_mut(dim));
            for ((k, v), (dk, dv)) in sources.zip(gradients) {
                let weight = (dot(q, k) * scale - lse).exp();
                let d_score = weight * (dot(d_o, v) - along) * scale;
                add_scaled(dq, d_score, k);
                add_scaled(dk, d_score, q);
                add_scaled(dv, weight, d_o);
            }
        }
    }
    for (index, row) in (start..end).enumerate() {
        let at = index * dim..(index + 1) * dim;
        part(row, heads.q_heads + kv_head).copy_from_slice(&dk[at.clone()]);
        part(row, heads.q_heads + heads.kv_heads + kv_head).copy_from_slice(&dv[at]);
    }
}
