//! First values of an adapter: a pure function of seed and layout.
//!
//! Each A matrix has its own stream: a key mixed from the seed, the layer and the module. Element
//! `i` comes from counter `i` of that stream alone (Gaussian: counters `2i` and `2i + 1`), so the
//! values do not depend on the order of drawing nor on which other modules are targets. B is zero:
//! an untrained adapter changes nothing.

use super::layout::{AdapterLayout, Part, TensorSpot};

/// How A is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// Uniform within ±1/√in: PEFT's default, Kaiming-uniform with a = √5.
    Default,
    /// Normal with deviation 1/R.
    Gaussian,
}

/// First values in layout order.
pub fn init_adapter(layout: &AdapterLayout, seed: u64, init: Init) -> Vec<f32> {
    let mut values = vec![0.0; layout.len()];
    for spot in layout.tensors().filter(|spot| spot.part == Part::A) {
        let key = stream_key(seed, &spot);
        let tensor = &mut values[spot.offset..spot.offset + spot.len()];
        for (counter, value) in (0..).zip(tensor) {
            *value = match init {
                Init::Default => {
                    let unit = uniform(key, counter);
                    ((2.0 * unit - 1.0) / (spot.cols as f64).sqrt()) as f32
                }
                Init::Gaussian => (normal(key, counter) / spot.rows as f64) as f32,
            };
        }
    }
    values
}

fn stream_key(seed: u64, spot: &TensorSpot) -> u64 {
    mix(mix(seed) ^ mix(((spot.layer as u64) << 8) | spot.module.index() as u64))
}

/// In (0, 1), 53 bits, never an end of the interval.
fn uniform(key: u64, counter: u64) -> f64 {
    let bits = mix(key.wrapping_add(counter.wrapping_mul(GOLDEN))) >> 11;
    (bits as f64 + 0.5) * (1.0 / (1u64 << 53) as f64)
}

/// Standard normal by Box and Muller.
fn normal(key: u64, counter: u64) -> f64 {
    let radius = (-2.0 * uniform(key, 2 * counter).ln()).sqrt();
    radius * (2.0 * std::f64::consts::PI * uniform(key, 2 * counter + 1)).cos()
}

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(GOLDEN);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}
