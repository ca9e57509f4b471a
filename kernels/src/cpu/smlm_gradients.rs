//! Gradients of A and B: `dA += dSᵀ drop(x)`, `dB += scale · dyᵀ S`.
//!
//! A gradient is the sum of one partial per tile of [`ROW_TILE`] rows counted from the start of
//! its segment, zero-padded, added one by one in segment order, then tile order. Threads share out
//! columns, never additions.

use super::float::Float;
use super::matmul::{PANEL, Right, multiply};
use super::segments::{Lora, Segment};
use super::smlm::Backward;
use super::threads::{Shared, Threads};
use crate::ROW_TILE;

/// Which gradient.
#[derive(Clone, Copy)]
enum Matrix {
    /// A `(R, in)`, from dS and the dropped input.
    A,
    /// B `(out, R)`, from S and dy.
    B,
}

/// Columns of A or rows of B, [`PANEL`] at most, of one module in every adapter of the batch.
#[derive(Clone, Copy)]
struct Panel {
    matrix: Matrix,
    module: usize,
    column: usize,
    width: usize,
}

impl Panel {
    fn cut(matrix: Matrix, module: usize, columns: usize) -> impl Iterator<Item = Self> {
        (0..columns).step_by(PANEL).map(move |column| Self {
            matrix,
            module,
            column,
            width: PANEL.min(columns - column),
        })
    }
    /// Where the gradient of rank `j`, column `c` of the panel lies, from the start of A's.
    #[inline(always)]
    fn place<T: Float>(&self, lora: &Lora<'_, T>, input: usize, j: usize, c: usize) -> usize {
        match self.matrix {
            Matrix::A => j * input + self.column + c,
            Matrix::B => lora.a.len() + (self.column + c) * lora.rank + j,
        }
    }
}

/// Adds all gradients of a group; `ds` is laid out as S.
pub(super) fn add<T: Float>(threads: &Threads, grads: &mut [T], args: &Backward<'_, T>, ds: &[T]) {
    let group = &args.tables.group;
    let modules = group.modules.iter().enumerate();
    let panels: Vec<Panel> = modules
        .flat_map(|(index, module)| {
            let a = Panel::cut(Matrix::A, index, group.input);
            a.chain(Panel::cut(Matrix::B, index, module.width))
        })
        .collect();
    let grads = Shared::new(grads);
    threads.each(
        panels.len(),
        args.tables.work(),
        #[inline(always)]
        |task| {
            // SAFETY: panels are different columns of different matrices.
            unsafe { add_panel(&grads, args, ds, panels[task]) };
        },
    );
}

/// Adds every segment's partials of one panel, in order.
///
/// # Safety
/// One call at a time per panel.
#[inline(always)]
unsafe fn add_panel<T: Float>(
    grads: &Shared<'_, T>,
    args: &Backward<'_, T>,
    ds: &[T],
    panel: Panel,
) {
    let (tables, input) = (args.tables, args.tables.group.input);
    for segment in &tables.segments {
        let Some(lora) = tables.lora(segment, &tables.group.modules[panel.module]) else {
            continue;
        };
        let Some(grad) = lora.grad else { continue };
        // The panel's sums so far, as tiles with ranks innermost: (R / ROW_TILE, width, ROW_TILE).
        let mut sums = vec![T::ZERO; lora.rank.div_ceil(ROW_TILE) * panel.width * ROW_TILE];
        let tile_place =
            |j: usize, c: usize| (j / ROW_TILE * panel.width + c) * ROW_TILE + j % ROW_TILE;
        for j in 0..lora.rank {
            for c in 0..panel.width {
                let place = grad + panel.place(&lora, input, j, c);
                // SAFETY: this panel's columns.
                sums[tile_place(j, c)] = unsafe { grads.slice(place, 1) }[0];
            }
        }
        for first in segment.tiles() {
            add_tile(&mut sums, args, ds, panel, (segment, first), &lora);
        }
        for j in 0..lora.rank {
            for c in 0..panel.width {
                let place = grad + panel.place(&lora, input, j, c);
                // SAFETY: this panel's columns.
                let grad = unsafe { grads.slice(place, 1) };
                grad[0] = sums[tile_place(j, c)];
            }
        }
    }
}

/// Adds one partial: a product over the rows of a tile, [`ROW_TILE`] ranks at a time.
#[inline(always)]
fn add_tile<T: Float>(
    sums: &mut [T],
    args: &Backward<'_, T>,
    ds: &[T],
    panel: Panel,
    (segment, first): (&Segment, usize),
    lora: &Lora<'_, T>,
) {
    let rows = ROW_TILE.min(segment.rows - first);
    let mut wide = [T::ZERO; ROW_TILE * PANEL];
    fill_wide(&mut wide, args, panel, (segment, first), rows);
    let (narrow, factor) = match panel.matrix {
        Matrix::A => (ds, T::ONE),
        Matrix::B => (args.s, lora.scale),
    };
    for (chunk, sums) in sums.chunks_exact_mut(panel.width * ROW_TILE).enumerate() {
        let rank = chunk * ROW_TILE;
        let ranks = ROW_TILE.min(lora.rank - rank);
        let mut tile = [T::ZERO; ROW_TILE * ROW_TILE];
        for (offset, cells) in tile.chunks_exact_mut(ROW_TILE).take(rows).enumerate() {
            let start = args.tables.s_index(segment, first + offset, panel.module, lora.rank);
            cells[..ranks].copy_from_slice(&narrow[start + rank..][..ranks]);
        }
        let mut partial = [T::ZERO; PANEL * ROW_TILE];
        let partial = &mut partial[..sums.len()];
        multiply(partial, &tile, Right::rows(&wide, PANEL));
        for (sum, partial) in sums.iter_mut().zip(partial) {
            *sum += factor * *partial;
        }
    }
}

/// The tile's rows of the panel's columns, `(rows, PANEL)`: dropped input for A, dy for B.
#[inline(always)]
fn fill_wide<T: Float>(
    wide: &mut [T],
    args: &Backward<'_, T>,
    panel: Panel,
    (segment, first): (&Segment, usize),
    rows: usize,
) {
    let (tables, group) = (args.tables, &args.tables.group);
    let module = &group.modules[panel.module];
    let dropout = tables.dropout(segment, module);
    for (offset, cells) in wide.chunks_exact_mut(PANEL).take(rows).enumerate() {
        let row = segment.row + first + offset;
        let cells = &mut cells[..panel.width];
        match panel.matrix {
            Matrix::A => {
                let mask = dropout.row(first + offset);
                let x = &args.x[row * group.input + panel.column..];
                for (c, (cell, x)) in cells.iter_mut().zip(x).enumerate() {
                    *cell = dropout.apply(mask, panel.column + c, *x);
                }
            }
            Matrix::B => {
                let start = row * group.width + module.column + panel.column;
                cells.copy_from_slice(&args.dy[start..start + panel.width]);
            }
        }
    }
}
