//! How much device memory something takes, counted in elements.

use std::ops::{Add, Mul};

/// Numbers of elements, by the types of [`kernels::Device`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Activations and weights in compute precision.
    pub act: usize,
    /// Wide values.
    pub wide: usize,
    /// Integers.
    pub int: usize,
}

impl Footprint {
    /// So many activations.
    pub fn act(act: usize) -> Self {
        Self { act, ..Self::default() }
    }

    /// So many wide values.
    pub fn wide(wide: usize) -> Self {
        Self { wide, ..Self::default() }
    }

    /// So many integers.
    pub fn int(int: usize) -> Self {
        Self { int, ..Self::default() }
    }

    /// Bytes where an activation has `act_bytes`; wide values and integers have four.
    pub fn bytes(self, act_bytes: usize) -> u64 {
        (self.act * act_bytes + (self.wide + self.int) * 4) as u64
    }
}

impl Add for Footprint {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { act: self.act + other.act, wide: self.wide + other.wide, int: self.int + other.int }
    }
}

impl Mul<usize> for Footprint {
    type Output = Self;
    fn mul(self, times: usize) -> Self {
        Self { act: self.act * times, wide: self.wide * times, int: self.int * times }
    }
}
