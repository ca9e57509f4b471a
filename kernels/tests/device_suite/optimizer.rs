//! Gradient norm and AdamW against the textbook, step by step.

use kernels::{AdamW, AdamWState, Cpu, In, Out};
use proptest::prelude::*;

use crate::lab::{Lab, Rng, assert_bits, assert_close, cases};

/// params, m, v, weights
type State = [Vec<f64>; 4];

fn norm_of<D: Lab>(lab: &D, grads: &[f64]) -> Vec<f64> {
    let grads = lab.wide(grads);
    lab.changed_wide(&[-1.0; 2], |norm| lab.grad_norm(norm, In::all(&grads)).unwrap())
}

fn step<D: Lab>(lab: &D, state: &State, grads: &[f64], settings: AdamW) -> State {
    let norm = lab.wide(&norm_of(lab, grads));
    let grads = lab.wide(grads);
    let (mut m, mut v) = (lab.wide(&state[1]), lab.wide(&state[2]));
    let mut params = Vec::new();
    let weights = lab.changed(&state[3], |weights| {
        params = lab.changed_wide(&state[0], |params| {
            let state = AdamWState {
                params,
                grads: In::all(&grads),
                m: Out::all(&mut m),
                v: Out::all(&mut v),
                weights,
                norm: In::all(&norm),
            };
            lab.adamw(state, settings).unwrap();
        });
    });
    [params, lab.read_wide(&m), lab.read_wide(&v), weights]
}

/// Loshchilov & Hutter 2019, algorithm 2, with the gradient scaled to the norm's limit before.
fn reference(state: &State, grads: &[f64], settings: AdamW) -> State {
    let AdamW { learning_rate, beta1, beta2, eps, weight_decay, max_grad_norm, step } = settings;
    let norm = grads.iter().map(|g| g * g).sum::<f64>().sqrt();
    let clip = if max_grad_norm > 0.0 { (max_grad_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
    let mut next = state.clone();
    for (index, grad) in grads.iter().enumerate() {
        let grad = grad * clip;
        let m = beta1 * state[1][index] + (1.0 - beta1) * grad;
        let v = beta2 * state[2][index] + (1.0 - beta2) * grad * grad;
        let m_hat = m / (1.0 - beta1.powi(step as i32));
        let v_hat = v / (1.0 - beta2.powi(step as i32));
        let decayed = state[0][index] * (1.0 - learning_rate * weight_decay);
        next[0][index] = decayed - learning_rate * m_hat / (v_hat.sqrt() + eps);
        (next[1][index], next[2][index]) = (m, v);
        next[3][index] = next[0][index];
    }
    next
}

const SETTINGS: AdamW = AdamW {
    learning_rate: 1e-2,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 0.1,
    max_grad_norm: 1.0,
    step: 1,
};

fn fresh(params: Vec<f64>) -> State {
    let len = params.len();
    [params, vec![0.0; len], vec![0.0; len], vec![f64::NAN; len]]
}

pub fn matches_reference<D: Lab>(lab: &D) {
    let shapes = (1..5000usize, prop::sample::select(vec![0.0, 0.5, 1e6]), any::<u64>());
    proptest!(cases(12), |((len, max_grad_norm, seed) in shapes)| {
        let mut rng = Rng(seed);
        let mut state = fresh(rng.values(len));
        let mut expected = state.clone();
        for step_number in 1..=5 {
            let grads = rng.values(len);
            let settings = AdamW { step: step_number, max_grad_norm, ..SETTINGS };
            let norm = grads.iter().map(|g| g * g).sum::<f64>().sqrt();
            assert_close("norm", &norm_of(lab, &grads), &[norm, 1.0], D::WIDE_TOLERANCE);
            state = step(lab, &state, &grads, settings);
            expected = reference(&expected, &grads, settings);
            for (name, index) in [("params", 0), ("m", 1), ("v", 2)] {
                assert_close(name, &state[index], &expected[index], D::WIDE_TOLERANCE);
            }
            assert_close("weights", &state[3], &expected[3], D::TOLERANCE);
        }
    });
}

pub fn not_finite_gradients_change_nothing<D: Lab>(lab: &D) {
    let mut rng = Rng(30);
    let state = [rng.values(9), rng.values(9), rng.values(9), rng.values(9)];
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let mut grads = rng.values(9);
        grads[4] = bad;
        assert_eq!(norm_of(lab, &grads)[1], 0.0);
        let after = step(lab, &state, &grads, SETTINGS);
        for (after, before) in after.iter().zip(&state) {
            assert_bits("state", after, before);
        }
    }
}

/// Squares of large but finite gradients must not overflow into "not finite".
#[test]
fn large_gradients_are_finite() {
    let cpu = Cpu::<f32>::new(1).unwrap();
    assert_close("norm", &norm_of(&cpu, &[3e30, 4e30]), &[5e30, 1.0], 1e-6);
    assert_bits("none", &norm_of(&cpu, &[]), &[0.0, 1.0]);
}

#[test]
fn threads_change_no_bit() {
    let mut rng = Rng(31);
    let (state, grads) = (fresh(rng.values(300_000)), rng.values(300_000));
    let [one, two] = [1, 2].map(|threads| {
        let cpu = Cpu::<f32>::new(threads).unwrap();
        (norm_of(&cpu, &grads), step(&cpu, &state, &grads, SETTINGS))
    });
    assert_bits("norm", &one.0, &two.0);
    for (one, two) in one.1.iter().zip(&two.1) {
        assert_bits("state", one, two);
    }
}
