//! Segmented multi-LoRA multiplication, forward beside backward.
//!
//! A step's adapters are in tables on the device; grids follow from lengths of buffers alone. The
//! choice of a kernel, and how many blocks share out a sum, change no bit of a row.

use half::bf16;

use super::Cuda;
use super::launch::{Argument, Grid, launch};
use super::memory::{Address, Buf};
use crate::tables::{SegmentRow, SmlmGroup};
use crate::{In, Out, Result};

/// Threads of a block.
const THREADS: u32 = 128;
/// Modules of a group, at most.
const MODULES: usize = 3;
/// Rows of a block's tile where segments are long, and where they are short.
const MANY_ROWS: usize = 64;
const FEW_ROWS: usize = 16;
/// Rows of a batch up to which its blocks are too few to fill the GPU, and up to which they are
/// where ranks are small; measured on an H200.
const SHORT_ROWS: usize = 512;
const MIDDLE_ROWS: usize = 4096;
const MIDDLE_RANK: usize = 32;
/// Columns whose products are one partial sum.
const SPLIT: usize = 1024;
/// Columns of a gradient's panel.
const GRADIENT_PANEL: usize = 64;
/// Columns of a panel of dx.
const INPUT_PANEL: usize = 512;
/// Ranks of a row of S in shared memory: the largest rank, 256, and a pad.
const TILE_STRIDE: usize = 272;
/// Scratch memory for planes of partial sums. Where they do not fit, blocks loop and leave one.
const PLANES_BYTES: usize = 192 << 20;

/// Shared memory of the gradients' kernel, bytes: four stages of 64 rows of 64 values of each
/// factor, their dropout keys and four words.
pub(super) const GRADIENTS_SHARED: u32 = 4 * (64 * (64 + 64) * 2 + 64 * 4 + 16);

/// A group as the kernels take it.
#[repr(C)]
struct Group {
    pool: u64,
    slots: u64,
    segments: u64,
    segment_count: i32,
    layer: i32,
    input: i32,
    width: i32,
    modules: i32,
    module: [i32; MODULES],
    column: [i32; MODULES],
    columns: [i32; MODULES],
}

impl Argument for Group {}

impl Group {
    fn new(group: &SmlmGroup<'_, Cuda>) -> Self {
        let modules = group.modules;
        assert!((1..=MODULES).contains(&modules.len()), "{} modules in a group", modules.len());
        let inside = modules.iter().all(|module| module.column + module.width <= group.width);
        assert!(inside, "modules {modules:?} in rows of {}", group.width);
        let each = |value: fn(&crate::GroupModule) -> usize| {
            std::array::from_fn(|index| modules.get(index).map_or(0, |module| value(module) as i32))
        };
        Self {
            pool: group.pool.address(),
            slots: group.slots.address(),
            segments: group.segments.address(),
            segment_count: segments(group) as i32,
            layer: group.layer as i32,
            input: group.input as i32,
            width: group.width as i32,
            modules: modules.len() as i32,
            module: each(|module| module.module.index()),
            column: each(|module| module.column),
            columns: each(|module| module.width),
        }
    }
}

fn segments(group: &SmlmGroup<'_, Cuda>) -> usize {
    group.segments.len / SegmentRow::WIDTH
}

/// Tiles of `tile_rows` rows, counted from the start of each segment, at most.
fn tiles(group: &SmlmGroup<'_, Cuda>, rows: usize, tile_rows: usize) -> usize {
    rows / tile_rows + segments(group)
}

/// Blocks for all modules' columns, `size` at a time.
fn panels(group: &SmlmGroup<'_, Cuda>, size: usize) -> usize {
    group.modules.iter().map(|module| module.width.div_ceil(size)).sum()
}

/// Planes for partial sums of S over `columns` columns: one per split, or one in all.
fn planes(s_len: usize, columns: usize) -> usize {
    let splits = columns.div_ceil(SPLIT);
    if s_len * splits * size_of::<f32>() <= PLANES_BYTES { splits } else { 1 }
}

