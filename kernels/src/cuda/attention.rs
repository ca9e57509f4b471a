//! Attention: of training rows forward and backward, and of prefill and decode rows over the paged
//! cache.

use half::bf16;

use super::Cuda;
use super::launch::{Grid, launch};
use super::memory::{Address, Buf};
use crate::tables::SequenceRow;
use crate::{HeadShape, In, Out, PagedKv, Result};

/// Rows of a tile of queries or of keys that a block owns.
const TILE_ROWS: usize = 128;
/// Query heads that a block of decode takes at once.
const DECODE_HEADS: usize = 16;
/// Most splits of one sequence's keys: a warp adds them.
const MAX_SPLITS: usize = 32;
/// Blocks of prefill beyond those that rows fill: ends of sequences in tiles of their own. Where
/// there are more, blocks take several tiles.
const SPARE_TILES: usize = 8;

/// Shared memory of the kernels for tiles of `width` columns, bytes: as the sources count it.
pub(super) const fn train_shared(width: u32) -> u32 {
    (128 + 4 * 64) * width * 2
}
/// As [`train_shared`].
pub(super) const fn backward_keys_shared(width: u32) -> u32 {
    2 * (128 + 2 * 64) * width * 2 + 2 * 64 * 8
}
/// As [`train_shared`].
pub(super) const fn backward_queries_shared(width: u32) -> u32 {
    2 * (128 + 2 * 32) * width * 2
}
/// As [`train_shared`].
pub(super) const fn decode_shared(width: u32) -> u32 {
    (16 + 4 * 3 * 2 * 16) * width * 2
}

/// Sizes as the kernels take them.
struct Heads {
    q: i32,
    kv: i32,
    dim: i32,
    /// `1 / sqrt(dim)`.
    scale: f32,
    /// Columns of a tile: 64 or 128.
    width: u32,
}

impl Heads {
    fn new(heads: HeadShape) -> Self {
        let HeadShape { q_heads, kv_heads, head_dim } = heads;
        assert!(head_dim % 2 == 0 && head_dim > 0 && head_dim <= 128, "head dim {head_dim}");
        assert!(kv_heads > 0 && q_heads % kv_heads == 0, "{q_heads} over {kv_heads} heads");
        Self {
            q: q_heads as i32,
            kv: kv_heads as i32,
            dim: head_dim as i32,
            scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            width: if head_dim <= 64 { 64 } else { 128 },
        }
    }
    /// The kernel for this width.
    fn pick(&self, of_64: &'static str, of_128: &'static str) -> &'static str {
        if self.width == 64 { of_64 } else { of_128 }
    }
}

pub(super) fn attention_train(
    cuda: &Cuda,
    o: Out<'_, Buf<bf16>>,
    lse: Out<'_, Buf<f32>>,
    qkv: In<'_, Buf<bf16>>,
    examples: In<'_, Buf<i32>>,
    first: usize,
    heads: HeadShape,
) -> Result<()> {
    let rows = lse.len / heads.q_heads;
    assert!(o.len == rows * heads.q_width() && lse.len == rows * heads.q_heads, "rows of o, lse");
    assert!(qkv.len >= (first + rows) * heads.qkv_width(), "arena of attention_train");
    assert!(examples.len >= first + rows, "examples of attention_train");
    if rows == 0 {
        return Ok(());
    }
    let sizes = Heads::new(heads);
    launch!(
        cuda,
        sizes.pick("attention_train_64", "attention_train_128"),
        Grid::plane(heads.q_heads, rows.div_ceil(TILE_ROWS), 128)
            .with_shared(train_shared(sizes.width)),
        o.address(),
        lse.address(),
        qkv.address(),
        examples.address(),
        first as i32,
        rows as i32,
        sizes.q,
        sizes.kv,
        sizes.dim,
        sizes.scale,
    )
}

