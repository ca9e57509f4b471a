//! The whole model's adapter gradients in f64 against differences of its loss.

use crate::common::training::{item, micro_batch};
use crate::common::{Adapter, Random, gradients, model, place, sizes};
use kernels::tables::PAGE;
use kernels::{Cpu, Module};
use worker::model::Model;
use worker::train::{Item, Kind, Sequence};

const PAGES_BEFORE: usize = 1;
/// Half the distance between the two nearest of four points.
const STEP: f64 = 2e-4;

fn examples() -> [Sequence; 2] {
    let mut random = Random::new(5);
    [19, 7].map(|length| {
        let trained = (0..length).map(|at| at % 3 != 0).collect();
        Sequence { tokens: random.tokens(length), trained }
    })
}

/// Runs both examples; their loss, scaled as the gradient is.
fn run(model: &mut Model<Cpu<f64>>, kind: Kind, rank: usize, dropout: f32) -> f64 {
    let examples = examples();
    let labels: usize = examples.iter().map(Sequence::labels).sum();
    let scale = 1.0 / labels as f32;
    let items: Vec<(Item, &Sequence)> = (0..)
        .zip(&examples)
        .map(|(seed, example)| {
            (Item { dropout_seed: seed, dropout, ..item(0, 0, rank, scale) }, example)
        })
        .collect();
    micro_batch(model, kind, items, 11);
    let losses = &model.slice_losses()[..labels];
    losses.iter().sum::<f64>() * f64::from(scale)
}

/// Along one random direction per matrix: the gradient's part and the difference quotient of
/// fourth order agree.
fn check(base: &str, layers: usize, dropout: f32) {
    let mut sizes = sizes();
    sizes.loss_rows = sizes.arena_rows;
    let mut model = model::<f64>(base, 1, sizes);
    assert_eq!(model.config.layers, layers);
    let adapter = Adapter::random(base, 3, &Module::ALL, 11);
    let rank = adapter.rank();
    place(&mut model, 0, PAGES_BEFORE, &adapter);
    run(&mut model, Kind::Train, rank, dropout);
    let gradients = gradients(&model, PAGES_BEFORE, &adapter);
    let mut random = Random::new(17);
    for spot in adapter.layout.tensors() {
        let direction: Vec<f64> =
            (0..spot.len()).map(|_| if random.below(2) == 0 { -1.0 } else { 1.0 }).collect();
        let start = PAGES_BEFORE * PAGE + spot.offset;
        let weights: Vec<f64> = model.pool.weights[start..][..spot.len()].to_vec();
        let mut loss_at = |steps: f64| {
            let moved = weights.iter().zip(&direction).map(|(w, d)| w + steps * STEP * d);
            for (weight, moved) in model.pool.weights[start..].iter_mut().zip(moved) {
                *weight = moved;
            }
            run(&mut model, Kind::Evaluate, rank, dropout)
        };
        let near = loss_at(1.0) - loss_at(-1.0);
        let far = loss_at(2.0) - loss_at(-2.0);
        loss_at(0.0);
        let quotient = (8.0 * near - far) / (12.0 * STEP);
        let gradient = &gradients[spot.offset..][..spot.len()];
        let along: f64 = gradient.iter().zip(&direction).map(|(g, d)| g * d).sum();
        let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        assert!(norm > 1e-6, "{base}: {spot:?} has no gradient");
        let difference = (along - quotient).abs() / norm;
        assert!(difference <= 1e-6, "{base}: {spot:?}: {along} and {quotient}: {difference:e}");
    }
}

#[test]
fn gradients_of_a_model_without_qk_norm() {
    check("llama3", 2, 0.0);
}

#[test]
fn gradients_of_a_model_with_qk_norm() {
    check("qwen3", 3, 0.0);
}

#[test]
fn gradients_through_dropout() {
    check("odd", 2, 0.25);
}
