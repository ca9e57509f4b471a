//! Output head and cross-entropy.

use kernels::{Cpu, In, LossArgs, Out};
use proptest::prelude::*;

use crate::lab::{
    Lab, Rng, assert_bits, assert_close, assert_gradient, assert_rows, assert_same, cases, exact,
    inner, specification,
};

struct Case {
    hidden: usize,
    vocab: usize,
    x: Vec<f64>,
    lm_head: Vec<f64>,
    labels: Vec<i32>,
    scale: Vec<f64>,
}

impl Case {
    fn new(rows: usize, hidden: usize, vocab: usize, seed: u64) -> Self {
        let mut rng = Rng(seed);
        Self {
            hidden,
            vocab,
            x: rng.values(rows * hidden),
            lm_head: rng.values(vocab * hidden),
            labels: (0..rows).map(|_| rng.below(vocab) as i32).collect(),
            scale: rng.values(rows),
        }
    }
}

struct Outcome {
    loss: Vec<f64>,
    correct: Vec<i32>,
    d_hidden: Vec<f64>,
    /// How far the label's logit is from the largest of the others, relative to the largest.
    margins: Vec<f64>,
}

/// Equal wherever rounded logits cannot tie with the label's.
fn assert_correct<D: Lab>(got: &[i32], expected: &Outcome) {
    assert_eq!(got.len(), expected.correct.len());
    for (row, margin) in expected.margins.iter().enumerate() {
        if *margin > 4.0 * D::TOLERANCE {
            assert_eq!(got[row], expected.correct[row], "row {row}, margin {margin:e}");
        }
    }
}

/// With logits for `chunk` rows at a time.
fn run<D: Lab>(lab: &D, case: &Case, x: &[f64], chunk: usize) -> Outcome {
    let (x, lm_head) = (lab.act(x), lab.act(&case.lm_head));
    let (labels, scale) = (lab.ints(&case.labels), lab.wide(&case.scale));
    let rows = case.labels.len();
    let mut correct = lab.ints(&vec![-9; rows]);
    let (mut loss, mut evaluated) = (Vec::new(), Vec::new());
    let mut call = |d_hidden: Option<Out<'_, D::Act>>| {
        lab.written_partly(chunk * case.vocab, |logits| {
            loss = lab.written_wide(rows, |loss| {
                let args = LossArgs {
                    loss,
                    correct: Out::all(&mut correct),
                    d_hidden,
                    hidden: In::all(&x),
                    lm_head: In::all(&lm_head),
                    labels: In::all(&labels),
                    scale: In::all(&scale),
                    logits,
                };
                lab.lm_head_loss(args, case.hidden, case.vocab).unwrap();
            });
        });
        loss.clone()
    };
    evaluated.extend(call(None));
    let mut trained = Vec::new();
    let d_hidden = lab.written(rows * case.hidden, |d_hidden| trained = call(Some(d_hidden)));
    assert_bits("evaluation and training losses", &evaluated, &trained);
    Outcome { loss: trained, correct: lab.read_ints(&correct), d_hidden, margins: Vec::new() }
}

fn reference(case: &Case) -> Outcome {
    let (mut loss, mut correct, mut d_hidden) = (Vec::new(), Vec::new(), Vec::new());
    let mut margins = Vec::new();
    for (row, x) in case.x.chunks(case.hidden).enumerate() {
        let logits: Vec<f64> = case.lm_head.chunks(case.hidden).map(|w| inner(x, w)).collect();
        let label = case.labels[row] as usize;
        let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
        loss.push(total.ln() - logits[label]);
        correct.push(i32::from(logits.iter().all(|logit| *logit <= logits[label])));
        let others = logits.iter().enumerate().filter(|(id, _)| *id != label);
        let rival = others.fold(f64::NEG_INFINITY, |rival, (_, logit)| rival.max(*logit));
        let largest = logits.iter().fold(1.0f64, |largest, logit| largest.max(logit.abs()));
        margins.push((logits[label] - rival).abs() / largest);
        for i in 0..case.hidden {
            let expected: f64 = logits
                .iter()
                .zip(case.lm_head.chunks(case.hidden))
                .map(|(logit, w)| logit.exp() / total * w[i])
                .sum();
            let own = case.lm_head[label * case.hidden + i];
            d_hidden.push(case.scale[row] * (expected - own));
        }
    }
    Outcome { loss, correct, d_hidden, margins }
}

pub fn matches_reference<D: Lab>(lab: &D) {
    let shapes = (0..40usize, 1..30usize, 1..90usize, 1..50usize, any::<u64>());
    proptest!(cases(30), |((rows, hidden, vocab, chunk, seed) in shapes)| {
        let case = Case::new(rows, hidden, vocab, seed);
        let (got, expected) = (run(lab, &case, &case.x, chunk), reference(&case));
        assert_close("loss", &got.loss, &expected.loss, D::TOLERANCE);
        assert_close("d_hidden", &got.d_hidden, &expected.d_hidden, D::TOLERANCE);
        assert_correct::<D>(&got.correct, &expected);
    });
}

pub fn chunks_change_no_bit<D: Lab>(lab: &D) {
    let case = Case::new(35, 24, 70, 40);
    let whole = run(lab, &case, &case.x, 35);
    for chunk in [1, 7, 16, 100] {
        let part = run(lab, &case, &case.x, chunk);
        assert_same(lab, "loss", &part.loss, &whole.loss);
        assert_same(lab, "d_hidden", &part.d_hidden, &whole.d_hidden);
        assert_correct::<D>(&part.correct, &reference(&case));
    }
}

/// The vocabulary of an 8B base.
pub fn model_shapes<D: Lab>(lab: &D) {
    let mut case = Case::new(37, 512, 128_256, 44);
    case.lm_head.iter_mut().for_each(|w| *w /= 8.0);
    let expected = run(&specification(), &case, &case.x, 37);
    for chunk in [16, 37] {
        let got = run(lab, &case, &case.x, chunk);
        assert_close("loss", &got.loss, &expected.loss, D::TOLERANCE);
        assert_rows("d_hidden", &got.d_hidden, &expected.d_hidden, 512, D::ROW_TOLERANCE);
    }
}

/// Logits far apart neither overflow nor lose a certain row's zero loss.
pub fn far_logits_are_finite<D: Lab>(lab: &D) {
    let mut case = Case::new(2, 1, 2, 41);
    (case.x, case.lm_head, case.labels) = (vec![1.0, 1.0], vec![-4e3, 4e3], vec![1, 0]);
    let got = run(lab, &case, &case.x, 2);
    assert_close("loss", &got.loss, &[0.0, 8e3], D::TOLERANCE);
    assert_eq!(got.correct, [1, 0]);
}

#[test]
fn gradient_is_right() {
    let case = Case::new(3, 5, 11, 42);
    let cpu = exact();
    let got = run(&cpu, &case, &case.x, 2);
    assert_gradient("d_hidden", &case.x, &got.d_hidden, |x| {
        inner(&run(&cpu, &case, x, 2).loss, &case.scale)
    });
}

#[test]
fn threads_change_no_bit() {
    let case = Case::new(40, 64, 300, 43);
    let [one, two] = [1, 2].map(|threads| {
        let cpu = Cpu::<f32>::new(threads).unwrap();
        run(&cpu, &case, &case.x, 20)
    });
    assert_bits("loss", &one.loss, &two.loss);
    assert_bits("d_hidden", &one.d_hidden, &two.d_hidden);
}
