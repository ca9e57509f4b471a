//! QK norm and rotary embedding of fused query/key/value rows, in place, forward beside backward,
//! and the write of keys and values to the paged cache.

use half::bf16;

use super::Cuda;
use super::launch::{Grid, launch};
use super::memory::{Address, Buf};
use crate::{HeadShape, In, KvOut, Out, QkNorm, Result, Rope};

const THREADS: u32 = 128;
/// Heads of a block: eight lanes each.
const BLOCK_HEADS: usize = 16;
/// Largest head dimension: eight lanes hold eight columns of each half.
const MAX_HEAD_DIM: usize = 128;

fn check(len: usize, norm: Option<&QkNorm<'_, Cuda>>, rope: &Rope<'_, Cuda>, heads: HeadShape) {
    let head_dim = heads.head_dim;
    assert!(head_dim.is_multiple_of(2), "odd head dimension");
    assert!(head_dim <= MAX_HEAD_DIM, "head dimension {head_dim} above {MAX_HEAD_DIM}");
    assert!(len.is_multiple_of(heads.qkv_width()), "rows of a rotation");
    assert!(rope.positions.len >= len / heads.qkv_width(), "positions of a rotation");
    if let Some(norm) = norm {
        assert!(norm.q.len == head_dim && norm.k.len == head_dim, "weights of a QK norm");
    }
}

/// Addresses of the norm's weights, 0 where there is none, and what is added to its mean square.
fn norm_arguments(norm: Option<&QkNorm<'_, Cuda>>) -> (u64, u64, f32) {
    norm.map_or((0, 0, 0.0), |norm| (norm.q.address(), norm.k.address(), norm.eps as f32))
}

/// Norm, rotation, cache write.
pub(super) fn qk_norm_rope_kv_write(
    cuda: &Cuda,
    qkv: Out<'_, Buf<bf16>>,
    kv: Option<KvOut<'_, Cuda>>,
    norm: Option<&QkNorm<'_, Cuda>>,
    rope: &Rope<'_, Cuda>,
    heads: HeadShape,
) -> Result<()> {
    check(qkv.len, norm, rope, heads);
    let rows = qkv.len / heads.qkv_width();
    if rows == 0 {
        return Ok(());
    }
    let mut items = rows * (heads.q_heads + heads.kv_heads);
    let (mut k, mut v, mut cache_rows) = (0u64, 0u64, 0u64);
    if let Some(kv) = kv {
        assert_eq!(kv.rows.len, rows, "cache rows of a batch");
        items += rows * heads.kv_heads;
        (k, v, cache_rows) = (kv.k.address(), kv.v.address(), kv.rows.address());
    }
    let (q_norm, k_norm, eps) = norm_arguments(norm);
    launch!(
        cuda,
        "rope_forward",
        Grid::line(items.div_ceil(BLOCK_HEADS), THREADS),
        qkv.address(),
        k,
        v,
        cache_rows,
        q_norm,
        k_norm,
        eps,
        rope.cos.address(),
        rope.sin.address(),
        rope.positions.address(),
        rows as i32,
        heads.q_heads as i32,
        heads.kv_heads as i32,
        heads.head_dim as i32,
    )
}

/// Undoes the rotation, then goes back through the norm.
pub(super) fn qk_norm_rope_backward(
    cuda: &Cuda,
    d_qkv: Out<'_, Buf<bf16>>,
    qkv_raw: Option<In<'_, Buf<bf16>>>,
    norm: Option<&QkNorm<'_, Cuda>>,
    rope: &Rope<'_, Cuda>,
    heads: HeadShape,
) -> Result<()> {
    check(d_qkv.len, norm, rope, heads);
    assert!(norm.is_none() || qkv_raw.is_some(), "the norm's backward needs its input");
    assert!(qkv_raw.is_none_or(|raw| raw.len == d_qkv.len), "rows before the norm");
    let rows = d_qkv.len / heads.qkv_width();
    if rows == 0 {
        return Ok(());
    }
    let items = rows * (heads.q_heads + heads.kv_heads);
    let (q_norm, k_norm, eps) = norm_arguments(norm);
    launch!(
        cuda,
        "rope_backward",
        Grid::line(items.div_ceil(BLOCK_HEADS), THREADS),
        d_qkv.address(),
        qkv_raw.map_or(0, |raw| raw.address()),
        q_norm,
        k_norm,
        eps,
        rope.cos.address(),
        rope.sin.address(),
        rope.positions.address(),
        rows as i32,
        heads.q_heads as i32,
        heads.kv_heads as i32,
        heads.head_dim as i32,
    )
}
