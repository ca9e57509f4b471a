//! First values: their distribution, their seed, their permanence.

use kernels::Module;

use super::dims;
use crate::adapters::init::{Init, init_adapter};
use crate::adapters::layout::{AdapterLayout, AdapterShape, Part, TensorSpot};

fn layout(rank: usize, targets: &[Module]) -> AdapterLayout {
    let shape = AdapterShape::new(rank, 8.0, false, targets.to_vec()).unwrap();
    AdapterLayout::new(&dims("llama3"), &shape)
}

fn tensor<'a>(values: &'a [f32], spot: &TensorSpot) -> &'a [f32] {
    &values[spot.offset..spot.offset + spot.len()]
}

/// Mean and mean square.
fn moments(values: &[f32]) -> (f64, f64) {
    let count = values.len() as f64;
    let sum: f64 = values.iter().map(|value| f64::from(*value)).sum();
    let squares: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
    (sum / count, squares / count)
}

#[test]
fn default_is_uniform_and_an_adapter_starts_as_nothing() {
    let layout = layout(256, &Module::ALL);
    let values = init_adapter(&layout, 7, Init::Default);
    for spot in layout.tensors() {
        let tensor = tensor(&values, &spot);
        if spot.part == Part::B {
            assert!(tensor.iter().all(|value| *value == 0.0));
            continue;
        }
        let bound = 1.0 / (spot.cols as f64).sqrt();
        assert!(tensor.iter().all(|value| f64::from(value.abs()) <= bound));
        let (mean, square) = moments(tensor);
        assert!(mean.abs() < 0.02 * bound, "{mean} of {bound}");
        assert!((square / (bound * bound) - 1.0 / 3.0).abs() < 0.02, "{square}");
    }
}

#[test]
fn gaussian_has_deviation_one_over_rank() {
    let layout = layout(128, &[Module::Q, Module::Down]);
    let values = init_adapter(&layout, 7, Init::Gaussian);
    for spot in layout.tensors().filter(|spot| spot.part == Part::A) {
        let (mean, square) = moments(tensor(&values, &spot));
        assert!(mean.abs() < 0.06 / 128.0, "{mean}");
        assert!((square * 128.0 * 128.0 - 1.0).abs() < 0.08, "{square}");
    }
}

#[test]
fn values_are_a_function_of_seed_layer_and_module_only() {
    let all = layout(4, &Module::ALL);
    let some = layout(4, &[Module::V, Module::Up]);
    for init in [Init::Default, Init::Gaussian] {
        let values = init_adapter(&all, 11, init);
        assert_eq!(values, init_adapter(&all, 11, init));
        assert_ne!(values, init_adapter(&all, 12, init));
        let fewer = init_adapter(&some, 11, init);
        for spot in some.tensors() {
            let key = |other: &TensorSpot| (other.layer, other.module, other.part);
            let twin = all.tensors().find(|other| key(other) == key(&spot)).unwrap();
            assert_eq!(tensor(&fewer, &spot), tensor(&values, &twin));
        }
        let mut starts: Vec<u32> = all
            .tensors()
            .filter(|spot| spot.part == Part::A)
            .map(|spot| values[spot.offset].to_bits())
            .collect();
        starts.sort_unstable();
        starts.dedup();
        assert_eq!(starts.len(), 14, "each layer and module has a stream of its own");
    }
}

#[test]
fn first_values_are_kept() {
    // A job that resumes on a newer version must start from the same adapter.
    let layout = layout(2, &[Module::Q]);
    let first = |init| init_adapter(&layout, 1, init)[..3].to_vec();
    assert_eq!(first(Init::Default), [-0.124_742_68, 0.006_621_892, -0.016_162_818]);
    let gaussian = [-1.828_949_6, -0.429_947_47, -0.652_074_3];
    // Logarithm and cosine may round differently on another system.
    let near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-6;
    assert!(first(Init::Gaussian).iter().zip(&gaussian).all(near));
}
