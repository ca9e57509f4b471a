//! Attention of prefill and decode rows over the paged cache. Inference only: no backward.

use super::Host;
use super::attention::attend;
use super::float::Float;
use super::threads::{Shared, Threads};
use crate::tables::SequenceRow;
use crate::{HeadShape, PagedKv};

/// One batch row: how many cached keys it sees, and where their cache rows are listed.
struct Reader {
    row: usize,
    keys: usize,
    first: usize,
}

/// Every batch row of the sequence table, and the cache rows of all sequences one after another.
fn readers<T: Float, D: Host<T>>(kv: &PagedKv<'_, D>) -> (Vec<Reader>, Vec<usize>) {
    let (mut readers, mut cache_rows) = (Vec::new(), Vec::new());
    for sequence in kv.sequences.slice().chunks_exact(SequenceRow::WIDTH) {
        let column = |column: usize| sequence[column] as usize;
        let (position, rows) = (column(SequenceRow::POSITION), column(SequenceRow::ROWS));
        let first = cache_rows.len();
        let blocks = &kv.blocks.slice()[column(SequenceRow::BLOCKS)..];
        cache_rows.extend((0..position + rows).map(|index| {
            blocks[index / kv.block_size] as usize * kv.block_size + index % kv.block_size
        }));
        readers.extend((0..rows).map(|offset| Reader {
            row: column(SequenceRow::ROW) + offset,
            keys: position + offset + 1,
            first,
        }));
    }
    (readers, cache_rows)
}

/// `o` of the rows that the sequence table names.
pub(super) fn forward<T: Float, D: Host<T>>(
    threads: &Threads,
    o: &mut [T],
    qkv: &[T],
    kv: &PagedKv<'_, D>,
    heads: HeadShape,
) {
    let (readers, cache_rows) = readers(kv);
    let pairs: usize = readers.iter().map(|reader| reader.keys).sum();
    let (dim, kv_width) = (heads.head_dim, heads.kv_width());
    let (keys, values) = (kv.k.slice(), kv.v.slice());
    let o = Shared::new(o);
    threads.each(
        readers.len() * heads.q_heads,
        4 * pairs * heads.q_width(),
        #[inline(always)]
        |task| {
            let (head, reader) = (task / readers.len(), &readers[task % readers.len()]);
            let column = head / (heads.q_heads / heads.kv_heads) * dim;
            let rows = &cache_rows[reader.first..][..reader.keys];
            let q = &qkv[reader.row * heads.qkv_width() + head * dim..][..dim];
            // SAFETY: one task per row and head; the table names no row twice.
            let o = unsafe { o.slice((reader.row * heads.q_heads + head) * dim, dim) };
            attend(
                o,
                q,
                reader.keys,
                #[inline(always)]
                |key| &keys[rows[key] * kv_width + column..][..dim],
                #[inline(always)]
                |key| &values[rows[key] * kv_width + column..][..dim],
            );
        },
    );
}
