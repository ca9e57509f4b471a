//! RMSNorm and the residual sum.

use kernels::{Cpu, Device, In, Out};
use proptest::prelude::*;

use crate::lab::{
    Lab, Rng, assert_bits, assert_close, assert_gradient, assert_rows, cases, exact, inner,
    specification,
};

const EPS: f64 = 1e-5;

struct Case {
    x: Vec<f64>,
    delta: Vec<f64>,
    weight: Vec<f64>,
    dy: Vec<f64>,
}

impl Case {
    fn new(rows: usize, width: usize, seed: u64) -> Self {
        let mut rng = Rng(seed);
        Self {
            x: rng.values(rows * width),
            delta: rng.values(rows * width),
            weight: rng.values(width),
            dy: rng.values(rows * width),
        }
    }
}

fn forward<D: Lab>(lab: &D, x: &[f64], weight: &[f64]) -> Vec<f64> {
    let (len, x, weight) = (x.len(), lab.act(x), lab.act(weight));
    lab.written(len, |y| {
        lab.rms_norm(y, In::all(&x), In::all(&weight), EPS).unwrap();
    })
}

/// (y, x after the sum)
fn add_forward<D: Lab>(lab: &D, case: &Case) -> (Vec<f64>, Vec<f64>) {
    let (delta, weight) = (lab.act(&case.delta), lab.act(&case.weight));
    let mut x = lab.act(&case.x);
    let y = lab.written(case.x.len(), |y| {
        let (delta, weight) = (In::all(&delta), In::all(&weight));
        lab.add_rms_norm(y, Out::all(&mut x), delta, weight, EPS).unwrap();
    });
    (y, lab.read(&x))
}

/// The gradient added to `before`.
fn backward<D: Lab>(lab: &D, case: &Case, before: &[f64]) -> Vec<f64> {
    let (x, dy, weight) = (lab.act(&case.x), lab.act(&case.dy), lab.act(&case.weight));
    lab.changed(before, |dx| {
        lab.rms_norm_backward(dx, In::all(&dy), In::all(&x), In::all(&weight), EPS).unwrap();
    })
}

fn reference(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let norm = |row: &[f64]| {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
        let root = (mean + EPS).sqrt();
        row.iter().zip(weight).map(|(x, weight)| x / root * weight).collect::<Vec<_>>()
    };
    x.chunks(weight.len()).flat_map(norm).collect()
}

pub fn matches_reference<D: Lab>(lab: &D) {
    let shapes = (0..20usize, 1..300usize, any::<u64>());
    proptest!(cases(40), |((rows, width, seed) in shapes)| {
        let case = Case::new(rows, width, seed);
        let y = reference(&case.x, &case.weight);
        assert_close("y", &forward(lab, &case.x, &case.weight), &y, D::TOLERANCE);
        let sum: Vec<f64> = case.x.iter().zip(&case.delta).map(|(x, delta)| x + delta).collect();
        let (y, x) = add_forward(lab, &case);
        assert_close("x + delta", &x, &sum, D::TOLERANCE);
        assert_close("y of sum", &y, &reference(&sum, &case.weight), D::TOLERANCE);
        let (delta, sum) = (lab.act(&case.delta), sum);
        let added = lab.changed(&case.x, |x| lab.add(x, In::all(&delta)).unwrap());
        assert_close("sum", &added, &sum, D::TOLERANCE);
        let dx = backward(&exact(), &case, &case.delta);
        assert_close("dx", &backward(lab, &case, &case.delta), &dx, D::TOLERANCE);
    });
}

pub fn rows_do_not_depend_on_each_other<D: Lab>(lab: &D) {
    let (rows, width) = (9, 77);
    let case = Case::new(rows, width, 4);
    let y = forward(lab, &case.x, &case.weight);
    for (index, row) in case.x.chunks(width).enumerate() {
        assert_bits("row", &forward(lab, row, &case.weight), &y[index * width..][..width]);
    }
}

/// Widths of real models.
pub fn model_shapes<D: Lab>(lab: &D) {
    let cpu = specification();
    for width in [2048, 3584, 4096, 14_336] {
        let case = Case::new(70, width, width as u64);
        let (got, expected) = (add_forward(lab, &case), add_forward(&cpu, &case));
        assert_rows("x", &got.1, &expected.1, width, D::ROW_TOLERANCE);
        assert_rows("y of sum", &got.0, &expected.0, width, D::ROW_TOLERANCE);
        let x = &case.x;
        let (got, expected) = (forward(lab, x, &case.weight), forward(&cpu, x, &case.weight));
        assert_rows("y", &got, &expected, width, D::ROW_TOLERANCE);
        let (got, expected) = (backward(lab, &case, x), backward(&cpu, &case, x));
        assert_rows("dx", &got, &expected, width, D::ROW_TOLERANCE);
    }
}

#[test]
fn threads_change_no_bit() {
    let case = Case::new(700, 256, 5);
    let [one, two] = [1, 2].map(|threads| {
        let cpu = Cpu::<f32>::new(threads).unwrap();
        (add_forward(&cpu, &case), backward(&cpu, &case, &case.delta))
    });
    assert_bits("y", &one.0.0, &two.0.0);
    assert_bits("x", &one.0.1, &two.0.1);
    assert_bits("dx", &one.1, &two.1);
}

#[test]
fn gradient_is_right() {
    let case = Case::new(3, 19, 6);
    let cpu = exact();
    let dx = backward(&cpu, &case, &vec![0.0; case.x.len()]);
    assert_gradient("dx", &case.x, &dx, |x| inner(&forward(&cpu, x, &case.weight), &case.dy));
}

#[test]
fn not_finite_values_stay_in_their_row() {
    let cpu = Cpu::<f32>::new(1).unwrap();
    let mut case = Case::new(3, 8, 7);
    let weight = cpu.act(&case.weight);
    let clean = forward(&cpu, &case.x, &case.weight);
    case.x[9] = f64::NAN;
    let x = cpu.act(&case.x);
    let y = cpu.written_partly(24, |y| {
        cpu.rms_norm(y, In::all(&x), In::all(&weight), EPS).unwrap();
    });
    assert!(y[8..16].iter().all(|y| y.is_nan()));
    assert_bits("first row", &y[..8], &clean[..8]);
    assert_bits("last row", &y[16..], &clean[16..]);
}
