//! Segmented multi-LoRA multiplication, forward beside backward.
//!
//! Work is cut into tiles of [`ROW_TILE`] rows counted from the start of each segment. A row's
//! results depend on its own segment alone. The weights' gradients are in
//! [`smlm_gradients`](super::smlm_gradients).

use super::float::Float;
use super::matmul::{PANEL, Right, fill_tile, multiply};
use super::segments::{Dropout, Segment, Tables};
use super::smlm_gradients;
use super::threads::{Shared, Threads};
use crate::ROW_TILE;

/// `S = drop(x) Aᵀ`, `y += scale · S Bᵀ`.
pub(super) fn forward<T: Float>(
    threads: &Threads,
    y: &mut [T],
    s: &mut [T],
    x: &[T],
    tables: &Tables<'_, T>,
) {
    let tiles = tables.tiles();
    let (y, s) = (Shared::new(y), Shared::new(s));
    threads.each(
        tiles.len(),
        tables.work(),
        #[inline(always)]
        |task| {
            let (segment, first) = tiles[task];
            // SAFETY: tiles hold different rows of y and of S.
            unsafe { tile_forward(&y, &s, x, tables, segment, first) };
        },
    );
}

/// # Safety
/// One call at a time per (segment, first).
#[inline(always)]
unsafe fn tile_forward<T: Float>(
    y: &Shared<'_, T>,
    s: &Shared<'_, T>,
    x: &[T],
    tables: &Tables<'_, T>,
    segment: Segment,
    first: usize,
) {
    let group = &tables.group;
    let rows = ROW_TILE.min(segment.rows - first);
    let mut x_tile = vec![T::ZERO; group.input * ROW_TILE];
    let mut filled = false;
    for (index, module) in group.modules.iter().enumerate() {
        let Some(lora) = tables.lora(&segment, module) else { continue };
        let dropout = tables.dropout(&segment, module);
        if !filled || !dropout.is_off() {
            let x = &x[(segment.row + first) * group.input..];
            fill_dropped(&mut x_tile, dropout, first, rows, |row, column| {
                x[row * group.input + column]
            });
            filled = true;
        }
        let mut s_tile = vec![T::ZERO; lora.rank * ROW_TILE];
        multiply(&mut s_tile, &x_tile, Right::transposed(lora.a, group.input));
        for row in 0..rows {
            let start = tables.s_index(&segment, first + row, index, lora.rank);
            // SAFETY: this tile's rows of S.
            let s = unsafe { s.slice(start, lora.rank) };
            for (j, s) in s.iter_mut().enumerate() {
                *s = s_tile[j * ROW_TILE + row];
            }
        }
        let mut y_tile = [T::ZERO; PANEL * ROW_TILE];
        for column in (0..module.width).step_by(PANEL) {
            let width = PANEL.min(module.width - column);
            let y_tile = &mut y_tile[..width * ROW_TILE];
            multiply(y_tile, &s_tile, Right::transposed(&lora.b[column * lora.rank..], lora.rank));
            for row in 0..rows {
                let start = (segment.row + first + row) * group.width + module.column + column;
                // SAFETY: this tile's rows of y.
                let y = unsafe { y.slice(start, width) };
                for (c, y) in y.iter_mut().enumerate() {
                    *y += lora.scale * y_tile[c * ROW_TILE + row];
                }
            }
        }
    }
}

/// Fills a tile with rows of a module's input as dropout leaves them; `first` counts from the
/// segment's start.
#[inline(always)]
fn fill_dropped<T: Float>(
    tile: &mut [T],
    dropout: Dropout<T>,
    first: usize,
    rows: usize,
    value: impl Fn(usize, usize) -> T,
) {
    let masks: [_; ROW_TILE] = std::array::from_fn(|row| dropout.row(first + row));
    fill_tile(tile, rows, |row, column| dropout.apply(masks[row], column, value(row, column)));
}

/// What backward reads.
pub(super) struct Backward<'a, T: Float> {
    pub dy: &'a [T],
    pub x: &'a [T],
    pub s: &'a [T],
    pub tables: &'a Tables<'a, T>,
}

/// `dS = scale · dy B`; `dx += drop'(dS A)`; `dB += scale · dyᵀ S`; `dA += dSᵀ drop(x)`.
pub(super) fn backward<T: Float>(
    threads: &Threads,
    dx: Option<&mut [T]>,
    grads: &mut [T],
    args: &Backward<'_, T>,
) {
    let tables = args.tables;
    let tiles = tables.tiles();
    let mut ds = vec![T::ZERO; args.s.len()];
    let (shared_dx, shared_ds) = (dx.map(Shared::new), Shared::new(&mut ds));
    threads.each(
        tiles.len(),
        tables.work(),
        #[inline(always)]
        |task| {
            let (segment, first) = tiles[task];
            // SAFETY: tiles hold different rows of dx and of dS.
            unsafe { tile_backward(shared_dx.as_ref(), &shared_ds, args, segment, first) };
        },
    );
    smlm_gradients::add(threads, grads, args, &ds);
}

/// # Safety
/// One call at a time per (segment, first).
#[inline(always)]
unsafe fn tile_backward<T: Float>(
    dx: Option<&Shared<'_, T>>,
    ds: &Shared<'_, T>,
    args: &Backward<'_, T>,
    segment: Segment,
    first: usize,
) {
    let (tables, group) = (args.tables, &args.tables.group);
    let rows = ROW_TILE.min(segment.rows - first);
    let row = segment.row + first;
    for (index, module) in group.modules.iter().enumerate() {
        let Some(lora) = tables.lora(&segment, module) else { continue };
        let dy = &args.dy[row * group.width + module.column..];
        let mut dy_tile = vec![T::ZERO; module.width * ROW_TILE];
        fill_tile(&mut dy_tile, rows, |row, column| dy[row * group.width + column]);
        let mut ds_tile = vec![T::ZERO; lora.rank * ROW_TILE];
        multiply(&mut ds_tile, &dy_tile, Right::rows(lora.b, lora.rank));
        for ds in &mut ds_tile {
            *ds *= lora.scale;
        }
        for row in 0..rows {
            let start = tables.s_index(&segment, first + row, index, lora.rank);
            // SAFETY: this tile's rows of dS.
            let ds = unsafe { ds.slice(start, lora.rank) };
            for (j, ds) in ds.iter_mut().enumerate() {
                *ds = ds_tile[j * ROW_TILE + row];
            }
        }
        let Some(dx) = dx else { continue };
        let dropout = tables.dropout(&segment, module);
        let mut dx_tile = vec![T::ZERO; group.input * ROW_TILE];
        multiply(&mut dx_tile, &ds_tile, Right::rows(lora.a, group.input));
        for offset in 0..rows {
            let mask = dropout.row(first + offset);
            // SAFETY: this tile's rows of dx.
            let dx = unsafe { dx.slice((row + offset) * group.input, group.input) };
            for (column, dx) in dx.iter_mut().enumerate() {
                *dx += dropout.apply(mask, column, dx_tile[column * ROW_TILE + offset]);
            }
        }
    }
}
