//! Rotary tables against those of transformers.

use super::{BASES, golden, golden_floats};
use crate::base::{BaseFiles, RopeConfig, RopeScaling};

#[test]
fn tables_equal_those_of_transformers() {
    for name in BASES {
        let files = BaseFiles::open(&golden(&format!("bases/{name}"))).unwrap();
        let config = files.config();
        let path = format!("bases/{name}/expected.safetensors");
        let positions = 48;
        let tables = config.rope.tables(config.heads.head_dim, positions);
        for (ours, key) in [(tables.cos, "rope_cos"), (tables.sin, "rope_sin")] {
            let theirs = golden_floats(&path, key);
            assert_eq!(ours.len(), theirs.len());
            let far = |(a, b): (&f32, &f32)| (a - b).abs();
            let largest = ours.iter().zip(&theirs).map(far).fold(0.0, f32::max);
            // A frequency one rounding apart turns by 47 · 6e-8 at the last position.
            assert!(largest < 4e-6, "{name} {key}: {largest}");
        }
    }
}

#[test]
fn llama3_keeps_short_divides_long_and_blends_between() {
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 32,
    };
    let plain = RopeConfig { theta: 100.0, scaling: RopeScaling::None }.inverse_frequencies(16);
    let scaled = RopeConfig { theta: 100.0, scaling }.inverse_frequencies(16);
    let ratios: Vec<f32> = plain.iter().zip(&scaled).map(|(a, b)| a / b).collect();
    assert_eq!(ratios[0], 1.0);
    assert!(ratios[1] > 1.0 && ratios[2] > ratios[1] && ratios[2] < 8.0, "{ratios:?}");
    assert!(ratios[3..].iter().all(|ratio| *ratio == 8.0), "{ratios:?}");
}

#[test]
fn linear_divides_all() {
    let scaling = RopeScaling::Linear { factor: 2.0 };
    let plain = RopeConfig { theta: 1e4, scaling: RopeScaling::None };
    let scaled = RopeConfig { theta: 1e4, scaling };
    // Position 2p of the scaled tables is position p of the plain ones.
    let (plain, scaled) = (plain.tables(8, 8), scaled.tables(8, 16));
    for position in 0..8 {
        assert_eq!(plain.cos[position * 4..][..4], scaled.cos[position * 8..][..4]);
    }
}
