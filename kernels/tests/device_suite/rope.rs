//! QK norm, rotary embedding and the cache write.

use kernels::{Cpu, HeadShape, In, KvOut, Out, QkNorm, Rope};
use proptest::prelude::*;

use crate::lab::{
    Lab, Rng, assert_bits, assert_close, assert_gradient, assert_rows, cases, exact, inner,
    specification,
};

const EPS: f64 = 1e-6;
const MAX_POSITIONS: usize = 50;

pub struct Case {
    heads: HeadShape,
    qkv: Vec<f64>,
    d_out: Vec<f64>,
    positions: Vec<i32>,
    norm: Option<[Vec<f64>; 2]>,
    cos: Vec<f64>,
    sin: Vec<f64>,
}

impl Case {
    fn new(rows: usize, heads: HeadShape, with_norm: bool, seed: u64) -> Self {
        let mut rng = Rng(seed);
        let half = heads.head_dim / 2;
        let angle = |index: usize| {
            (index / half) as f64 * 100f64.powf(-((index % half) as f64) / half as f64)
        };
        let angles: Vec<f64> = (0..MAX_POSITIONS * half).map(angle).collect();
        let rounded = |value: f64| f64::from(value as f32);
        Self {
            heads,
            qkv: rng.values(rows * heads.qkv_width()),
            d_out: rng.values(rows * heads.qkv_width()),
            positions: (0..rows).map(|_| rng.below(MAX_POSITIONS) as i32).collect(),
            norm: with_norm.then(|| [rng.values(heads.head_dim), rng.values(heads.head_dim)]),
            cos: angles.iter().map(|angle| rounded(angle.cos())).collect(),
            sin: angles.iter().map(|angle| rounded(angle.sin())).collect(),
        }
    }
    /// The case's tables on a device, passed to `op`.
    fn with_tables<D: Lab, R>(
        &self,
        lab: &D,
        op: impl FnOnce(Option<&QkNorm<'_, D>>, &Rope<'_, D>) -> R,
    ) -> R {
        let (cos, sin) = (lab.wide(&self.cos), lab.wide(&self.sin));
        let positions = lab.ints(&self.positions);
        let weights = self.norm.as_ref().map(|norm| norm.each_ref().map(|norm| lab.act(norm)));
        let norm = weights.as_ref().map(|[q, k]| QkNorm { q: In::all(q), k: In::all(k), eps: EPS });
        let rope = Rope { cos: In::all(&cos), sin: In::all(&sin), positions: In::all(&positions) };
        op(norm.as_ref(), &rope)
    }
}

fn forward<D: Lab>(lab: &D, case: &Case, qkv: &[f64]) -> Vec<f64> {
    case.with_tables(lab, |norm, rope| {
        lab.changed(qkv, |qkv| {
            lab.qk_norm_rope_kv_write(qkv, None, norm, rope, case.heads).unwrap();
        })
    })
}

fn backward<D: Lab>(lab: &D, case: &Case) -> Vec<f64> {
    let raw = lab.act(&case.qkv);
    case.with_tables(lab, |norm, rope| {
        let raw = norm.map(|_| In::all(&raw));
        lab.changed(&case.d_out, |d| {
            lab.qk_norm_rope_backward(d, raw, norm, rope, case.heads).unwrap();
        })
    })
}

fn reference(case: &Case) -> Vec<f64> {
    let HeadShape { q_heads, kv_heads, head_dim } = case.heads;
    let (mut out, half) = (case.qkv.clone(), head_dim / 2);
    for (row, qkv) in out.chunks_mut(case.heads.qkv_width()).enumerate() {
        for (index, head) in qkv.chunks_mut(head_dim).take(q_heads + kv_heads).enumerate() {
            if let Some(norm) = &case.norm {
                let mean = head.iter().map(|x| x * x).sum::<f64>() / head_dim as f64;
                let weight = &norm[usize::from(index >= q_heads)];
                for (x, weight) in head.iter_mut().zip(weight) {
                    *x *= weight / (mean + EPS).sqrt();
                }
            }
            let x = head.to_vec();
            for i in 0..head_dim {
                let angle = case.positions[row] as usize * half + i % half;
                let rotated = if i < half { -x[i + half] } else { x[i - half] };
                head[i] = x[i] * case.cos[angle] + rotated * case.sin[angle];
            }
        }
    }
    out
}

