//! RMSNorm over rows, forward beside backward, and the residual sum that goes before it.

use super::float::Float;
use super::lanes::{dot, dot3};
use super::threads::Threads;

/// `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
pub(super) fn inverse_rms<T: Float>(x: &[T], eps: T) -> T {
    T::ONE / (dot(x, x) / T::from_f64(x.len() as f64) + eps).sqrt()
}

/// The two factors of the gradient, `dx = near · weight · dy − far · x`.
#[inline(always)]
pub(super) fn gradient_factors<T: Float>(dy: &[T], x: &[T], weight: &[T], eps: T) -> (T, T) {
    let near = inverse_rms(x, eps);
    let along = dot3(dy, x, weight);
    (near, near * near * near * along / T::from_f64(x.len() as f64))
}

#[inline(always)]
fn norm_row<T: Float>(y: &mut [T], x: &[T], weight: &[T], eps: T) {
    let factor = inverse_rms(x, eps);
    for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
        *y = *x * factor * *weight;
    }
}

/// `y = rms_norm(x)`.
pub(super) fn rms_norm<T: Float>(threads: &Threads, y: &mut [T], x: &[T], weight: &[T], eps: f64) {
    let width = weight.len();
    assert!(y.len() == x.len() && x.len().is_multiple_of(width), "shapes of rms_norm");
    threads.each_chunk(
        y,
        width,
        4 * x.len(),
        #[inline(always)]
        |row, y| norm_row(y, &x[row * width..][..width], weight, T::from_f64(eps)),
    );
}

/// `x += delta`, then `y = rms_norm(x)`.
pub(super) fn add_rms_norm<T: Float>(
    threads: &Threads,
    y: &mut [T],
    x: &mut [T],
    delta: &[T],
    weight: &[T],
    eps: f64,
) {
    add(threads, x, delta);
    rms_norm(threads, y, x, weight, eps);
}

/// Adds to `dx` the gradient through [`rms_norm`].
pub(super) fn rms_norm_backward<T: Float>(
    threads: &Threads,
    dx: &mut [T],
    dy: &[T],
    x: &[T],
    weight: &[T],
    eps: f64,
) {
    let width = weight.len();
    assert!(dx.len() == x.len() && dy.len() == x.len(), "shapes of rms_norm_backward");
    assert!(x.len().is_multiple_of(width), "rows of rms_norm_backward");
    threads.each_chunk(
        dx,
        width,
        8 * x.len(),
        #[inline(always)]
        |row, dx| {
            let (dy, x) = (&dy[row * width..][..width], &x[row * width..][..width]);
            let (near, far) = gradient_factors(dy, x, weight, T::from_f64(eps));
            for (((dx, dy), x), weight) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
                *dx += near * *weight * *dy - far * *x;
            }
        },
    );
}

/// `x += delta`.
pub(super) fn add<T: Float>(threads: &Threads, x: &mut [T], delta: &[T]) {
    assert_eq!(x.len(), delta.len(), "lengths of a sum");
    let work = x.len();
    threads.each_chunk(
        x,
        crate::tables::PAGE,
        work,
        #[inline(always)]
        |index, x| {
            for (x, delta) in x.iter_mut().zip(&delta[index * crate::tables::PAGE..]) {
                *x += *delta;
            }
        },
    );
}
