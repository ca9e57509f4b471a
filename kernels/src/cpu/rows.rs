//! Copies of whole rows by index: embedding, gather, scatter.

/// `y[i] = x[rows[i]]`.
pub(super) fn gather<T: Copy>(y: &mut [T], x: &[T], rows: &[i32], width: usize) {
    assert_eq!(y.len(), rows.len() * width, "rows to gather");
    for (y, row) in y.chunks_exact_mut(width).zip(rows) {
        y.copy_from_slice(&x[*row as usize * width..][..width]);
    }
}

/// `y[rows[i]] = x[i]`.
pub(super) fn scatter<T: Copy>(y: &mut [T], x: &[T], rows: &[i32], width: usize) {
    assert_eq!(x.len(), rows.len() * width, "rows to scatter");
    for (x, row) in x.chunks_exact(width).zip(rows) {
        y[*row as usize * width..][..width].copy_from_slice(x);
    }
}