/// `S = drop(x) Aᵀ`, `y += scale · S Bᵀ`.
pub(super) fn smlm(
    cuda: &Cuda,
    y: Out<'_, Buf<bf16>>,
    s: Out<'_, Buf<bf16>>,
    x: In<'_, Buf<bf16>>,
    group: &SmlmGroup<'_, Cuda>,
) -> Result<()> {
    let rows = check(group, x.len, y.len);
    if rows == 0 || segments(group) == 0 || s.len == 0 {
        return Ok(());
    }
    let splits = group.input.div_ceil(SPLIT);
    let planes = planes(s.len, group.input);
    let sums = cuda.scratch(s.len * planes * size_of::<f32>())?;
    let short = rows <= SHORT_ROWS || rows < 32 * segments(group);
    // Tiles of 16 rows read A more often, which pays while more blocks are what is missing.
    let narrow = rows <= MIDDLE_ROWS && s.len <= rows * group.modules.len() * MIDDLE_RANK;
    let few = planes == splits && (short || (narrow && rows * splits <= 4 * MIDDLE_ROWS));
    let (kernel, tile_rows, modules) = match few {
        true => ("smlm_shrink_few", FEW_ROWS, group.modules.len()),
        false => ("smlm_shrink", MANY_ROWS, 1),
    };
    let tables = Group::new(group);
    let plane = s.len as u64;
    let grid = Grid::cube(tiles(group, rows, tile_rows), planes, modules, THREADS);
    launch!(cuda, kernel, grid, sums, x.address(), plane, tables)?;
    let (tile_rows, panel) = match (short, narrow) {
        (true, _) => (FEW_ROWS, 512),
        (false, true) => (FEW_ROWS, 1024),
        (false, false) => (MANY_ROWS, 1024),
    };
    let shared = (tile_rows * TILE_STRIDE * size_of::<bf16>()) as u32;
    let tiles = tiles(group, rows, tile_rows);
    let grid = Grid::plane(tiles, panels(group, panel), THREADS).with_shared(shared);
    let (plane_count, tile_rows, panel) = (planes as i32, tile_rows as i32, panel as i32);
    launch!(
        cuda,
        "smlm_expand",
        grid,
        y.address(),
        s.address(),
        sums,
        plane,
        plane_count,
        tile_rows,
        panel,
        tables
    )
}

/// `dS = scale · dy B`; `dx += drop'(dS A)`; `dB += scale · dyᵀ S`; `dA += dSᵀ drop(x)`.
pub(super) fn smlm_backward(
    cuda: &Cuda,
    dx: Option<Out<'_, Buf<bf16>>>,
    grads: Out<'_, Buf<f32>>,
    dy: In<'_, Buf<bf16>>,
    x: In<'_, Buf<bf16>>,
    s: In<'_, Buf<bf16>>,
    group: &SmlmGroup<'_, Cuda>,
) -> Result<()> {
    let rows = check(group, x.len, dy.len);
    assert!(dx.as_ref().is_none_or(|dx| dx.len == x.len), "dx of SMLM");
    if rows == 0 || segments(group) == 0 || s.len == 0 {
        return Ok(());
    }
    let widest = group.modules.iter().map(|module| module.width).max().unwrap_or(0);
    let planes = planes(s.len, widest);
    let sums_bytes = (s.len * planes * size_of::<f32>()).next_multiple_of(256);
    let sums = cuda.scratch(sums_bytes + s.len * size_of::<bf16>())?;
    let ds = sums + sums_bytes as u64;
    let tiles = tiles(group, rows, MANY_ROWS);
    let tables = Group::new(group);
    let plane = s.len as u64;

    let splits = if planes == 1 { group.modules.len() } else { panels(group, SPLIT) };
    let (grid, plane_count) = (Grid::plane(tiles, splits, THREADS), planes as i32);
    launch!(cuda, "smlm_backward_s", grid, sums, dy.address(), plane, plane_count, tables)?;
    let grid = Grid::line(s.len.div_ceil(THREADS as usize), THREADS);
    launch!(cuda, "smlm_backward_round", grid, ds, sums, plane, plane_count)?;
    if let Some(dx) = dx {
        let grid = Grid::plane(tiles, group.input.div_ceil(INPUT_PANEL), THREADS);
        launch!(cuda, "smlm_backward_x", grid, dx.address(), ds, INPUT_PANEL as i32, tables)?;
    }
    let of_a = group.input.div_ceil(GRADIENT_PANEL) * group.modules.len();
    let jobs = of_a + panels(group, GRADIENT_PANEL);
    let grid = Grid::plane(jobs, segments(group), THREADS).with_shared(GRADIENTS_SHARED);
    launch!(
        cuda,
        "smlm_gradients",
        grid,
        grads.address(),
        dy.address(),
        x.address(),
        s.address(),
        ds,
        tables
    )
}

/// Number of rows.
fn check(group: &SmlmGroup<'_, Cuda>, x: usize, y: usize) -> usize {
    let rows = x / group.input;
    let wanted = (rows * group.input, rows * group.width);
    assert_eq!((x, y), wanted, "x and y of SMLM, {} to {} columns", group.input, group.width);
    assert!(segments(group) < 1 << 16, "{} segments", segments(group));
    rows
}
