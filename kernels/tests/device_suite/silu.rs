//! SwiGLU.

use kernels::In;
use proptest::prelude::*;

use crate::lab::{
    Lab, Rng, assert_bits, assert_close, assert_gradient, assert_rows, cases, exact, inner,
    specification,
};

fn forward<D: Lab>(lab: &D, gate_up: &[f64], ffn: usize) -> Vec<f64> {
    let input = lab.act(gate_up);
    lab.written(gate_up.len() / 2, |y| lab.silu_mul(y, In::all(&input), ffn).unwrap())
}

fn backward<D: Lab>(lab: &D, gate_up: &[f64], dy: &[f64], ffn: usize) -> Vec<f64> {
    let (input, dy) = (lab.act(gate_up), lab.act(dy));
    lab.written(gate_up.len(), |d| {
        lab.silu_mul_backward(d, In::all(&dy), In::all(&input), ffn).unwrap();
    })
}

fn reference(gate_up: &[f64], ffn: usize) -> Vec<f64> {
    let row = |row: &[f64]| {
        let y = |i: usize| row[i] / (1.0 + (-row[i]).exp()) * row[ffn + i];
        (0..ffn).map(y).collect::<Vec<_>>()
    };
    gate_up.chunks(2 * ffn).flat_map(row).collect()
}

pub fn matches_reference<D: Lab>(lab: &D) {
    let shapes = (0..20usize, 1..200usize, any::<u64>());
    proptest!(cases(30), |((rows, ffn, seed) in shapes)| {
        let mut rng = Rng(seed);
        let gate_up: Vec<f64> = rng.values(2 * rows * ffn).iter().map(|x| x * 8.0).collect();
        let dy = rng.values(rows * ffn);
        let y = forward(lab, &gate_up, ffn);
        assert_close("y", &y, &reference(&gate_up, ffn), D::TOLERANCE);
        let expected = backward(&exact(), &gate_up, &dy, ffn);
        assert_close("d", &backward(lab, &gate_up, &dy, ffn), &expected, D::TOLERANCE);
        if rows > 1 {
            let alone = forward(lab, &gate_up[2 * ffn..4 * ffn], ffn);
            assert_bits("row", &alone, &y[ffn..2 * ffn]);
        }
    });
}

pub fn far_gates_do_not_overflow<D: Lab>(lab: &D) {
    let gate_up = [-1e4, 1e4, -300.0, 2.0, 3.0, 1.0];
    assert_close("y", &forward(lab, &gate_up, 3), &[0.0, 3e4, 0.0], D::TOLERANCE);
    let d = backward(lab, &gate_up, &[1.0; 3], 3);
    assert_close("d", &d, &[0.0, 3.0, 0.0, 0.0, 1e4, 0.0], D::TOLERANCE);
}

/// The width of an 8B base.
pub fn model_shapes<D: Lab>(lab: &D) {
    let (mut rng, ffn, cpu) = (Rng(9), 14_336, specification());
    let gate_up: Vec<f64> = rng.values(2 * 33 * ffn).iter().map(|x| x * 4.0).collect();
    let dy = rng.values(33 * ffn);
    let (got, expected) = (forward(lab, &gate_up, ffn), forward(&cpu, &gate_up, ffn));
    assert_rows("y", &got, &expected, ffn, D::ROW_TOLERANCE);
    let (got, expected) = (backward(lab, &gate_up, &dy, ffn), backward(&cpu, &gate_up, &dy, ffn));
    assert_rows("d", &got, &expected, ffn, D::ROW_TOLERANCE);
}

#[test]
fn gradient_is_right() {
    let mut rng = Rng(8);
    let (gate_up, dy) = (rng.values(30), rng.values(15));
    let cpu = exact();
    let gradient = backward(&cpu, &gate_up, &dy, 5);
    assert_gradient("d_gate_up", &gate_up, &gradient, |x| inner(&forward(&cpu, x, 5), &dy));
}
