//! Linear layers: values, gradients, and independence of rows.

use kernels::{Cpu, In, LinearShape};
use proptest::prelude::*;

use crate::lab::{
    Lab, Rng, assert_bits, assert_close, assert_gradient, assert_rows, assert_same, cases, exact,
    inner, specification,
};

struct Case {
    shape: LinearShape,
    x: Vec<f64>,
    weight: Vec<f64>,
    bias: Option<Vec<f64>>,
    dy: Vec<f64>,
}

impl Case {
    fn new(rows: usize, input: usize, output: usize, seed: u64) -> Self {
        let mut rng = Rng(seed);
        Self {
            shape: LinearShape { rows, input, output },
            x: rng.values(rows * input),
            weight: rng.values(output * input),
            bias: seed.is_multiple_of(2).then(|| rng.values(output)),
            dy: rng.values(rows * output),
        }
    }
    /// Rows `first .. first + rows` alone.
    fn rows(&self, first: usize, rows: usize) -> Self {
        let LinearShape { input, output, .. } = self.shape;
        Self {
            shape: LinearShape { rows, input, output },
            x: self.x[first * input..][..rows * input].to_vec(),
            weight: self.weight.clone(),
            bias: self.bias.clone(),
            dy: self.dy[first * output..][..rows * output].to_vec(),
        }
    }
}

fn forward<D: Lab>(lab: &D, case: &Case) -> Vec<f64> {
    let (x, weight) = (lab.act(&case.x), lab.act(&case.weight));
    let bias = case.bias.as_ref().map(|bias| lab.act(bias));
    lab.written(case.dy.len(), |y| {
        let bias = bias.as_ref().map(In::all);
        lab.linear(y, In::all(&x), In::all(&weight), bias, case.shape).unwrap();
    })
}

fn backward<D: Lab>(lab: &D, case: &Case) -> Vec<f64> {
    let (dy, weight) = (lab.act(&case.dy), lab.act(&case.weight));
    lab.written(case.x.len(), |dx| {
        lab.linear_backward(dx, In::all(&dy), In::all(&weight), case.shape).unwrap();
    })
}

fn reference(case: &Case) -> (Vec<f64>, Vec<f64>) {
    let LinearShape { rows, input, output } = case.shape;
    let (mut y, mut dx) = (vec![0.0; rows * output], vec![0.0; rows * input]);
    for row in 0..rows {
        for o in 0..output {
            y[row * output + o] = case.bias.as_ref().map_or(0.0, |bias| bias[o]);
            for i in 0..input {
                y[row * output + o] += case.x[row * input + i] * case.weight[o * input + i];
                dx[row * input + i] += case.dy[row * output + o] * case.weight[o * input + i];
            }
        }
    }
    (y, dx)
}

pub fn matches_reference<D: Lab>(lab: &D) {
    let shapes = (0..40usize, 1..140usize, 1..140usize, any::<u64>());
    proptest!(cases(40), |((rows, input, output, seed) in shapes)| {
        let case = Case::new(rows, input, output, seed);
        let (y, dx) = reference(&case);
        assert_close("y", &forward(lab, &case), &y, D::TOLERANCE);
        assert_close("dx", &backward(lab, &case), &dx, D::TOLERANCE);
    });
    let deep = Case::new(3, 1500, 70, 1);
    assert_close("deep y", &forward(lab, &deep), &reference(&deep).0, D::TOLERANCE);
}

/// Widths around every block size of a matrix product, among them its vector and depth-1 paths.
const WIDTHS: [usize; 15] = [1, 2, 3, 7, 8, 15, 16, 17, 47, 48, 49, 64, 65, 100, 520];

pub fn rows_do_not_depend_on_each_other<D: Lab>(lab: &D) {
    for (index, input) in WIDTHS.into_iter().enumerate() {
        for output in WIDTHS {
            let case = Case::new(37, input, output, (index * 100 + output) as u64);
            let (y, dx) = (forward(lab, &case), backward(lab, &case));
            for (first, rows) in [(0, 1), (5, 1), (36, 1), (3, 16), (1, 17), (20, 15)] {
                let part = case.rows(first, rows);
                let what = format!("{input}→{output}, rows {first}+{rows}");
                assert_same(
                    lab,
                    &what,
                    &forward(lab, &part),
                    &y[first * output..][..rows * output],
                );
                assert_same(
                    lab,
                    &what,
                    &backward(lab, &part),
                    &dx[first * input..][..rows * input],
                );
            }
        }
    }
}

/// Layers of an 8B base, from one row to a prefill chunk.
pub fn model_shapes<D: Lab>(lab: &D) {
    let cpu = specification();
    for (input, output) in [(4096, 6144), (14336, 4096)] {
        for rows in [1, 7, 64, 130] {
            let case = Case::new(rows, input, output, rows as u64);
            let what = |name: &str| format!("{name} {rows}×{input}×{output}");
            let (got, expected) = (forward(lab, &case), forward(&cpu, &case));
            assert_rows(&what("y"), &got, &expected, output, D::ROW_TOLERANCE);
            let (got, expected) = (backward(lab, &case), backward(&cpu, &case));
            assert_rows(&what("dx"), &got, &expected, input, D::ROW_TOLERANCE);
        }
    }
}

/// Rows of layers of an 8B base, alone and among many.
pub fn model_rows_stand_alone<D: Lab>(lab: &D) {
    let head = Case::new(300, 4096, 128_256, 9);
    let y = forward(lab, &head);
    for (first, rows) in [(299, 1), (3, 200)] {
        let got = forward(lab, &head.rows(first, rows));
        assert_same(lab, "head", &got, &y[first * 128_256..][..rows * 128_256]);
    }
    for (input, output) in [(4096, 6144), (14336, 4096)] {
        let case = Case::new(2100, input, output, 7);
        let (y, dx) = (forward(lab, &case), backward(lab, &case));
        for (first, rows) in [(0, 1), (2099, 1), (7, 64), (100, 300), (0, 1024)] {
            let part = case.rows(first, rows);
            let what = format!("{input}→{output}, rows {first}+{rows}");
            assert_same(lab, &what, &forward(lab, &part), &y[first * output..][..rows * output]);
            assert_same(lab, &what, &backward(lab, &part), &dx[first * input..][..rows * input]);
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let case = Case::new(70, 300, 500, 3);
    let runs = [1, 2, 3].map(|threads| {
        let cpu = Cpu::<f32>::new(threads).unwrap();
        (forward(&cpu, &case), backward(&cpu, &case))
    });
    for run in &runs[1..] {
        assert_bits("y", &run.0, &runs[0].0);
        assert_bits("dx", &run.1, &runs[0].1);
    }
}

#[test]
fn gradient_is_right() {
    let case = Case::new(3, 7, 5, 2);
    let cpu = exact();
    assert_gradient("dx", &case.x, &backward(&cpu, &case), |x| {
        let moved = Case { x: x.to_vec(), ..Case::new(3, 7, 5, 2) };
        inner(&forward(&cpu, &moved), &case.dy)
    });
}
