//! The one matrix product of the CPU device. A result depends on its own row and column alone, not
//! on how many rows there are, where they stand or how many threads work, because every call of the
//! library multiplies exactly [`ROW_TILE`] rows (zeros where there are fewer) by at most [`PANEL`]
//! columns counted from column 0, on one thread.
//!
//! A *tile* is stored with its rows innermost, `(width, ROW_TILE)`: what a product writes is what
//! the next product reads.

use super::float::Float;
use super::threads::{Shared, Threads};
use crate::ROW_TILE;

/// Columns multiplied at once: a multiple of the library's register block on common processors,
/// few enough that it packs nothing.
pub(super) const PANEL: usize = 48;

/// The right factor: element `(k, n)` is `values[k * row_stride + n * column_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Right<'a, T> {
    pub values: &'a [T],
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a, T> Right<'a, T> {
    /// A row-major `(K, N)` matrix of row length `width`.
    pub fn rows(values: &'a [T], width: usize) -> Self {
        Self { values, row_stride: width, column_stride: 1 }
    }
    /// The transpose of a row-major `(N, K)` matrix of row length `width`.
    pub fn transposed(values: &'a [T], width: usize) -> Self {
        Self { values, row_stride: 1, column_stride: width }
    }
    /// The same matrix without its first `columns` columns.
    fn skip(self, columns: usize) -> Self {
        Self { values: &self.values[columns * self.column_stride..], ..self }
    }
}

/// Tile times matrix: `out (N, ROW_TILE) = tile (depth, ROW_TILE)ᵀ-wise · right (depth, N)`, that
/// is `out[n][r] = Σ_k tile[k][r] · right(k, n)`, N = `out.len() / ROW_TILE`.
pub(super) fn multiply<T: Float>(out: &mut [T], tile: &[T], right: Right<'_, T>) {
    for (panel, part) in out.chunks_mut(PANEL * ROW_TILE).enumerate() {
        multiply_panel(part, tile, right.skip(panel * PANEL));
    }
}

/// The only call of the `gemm` library; `out` has at most [`PANEL`] columns.
fn multiply_panel<T: Float>(out: &mut [T], tile: &[T], right: Right<'_, T>) {
    let (columns, depth) = (out.len() / ROW_TILE, tile.len() / ROW_TILE);
    if columns == 0 || depth == 0 {
        return out.fill(T::ZERO);
    }
    assert!(columns <= PANEL && out.len().is_multiple_of(ROW_TILE));
    let last = (depth - 1) * right.row_stride + (columns - 1) * right.column_stride;
    assert!(tile.len().is_multiple_of(ROW_TILE) && last < right.values.len());
    // SAFETY: the asserts keep all three matrices inside their slices.
    unsafe {
        gemm::gemm(
            ROW_TILE,
            columns,
            depth,
            out.as_mut_ptr(),
            ROW_TILE as isize,
            1,
            false,
            tile.as_ptr(),
            ROW_TILE as isize,
            1,
            right.values.as_ptr(),
            right.column_stride as isize,
            right.row_stride as isize,
            T::ZERO,
            T::ONE,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Writes rows `(rows, width)` at most [`ROW_TILE`] of them into a tile, zeros for the missing.
#[inline(always)]
pub(super) fn fill_tile<T: Float>(tile: &mut [T], rows: usize, value: impl Fn(usize, usize) -> T) {
    for (column, cells) in tile.chunks_exact_mut(ROW_TILE).enumerate() {
        for (row, cell) in cells.iter_mut().enumerate() {
            *cell = if row < rows { value(row, column) } else { T::ZERO };
        }
    }
}

/// `y (N, out) = x (N, depth) · right (depth, out) + bias`.
pub(super) fn matmul<T: Float>(
    threads: &Threads,
    y: &mut [T],
    x: &[T],
    right: Right<'_, T>,
    bias: Option<&[T]>,
    (depth, out): (usize, usize),
) {
    if y.is_empty() {
        return;
    }
    let rows = y.len() / out;
    assert_eq!((x.len(), y.len()), (rows * depth, rows * out), "shapes of a matrix product");
    let (tiles, panels) = (rows.div_ceil(ROW_TILE), out.div_ceil(PANEL));
    let mut packed = vec![T::ZERO; tiles * depth * ROW_TILE];
    threads.each_chunk(
        &mut packed,
        depth * ROW_TILE,
        rows * depth,
        #[inline(always)]
        |tile, cells| {
            let x = &x[tile * ROW_TILE * depth..];
            let present = ROW_TILE.min(rows - tile * ROW_TILE);
            fill_tile(cells, present, |row, column| x[row * depth + column]);
        },
    );
    let y = Shared::new(y);
    // Tiles of one panel follow each other, so that its weights stay in cache.
    threads.each(tiles * panels, 2 * tiles * ROW_TILE * depth * out, |task| {
        let (panel, tile) = (task / tiles, task % tiles);
        let (first, row) = (panel * PANEL, tile * ROW_TILE);
        let columns = PANEL.min(out - first);
        let mut cells = [T::ZERO; PANEL * ROW_TILE];
        let packed = &packed[row * depth..(row + ROW_TILE) * depth];
        multiply_panel(&mut cells[..columns * ROW_TILE], packed, right.skip(first));
        for offset in 0..ROW_TILE.min(rows - row) {
            // SAFETY: rows of a tile and columns of a panel belong to one task.
            let y = unsafe { y.slice((row + offset) * out + first, columns) };
            for (column, y) in y.iter_mut().enumerate() {
                *y = cells[column * ROW_TILE + offset];
            }
            if let Some(bias) = bias {
                for (y, bias) in y.iter_mut().zip(&bias[first..]) {
                    *y += *bias;
                }
            }
        }
    });
}
