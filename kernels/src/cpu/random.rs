//! Randomness as a pure function: a 32-bit hash of the words that name a draw, never a state that
//! advances. One multiply-xorshift round per word, the same on every device.

/// One round: a bijection of 32-bit words whose output bits all depend on all input bits.
#[inline(always)]
fn mix(mut h: u32) -> u32 {
    h ^= h >> 16;
    h = h.wrapping_mul(0x7feb_352d);
    h ^= h >> 15;
    h = h.wrapping_mul(0x846c_a68b);
    h ^ (h >> 16)
}

/// Takes one more word into a hash that starts at 0.
#[inline(always)]
pub(super) fn absorb(hash: u32, word: u32) -> u32 {
    mix(hash.wrapping_add(0x9e37_79b9) ^ word)
}

/// Hash of a sequence of words.
#[inline(always)]
pub(super) fn hash<const N: usize>(words: [u32; N]) -> u32 {
    words.into_iter().fold(0, absorb)
}

/// A hash as a number in `[0, 1)`, a multiple of 2⁻²⁴ and so exact in f32.
#[inline(always)]
pub(super) fn uniform(hash: u32) -> f32 {
    (hash >> 8) as f32 * (1.0 / (1 << 24) as f32)
}

/// Dropout of one row of one module's input: column `c` is dropped where
/// `uniform(hash(seed_lo, seed_hi, position, layer, module, c)) < probability`.
#[derive(Clone, Copy)]
pub(super) struct DropoutRow {
    key: u32,
    probability: f32,
}

impl DropoutRow {
    /// `words`: seed low, seed high, position in the example, layer, module.
    pub fn new(words: [u32; 5], probability: f32) -> Self {
        Self { key: hash(words), probability }
    }
    /// Whether column `column` is kept.
    #[inline(always)]
    pub fn keeps(self, column: usize) -> bool {
        uniform(absorb(self.key, column as u32)) >= self.probability
    }
}