pub(super) fn attention_train_backward(
    cuda: &Cuda,
    d_qkv: Out<'_, Buf<bf16>>,
    d_o: In<'_, Buf<bf16>>,
    qkv: In<'_, Buf<bf16>>,
    o: In<'_, Buf<bf16>>,
    lse: In<'_, Buf<f32>>,
    examples: In<'_, Buf<i32>>,
    heads: HeadShape,
) -> Result<()> {
    let rows = examples.len;
    assert_eq!(d_qkv.len, rows * heads.qkv_width(), "d_qkv of attention backward");
    assert!(d_o.len == rows * heads.q_width() && o.len == d_o.len, "rows of d_o and o");
    assert!(lse.len == rows * heads.q_heads && qkv.len >= d_qkv.len, "rows of lse, qkv");
    if rows == 0 {
        return Ok(());
    }
    let sizes = Heads::new(heads);
    let sums = cuda.scratch(rows * heads.q_heads * 8)?;
    launch!(
        cuda,
        "attention_backward_sums",
        Grid::line((rows * heads.q_heads).div_ceil(8), 256),
        sums,
        d_o.address(),
        o.address(),
        lse.address(),
        rows as i32,
        sizes.q,
        sizes.dim,
    )?;
    let tiles = rows.div_ceil(TILE_ROWS);
    let kernels = [
        (
            sizes.pick("attention_backward_keys_64", "attention_backward_keys_128"),
            Grid::plane(heads.kv_heads, tiles, 256).with_shared(backward_keys_shared(sizes.width)),
        ),
        (
            sizes.pick("attention_backward_queries_64", "attention_backward_queries_128"),
            Grid::plane(heads.q_heads, tiles, 128)
                .with_shared(backward_queries_shared(sizes.width)),
        ),
    ];
    for (kernel, grid) in kernels {
        launch!(
            cuda,
            kernel,
            grid,
            d_qkv.address(),
            d_o.address(),
            qkv.address(),
            sums,
            examples.address(),
            rows as i32,
            sizes.q,
            sizes.kv,
            sizes.dim,
            sizes.scale,
        )?;
    }
    Ok(())
}

pub(super) fn attention_paged(
    cuda: &Cuda,
    o: Out<'_, Buf<bf16>>,
    qkv: In<'_, Buf<bf16>>,
    kv: &PagedKv<'_, Cuda>,
    heads: HeadShape,
) -> Result<()> {
    let (rows, sequences) = (qkv.len / heads.qkv_width(), kv.sequences.len / SequenceRow::WIDTH);
    assert_eq!(o.len, rows * heads.q_width(), "rows of o and qkv");
    assert!(kv.k.len == kv.v.len && kv.block_size > 0, "cache of attention_paged");
    if rows == 0 || sequences == 0 {
        return Ok(());
    }
    // Prefill sums over keys in an order that depends on nothing but a row's position.
    let least: i32 = if cuda.is_batch_invariant() { 1 } else { 2 };
    if least > 1 {
        // As many sequences as rows: (nearly) all have one. Decode takes the others as well.
        let longer = rows <= sequences;
        decode(cuda, &o, &qkv, kv, heads, longer)?;
        if longer {
            return Ok(());
        }
    }
    let sizes = Heads::new(heads);
    let blocks = rows.div_ceil(TILE_ROWS) + sequences.min(SPARE_TILES);
    launch!(
        cuda,
        sizes.pick("attention_prefill_64", "attention_prefill_128"),
        Grid::plane(heads.q_heads, blocks, 128).with_shared(train_shared(sizes.width)),
        o.address(),
        qkv.address(),
        kv.k.address(),
        kv.v.address(),
        kv.sequences.address(),
        kv.blocks.address(),
        sequences as i32,
        least,
        kv.block_size as i32,
        sizes.q,
        sizes.kv,
        sizes.dim,
        sizes.scale,
    )
}

/// Sequences of one row, or all (`longer`).
fn decode(
    cuda: &Cuda,
    o: &Out<'_, Buf<bf16>>,
    qkv: &In<'_, Buf<bf16>>,
    kv: &PagedKv<'_, Cuda>,
    heads: HeadShape,
    longer: bool,
) -> Result<()> {
    let (sizes, sequences) = (Heads::new(heads), kv.sequences.len / SequenceRow::WIDTH);
    let tiles = heads.kv_heads * (heads.q_heads / heads.kv_heads).div_ceil(DECODE_HEADS);
    // Two blocks of each processor have work where sequences are few.
    let splits = (2 * cuda.processors()).div_ceil(sequences * tiles).clamp(1, MAX_SPLITS);
    let parts = if splits > 1 { sequences * heads.q_heads * splits } else { 0 };
    let part_sums = cuda.scratch(parts * (8 + heads.head_dim * 4))?;
    let values = part_sums + parts as u64 * 8;
    launch!(
        cuda,
        sizes.pick("attention_decode_64", "attention_decode_128"),
        Grid::cube(tiles, sequences, splits, 128).with_shared(decode_shared(sizes.width)),
        o.address(),
        part_sums,
        values,
        qkv.address(),
        kv.k.address(),
        kv.v.address(),
        kv.sequences.address(),
        kv.blocks.address(),
        kv.block_size as i32,
        sizes.q,
        sizes.kv,
        sizes.dim,
        i32::from(longer),
        sizes.scale,
    )?;
    if splits == 1 {
        return Ok(());
    }
    launch!(
        cuda,
        "attention_combine",
        Grid::plane(heads.q_heads.div_ceil(4), sequences, 128),
        o.address(),
        part_sums,
        values,
        kv.sequences.address(),
        splits as i32,
        sizes.q,
        sizes.dim,
        i32::from(longer),
        sizes.scale,
    )
}
