//! The two element types of the CPU device. Rust never fuses `a * b + c` on its own, so generic
//! code gives the same bits at every vector width.

use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, DivAssign, Mul, MulAssign, Neg, Sub, SubAssign};

/// f32 to run models, f64 to check gradients by finite differences.
pub trait Float:
    Copy
    + Debug
    + Default
    + PartialOrd
    + Send
    + Sync
    + 'static
    + Add<Output = Self>
    + AddAssign
    + Sub<Output = Self>
    + SubAssign
    + Mul<Output = Self>
    + MulAssign
    + Div<Output = Self>
    + DivAssign
    + Neg<Output = Self>
{
    /// Name of the precision.
    const NAME: &'static str;
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Largest finite value.
    const MAX: Self;
    /// −∞.
    const NEG_INFINITY: Self;
    /// Rounds.
    fn from_f64(value: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// Exact.
    fn from_f32(value: f32) -> Self;
    /// Rounds.
    fn to_f32(self) -> f32;
    /// e to the power of self.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Whether neither infinite nor NaN.
    fn is_finite(self) -> bool;
    /// Whether not a number.
    fn is_nan(self) -> bool;
}

macro_rules! float {
    ($t:ident, $exp:expr) => {
        impl Float for $t {
            const NAME: &'static str = stringify!($t);
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const MAX: Self = $t::MAX;
            const NEG_INFINITY: Self = $t::NEG_INFINITY;
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                value as $t
            }
            #[inline(always)]
            fn to_f32(self) -> f32 {
                self as f32
            }
            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
            }
            #[inline(always)]
            fn ln(self) -> Self {
                $t::ln(self)
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                $t::sqrt(self)
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                $t::is_finite(self)
            }
            #[inline(always)]
            fn is_nan(self) -> bool {
                $t::is_nan(self)
            }
        }
    };
}

float!(f32, exp_f32);
float!(f64, f64::exp);

/// e to the power of `x`, within 2 units in the last place: a polynomial that compilers turn into
/// vector code, and the same bits whatever the system's library does. `exp(0)` is exactly 1.
#[inline(always)]
fn exp_f32(x: f32) -> f32 {
    /// Adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2, its leading bits and the rest.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    /// Of `(eʳ − 1 − r) / r²` for |r| ≤ ln 2 / 2 (Moshier, Cephes), highest power first.
    const SERIES: [f32; 6] =
        [1.987_569_2e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5];
    // Comparisons that keep NaN. Beyond these bounds the result is 0 or infinite.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let r = x - whole * LN_2[0] - whole * LN_2[1];
    let series = SERIES.into_iter().fold(0.0, |sum, factor| sum * r + factor);
    let mantissa = series * (r * r) + r + 1.0;
    // Two factors, so that powers outside the normal range come out right.
    let half = power >> 1;
    let factor = |power: i32| f32::from_bits((power.wrapping_add(127) as u32) << 23);
    mantissa * factor(half) * factor(power.wrapping_sub(half))
}

#[cfg(test)]
mod tests {
    use super::{Float, exp_f32};

    #[test]
    fn exp_is_near_the_true_value() {
        for step in -1_040_000..887_200 {
            let x = step as f32 / 10_000.0;
            let (got, expected) = (f64::from(exp_f32(x)), f64::from(x).exp());
            let error = (got - expected).abs();
            let subnormal = f64::from(f32::from_bits(1));
            assert!(error <= 2.4e-7 * expected + subnormal, "exp({x}) = {got}, not {expected}");
        }
    }

    #[test]
    fn exp_of_special_values() {
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_f32(-1e30), 0.0);
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp_f32(1e30), f32::INFINITY);
        assert!(Float::exp(f32::NAN).is_nan());
    }
}