fn shapes() -> impl Strategy<Value = (usize, HeadShape, bool, u64)> {
    (0..12usize, 1..4usize, 1..4usize, 1..40usize, any::<bool>(), any::<u64>()).prop_map(
        |(rows, kv_heads, group, half, norm, seed)| {
            let heads = HeadShape { q_heads: kv_heads * group, kv_heads, head_dim: 2 * half };
            (rows, heads, norm, seed)
        },
    )
}

pub fn matches_reference<D: Lab>(lab: &D) {
    proptest!(cases(40), |((rows, heads, norm, seed) in shapes())| {
        let case = Case::new(rows, heads, norm, seed);
        let out = forward(lab, &case, &case.qkv);
        assert_close("qkv", &out, &reference(&case), D::TOLERANCE);
        let expected = backward(&exact(), &case);
        assert_close("d_qkv", &backward(lab, &case), &expected, D::TOLERANCE);
        // Each row alone.
        for row in 0..rows.min(2) {
            let width = heads.qkv_width();
            let alone = Case { positions: vec![case.positions[row]], norm: case.norm.clone(),
                cos: case.cos.clone(), sin: case.sin.clone(), qkv: vec![], d_out: vec![], heads };
            let alone = forward(lab, &alone, &case.qkv[row * width..][..width]);
            assert_bits("row", &alone, &out[row * width..][..width]);
        }
    });
}

pub fn cache_holds_turned_keys_and_values<D: Lab>(lab: &D) {
    let heads = HeadShape { q_heads: 3, kv_heads: 1, head_dim: 6 };
    let case = Case::new(4, heads, true, 11);
    let (width, cache_rows) = (heads.kv_width(), 8);
    let mut qkv = lab.act(&case.qkv);
    let rows = lab.ints(&[6, -1, 0, 3]);
    let mut values = Vec::new();
    let keys = lab.written_partly(cache_rows * width, |k| {
        values = lab.written_partly(cache_rows * width, |v| {
            case.with_tables(lab, |norm, rope| {
                let kv = KvOut { k, v, rows: In::all(&rows) };
                lab.qk_norm_rope_kv_write(Out::all(&mut qkv), Some(kv), norm, rope, heads).unwrap();
            });
        });
    });
    let turned = lab.read(&qkv);
    assert_bits("same rows as without a cache", &turned, &forward(lab, &case, &case.qkv));
    for (cache_row, source) in
        [Some(2), None, None, Some(3), None, None, Some(0), None].into_iter().enumerate()
    {
        let nothing = vec![f64::NAN; 2 * width];
        let expected = source.map_or(&nothing[..], |row: usize| {
            &turned[row * heads.qkv_width() + heads.q_width()..][..2 * width]
        });
        assert_bits("keys", &keys[cache_row * width..][..width], &expected[..width]);
        assert_bits("values", &values[cache_row * width..][..width], &expected[width..]);
    }
}

/// Head shapes of real models.
pub fn model_shapes<D: Lab>(lab: &D) {
    let cpu = specification();
    for (head_dim, with_norm) in [(64, false), (128, false), (128, true)] {
        let heads = HeadShape { q_heads: 32, kv_heads: 8, head_dim };
        let case = Case::new(33, heads, with_norm, 14);
        let (got, expected) = (forward(lab, &case, &case.qkv), forward(&cpu, &case, &case.qkv));
        assert_rows("qkv", &got, &expected, head_dim, D::ROW_TOLERANCE);
        let (got, expected) = (backward(lab, &case), backward(&cpu, &case));
        assert_rows("d_qkv", &got, &expected, head_dim, D::ROW_TOLERANCE);
    }
}

#[test]
fn gradient_is_right() {
    for with_norm in [false, true] {
        let heads = HeadShape { q_heads: 2, kv_heads: 1, head_dim: 6 };
        let case = Case::new(2, heads, with_norm, 12);
        let cpu = exact();
        assert_gradient("d_qkv", &case.qkv, &backward(&cpu, &case), |qkv| {
            inner(&forward(&cpu, &case, qkv), &case.d_out)
        });
    }
}

#[test]
fn threads_change_no_bit() {
    let heads = HeadShape { q_heads: 4, kv_heads: 2, head_dim: 32 };
    let case = Case::new(400, heads, true, 13);
    let [one, two] = [1, 2].map(|threads| {
        let cpu = Cpu::<f32>::new(threads).unwrap();
        (forward(&cpu, &case, &case.qkv), backward(&cpu, &case))
    });
    assert_bits("qkv", &one.0, &two.0);
    assert_bits("d_qkv", &one.1, &two.1);
}
