//! Random inputs: never zeros, for their multiplication costs less power than that of numbers.

use std::sync::Arc;
use worker::adapters::AdapterLayout;

/// Values that adapters are cut from, round and round.
const BLOCK: usize = (1 << 20) + 7;
/// Bound of adapter values: about what training leaves in A.
const BOUND: f32 = 0.02;

/// A stream of random numbers (SplitMix64).
pub struct Random(u64);

impl Random {
    /// A stream of its own per seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0xD129_0D3F_8A6C_5E27) ^ 0x5851_F42D_4C95_7F2D)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        value ^ (value >> 31)
    }

    /// Below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        ((u128::from(self.bits()) * limit as u128) >> 64) as usize
    }

    /// Within ±`bound`.
    pub fn uniform(&mut self, bound: f32) -> f32 {
        let unit = (self.bits() >> 40) as f32 / (1u64 << 23) as f32;
        (unit - 1.0) * bound
    }

    /// Token ids below `vocab`.
    pub fn tokens(&mut self, count: usize, vocab: usize) -> Vec<u32> {
        (0..count).map(|_| self.below(vocab) as u32).collect()
    }

    /// Numbers within ±`bound`.
    pub fn floats(&mut self, count: usize, bound: f32) -> Vec<f32> {
        (0..count).map(|_| self.uniform(bound)).collect()
    }
}

/// Values of whole adapters, A and B random: cut from one block of random values, each adapter
/// from another place, because an adapter of an 8 B base has 42 million of them.
pub struct AdapterValues {
    block: Vec<f32>,
}

impl AdapterValues {
    /// Makes the block.
    pub fn new() -> Self {
        Self { block: Random::new(7).floats(BLOCK, BOUND) }
    }

    /// Values of adapter number `index`.
    pub fn of(&self, layout: &AdapterLayout, index: usize) -> Arc<Vec<f32>> {
        let mut at = index.wrapping_mul(104_729) % BLOCK;
        let mut values = Vec::with_capacity(layout.len());
        while values.len() < layout.len() {
            let count = (BLOCK - at).min(layout.len() - values.len());
            values.extend_from_slice(&self.block[at..at + count]);
            at = 0;
        }
        Arc::new(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay_within_their_bounds_and_reach_both_halves() {
        let mut random = Random::new(1);
        let floats = random.floats(1000, 0.5);
        assert!(floats.iter().all(|value| value.abs() <= 0.5));
        let below = floats.iter().filter(|value| **value < 0.0).count();
        assert!((400..600).contains(&below), "{below}");
        let tokens = random.tokens(1000, 10);
        assert!((0..10).all(|id| tokens.contains(&id)) && tokens.iter().all(|id| *id < 10));
    }
}
