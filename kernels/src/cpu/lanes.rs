//! Sums in a fixed order that vector units like: element `i` goes to lane `i % LANES`, each lane
//! adds in rising order, then the lanes fold in halves. The order depends on the length alone.

use super::float::Float;

/// Partial sums kept side by side.
pub(super) const LANES: usize = 16;

/// `Σ a[i] · b[i]`.
#[inline(always)]
pub(super) fn dot<T: Float>(a: &[T], b: &[T]) -> T {
    debug_assert_eq!(a.len(), b.len());
    let mut lanes = [T::ZERO; LANES];
    let (whole_a, rest_a) = a.as_chunks::<LANES>();
    let (whole_b, rest_b) = b.as_chunks::<LANES>();
    for (x, y) in whole_a.iter().zip(whole_b) {
        for lane in 0..LANES {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    for (lane, (x, y)) in lanes.iter_mut().zip(rest_a.iter().zip(rest_b)) {
        *lane += *x * *y;
    }
    fold(lanes)
}

/// `Σ a[i] · b[i] · c[i]`.
#[inline(always)]
pub(super) fn dot3<T: Float>(a: &[T], b: &[T], c: &[T]) -> T {
    debug_assert!(a.len() == b.len() && b.len() == c.len());
    let mut lanes = [T::ZERO; LANES];
    let ((whole_a, rest_a), (whole_b, rest_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let (whole_c, rest_c) = c.as_chunks::<LANES>();
    for ((x, y), z) in whole_a.iter().zip(whole_b).zip(whole_c) {
        for lane in 0..LANES {
            lanes[lane] += x[lane] * y[lane] * z[lane];
        }
    }
    for (lane, ((x, y), z)) in lanes.iter_mut().zip(rest_a.iter().zip(rest_b).zip(rest_c)) {
        *lane += *x * *y * *z;
    }
    fold(lanes)
}

/// `Σ a[i]`.
#[inline(always)]
pub(super) fn sum<T: Float>(a: &[T]) -> T {
    let mut lanes = [T::ZERO; LANES];
    let (whole, rest) = a.as_chunks::<LANES>();
    for x in whole {
        for lane in 0..LANES {
            lanes[lane] += x[lane];
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += *x;
    }
    fold(lanes)
}

#[inline(always)]
fn fold<T: Float>(mut lanes: [T; LANES]) -> T {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            let upper = lanes[lane + half];
            lanes[lane] += upper;
        }
        half /= 2;
    }
    lanes[0]
}

/// `y += factor · x`.
#[inline(always)]
pub(super) fn add_scaled<T: Float>(y: &mut [T], factor: T, x: &[T]) {
    debug_assert_eq!(y.len(), x.len());
    for (y, x) in y.iter_mut().zip(x) {
        *y += factor * *x;
    }
}
