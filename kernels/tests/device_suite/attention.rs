//! Attention: training, paged prefill in any chunks, decode; values, gradients, equal bits.

use kernels::{Cpu, HeadShape, In, PagedKv};
use proptest::prelude::*;

use crate::lab::{
    Lab, Rng, assert_bits, assert_close, assert_gradient, assert_rows, assert_same, cases, exact,
    inner, specification,
};

struct Case {
    heads: HeadShape,
    /// Where each row's example starts.
    examples: Vec<i32>,
    qkv: Vec<f64>,
    d_o: Vec<f64>,
}

impl Case {
    fn new(lengths: &[usize], heads: HeadShape, seed: u64) -> Self {
        let mut rng = Rng(seed);
        let mut examples = Vec::new();
        for length in lengths {
            examples.extend(vec![examples.len() as i32; *length]);
        }
        let rows = examples.len();
        Self {
            heads,
            examples,
            qkv: rng.values(rows * heads.qkv_width()).iter().map(|x| x * 2.0).collect(),
            d_o: rng.values(rows * heads.q_width()),
        }
    }
    fn rows(&self) -> usize {
        self.examples.len()
    }
    /// One example alone, from arena row `start`.
    fn example(&self, start: usize, length: usize) -> Self {
        let (qkv, q) = (self.heads.qkv_width(), self.heads.q_width());
        Self {
            heads: self.heads,
            examples: vec![0; length],
            qkv: self.qkv[start * qkv..][..length * qkv].to_vec(),
            d_o: self.d_o[start * q..][..length * q].to_vec(),
        }
    }
}

/// o and lse of rows `first .. first + rows`; later arena rows hold poison.
fn forward_rows<D: Lab>(lab: &D, case: &Case, first: usize, rows: usize) -> (Vec<f64>, Vec<f64>) {
    let mut qkv = case.qkv.clone();
    qkv[(first + rows) * case.heads.qkv_width()..].fill(f64::NAN);
    let (qkv, examples) = (lab.act(&qkv), lab.ints(&case.examples));
    let mut lse = Vec::new();
    let o = lab.written(rows * case.heads.q_width(), |o| {
        lse = lab.written_wide(rows * case.heads.q_heads, |lse| {
            let (qkv, examples) = (In::all(&qkv), In::all(&examples));
            lab.attention_train(o, lse, qkv, examples, first, case.heads).unwrap();
        });
    });
    (o, lse)
}

fn forward<D: Lab>(lab: &D, case: &Case) -> (Vec<f64>, Vec<f64>) {
    forward_rows(lab, case, 0, case.rows())
}

fn backward<D: Lab>(lab: &D, case: &Case) -> Vec<f64> {
    backward_from(lab, case, &forward(lab, case))
}

/// From outputs of forward as some device has rounded them.
fn backward_from<D: Lab>(lab: &D, case: &Case, (o, lse): &(Vec<f64>, Vec<f64>)) -> Vec<f64> {
    let (qkv, d_o, o, lse) = (lab.act(&case.qkv), lab.act(&case.d_o), lab.act(o), lab.wide(lse));
    let examples = lab.ints(&case.examples);
    lab.written(case.qkv.len(), |d_qkv| {
        lab.attention_train_backward(
            d_qkv,
            In::all(&d_o),
            In::all(&qkv),
            In::all(&o),
            In::all(&lse),
            In::all(&examples),
            case.heads,
        )
        .unwrap();
    })
}

fn reference(case: &Case) -> (Vec<f64>, Vec<f64>) {
    let HeadShape { q_heads, kv_heads, head_dim } = case.heads;
    let head = |row: usize, index: usize| {
        &case.qkv[row * case.heads.qkv_width() + index * head_dim..][..head_dim]
    };
    let (mut o, mut lse) = (Vec::new(), Vec::new());
    for (row, start) in case.examples.iter().enumerate() {
        for q_head in 0..q_heads {
            let kv_head = q_head * kv_heads / q_heads;
            let sources: Vec<usize> = (*start as usize..=row).collect();
            let exponent = |source: &usize| {
                let score = inner(head(row, q_head), head(*source, q_heads + kv_head));
                (score / (head_dim as f64).sqrt()).exp()
            };
            let exponents: Vec<f64> = sources.iter().map(exponent).collect();
            let total: f64 = exponents.iter().sum();
            lse.push(total.ln());
            for i in 0..head_dim {
                let values = sources.iter().zip(&exponents).map(|(source, exponent)| {
                    exponent * head(*source, q_heads + kv_heads + kv_head)[i]
                });
                o.push(values.sum::<f64>() / total);
            }
        }
    }
    (o, lse)
}

fn heads() -> impl Strategy<Value = HeadShape> {
    (1..4usize, 1..4usize, 1..30usize).prop_map(|(kv_heads, group, half)| HeadShape {
        q_heads: kv_heads * group,
        kv_heads,
        head_dim: 2 * half,
    })
}

pub fn matches_reference<D: Lab>(lab: &D) {
    let shapes = (prop::collection::vec(1..24usize, 0..4), heads(), any::<u64>());
    proptest!(cases(30), |((lengths, heads, seed) in shapes)| {
        let case = Case::new(&lengths, heads, seed);
        let (o, lse) = reference(&case);
        let got = forward(lab, &case);
        assert_close("o", &got.0, &o, D::TOLERANCE);
        assert_close("lse", &got.1, &lse, D::WIDE_TOLERANCE);
        let expected = backward_from(&exact(), &case, &got);
        assert_close("d_qkv", &backward_from(lab, &case, &got), &expected, D::TOLERANCE);
    });
}

/// Every packing and chunking of an example gives its bits, forward and backward.
pub fn packing_and_chunks_change_no_bit<D: Lab>(lab: &D) {
    let heads = HeadShape { q_heads: 3, kv_heads: 1, head_dim: 10 };
    let case = Case::new(&[5, 17, 1, 9], heads, 20);
    let (o, lse) = forward(lab, &case);
    let d_qkv = backward(lab, &case);
    for (start, length) in [(0, 5), (5, 17), (22, 1), (23, 9)] {
        let alone = case.example(start, length);
        let (alone_o, alone_lse) = forward(lab, &alone);
        assert_same(lab, "o", &alone_o, &o[start * heads.q_width()..][..alone_o.len()]);
        assert_same(lab, "lse", &alone_lse, &lse[start * heads.q_heads..][..alone_lse.len()]);
        let alone_d = backward(lab, &alone);
        assert_same(lab, "d_qkv", &alone_d, &d_qkv[start * heads.qkv_width()..][..alone_d.len()]);
    }
    for (first, rows) in [(0, 1), (3, 8), (11, 11), (22, 10), (31, 1), (4, 0)] {
        let (chunk_o, chunk_lse) = forward_rows(lab, &case, first, rows);
        assert_same(lab, "o", &chunk_o, &o[first * heads.q_width()..][..chunk_o.len()]);
        assert_same(lab, "lse", &chunk_lse, &lse[first * heads.q_heads..][..chunk_lse.len()]);
    }
}

/// Rows of a block, and blocks.
const SMALL_BLOCKS: (usize, usize) = (4, 40);

/// One row of the sequence table beside its block numbers.
struct Sequence {
    row: usize,
    rows: usize,
    position: usize,
    blocks: Vec<i32>,
}

/// Paged attention over a cache that holds the first `position + rows` rows of each sequence's
/// example, everything else poison.
fn paged<D: Lab>(
    lab: &D,
    heads: HeadShape,
    (qkv, rows): (&[f64], usize),
    sequences: &[(Sequence, &Case)],
    (block_size, blocks): (usize, usize),
) -> Vec<f64> {
    let width = heads.kv_width();
    let mut keys = vec![f64::NAN; blocks * block_size * width];
    let mut values = keys.clone();
    let (mut table, mut list) = (Vec::new(), Vec::new());
    for (sequence, example) in sequences {
        for row in 0..sequence.position + sequence.rows {
            let block = sequence.blocks[row / block_size] as usize;
            let place = (block * block_size + row % block_size) * width;
            let (k, v) = example.qkv[row * heads.qkv_width() + heads.q_width()..][..2 * width]
                .split_at(width);
            keys[place..place + width].copy_from_slice(k);
            values[place..place + width].copy_from_slice(v);
        }
        table
            .extend([sequence.row, sequence.rows, sequence.position, list.len()].map(|x| x as i32));
        list.extend(&sequence.blocks);
    }
    let (keys, values, qkv) = (lab.act(&keys), lab.act(&values), lab.act(qkv));
    let (table, list) = (lab.ints(&table), lab.ints(&list));
    lab.written_partly(rows * heads.q_width(), |o| {
        let kv = PagedKv {
            k: In::all(&keys),
            v: In::all(&values),
            sequences: In::all(&table),
            blocks: In::all(&list),
            block_size,
        };
        lab.attention_paged(o, In::all(&qkv), &kv, heads).unwrap();
    })
}

/// Two sequences in one batch, in chunks down to single rows, give the bits of training attention
/// over the whole examples; rows of no sequence stay untouched.
pub fn paged_equals_training<D: Lab>(lab: &D) {
    let heads = HeadShape { q_heads: 6, kv_heads: 2, head_dim: 34 };
    let (width, q) = (heads.qkv_width(), heads.q_width());
    let (a, b) = (Case::new(&[19], heads, 21), Case::new(&[11], heads, 22));
    let ((whole_a, _), (whole_b, _)) = (forward(lab, &a), forward(lab, &b));
    let chunks = [(0, 19, 0, 11), (0, 1, 10, 1), (7, 9, 3, 4), (18, 1, 10, 1), (4, 4, 0, 1)];
    for (position_a, rows_a, position_b, rows_b) in chunks {
        // Batch: one row of nobody, b, one row of nobody, a.
        let row_a = rows_b + 2;
        let rows = row_a + rows_a;
        let mut qkv = vec![f64::NAN; rows * width];
        qkv[width..][..rows_b * width]
            .copy_from_slice(&b.qkv[position_b * width..][..rows_b * width]);
        qkv[row_a * width..].copy_from_slice(&a.qkv[position_a * width..][..rows_a * width]);
        let blocks_a = vec![9, 2, 31, 0, 17];
        let blocks_b = vec![8, 39, 3];
        let sequence = |row, rows, position, blocks| Sequence { row, rows, position, blocks };
        let o = paged(
            lab,
            heads,
            (&qkv, rows),
            &[
                (sequence(1, rows_b, position_b, blocks_b), &b),
                (sequence(row_a, rows_a, position_a, blocks_a), &a),
            ],
            SMALL_BLOCKS,
        );
        assert_same(lab, "a", &o[row_a * q..], &whole_a[position_a * q..][..rows_a * q]);
        assert_same(lab, "b", &o[q..][..rows_b * q], &whole_b[position_b * q..][..rows_b * q]);
        assert!(o[..q].iter().chain(&o[(row_a - 1) * q..row_a * q]).all(|o| o.is_nan()));
    }
    let untouched = paged(lab, heads, (&vec![0.5; 2 * width], 2), &[], SMALL_BLOCKS);
    assert!(untouched.iter().all(|o| o.is_nan()), "an empty table touches nothing");
}

/// Head shapes of real models, examples longer than tiles, decode over long caches.
pub fn model_shapes<D: Lab>(lab: &D) {
    let cpu = specification();
    for (q_heads, kv_heads, head_dim) in [(32, 8, 128), (32, 8, 64), (28, 4, 128), (4, 4, 128)] {
        let heads = HeadShape { q_heads, kv_heads, head_dim };
        let case = Case::new(&[1, 300, 64, 129, 2], heads, 26);
        let what = |name: &str| format!("{name} {q_heads}/{kv_heads}/{head_dim}");
        let (expected, got) = (forward(&cpu, &case), forward(lab, &case));
        assert_rows(&what("o"), &got.0, &expected.0, head_dim, D::ROW_TOLERANCE);
        assert_close(&what("lse"), &got.1, &expected.1, D::WIDE_TOLERANCE);
        let chunk = forward_rows(lab, &case, 130, 201);
        let part = &expected.0[130 * heads.q_width()..][..201 * heads.q_width()];
        assert_rows(&what("o of a chunk"), &chunk.0, part, head_dim, D::ROW_TOLERANCE);
        let expected = backward_from(&cpu, &case, &got);
        let got = backward_from(lab, &case, &got);
        // The first key of an example gathers from all its rows, a lone row passes nothing to its
        // query and key: heads are compared where there is a gradient.
        assert_heads(&what("d_qkv"), &got, &expected, head_dim, D::ROW_TOLERANCE);
        decode_and_prefill(lab, &cpu, heads);
    }
}

/// As [`assert_rows`], but heads whose gradient is nothing but rounding count with the others'
/// typical size.
fn assert_heads(what: &str, got: &[f64], expected: &[f64], width: usize, tolerance: f64) {
    let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
    let usual = norm(expected) / (expected.len() as f64 / width as f64).sqrt();
    let far = |(got, expected): (&[f64], &[f64])| {
        let off: Vec<f64> = got.iter().zip(expected).map(|(got, e)| got - e).collect();
        norm(&off) / norm(expected).max(0.1 * usual)
    };
    let mut worst = (0.0, 0);
    for (head, error) in got.chunks(width).zip(expected.chunks(width)).map(far).enumerate() {
        // NaN must not pass.
        worst = if error <= worst.0 { worst } else { (error, head) };
    }
    println!("{what}: largest error {:.2e} in part {}", worst.0, worst.1);
    assert!(worst.0 <= tolerance, "{what}: error {:e} in part {}", worst.0, worst.1);
}

/// Ninety sequences of one row each, over up to 700 keys, and two in chunks.
fn decode_and_prefill<D: Lab>(lab: &D, cpu: &Cpu<f32>, heads: HeadShape) {
    let lengths: Vec<usize> = (0..90).map(|index| 1 + index * 37 % 700).collect();
    let examples: Vec<Case> =
        lengths.iter().map(|length| Case::new(&[*length], heads, *length as u64)).collect();
    for chunked in [false, true] {
        let (mut sequences, mut block, mut qkv) = (Vec::new(), 0, Vec::new());
        let mut row = 0;
        for (index, (example, length)) in examples.iter().zip(&lengths).enumerate() {
            let rows = if chunked && index % 40 == 3 { (*length).min(101) } else { 1 };
            let blocks = length.div_ceil(WIDE_BLOCK);
            let blocks: Vec<i32> = (0..blocks as i32).map(|b| block + b).rev().collect();
            block += blocks.len() as i32;
            let position = length - rows;
            qkv.extend_from_slice(&example.qkv[position * heads.qkv_width()..]);
            sequences.push((Sequence { row, rows, position, blocks }, example));
            row += rows;
        }
        let size = (WIDE_BLOCK, block as usize);
        let got = paged(lab, heads, (&qkv, row), &sequences, size);
        let expected = paged(cpu, heads, (&qkv, row), &sequences, size);
        let what = if chunked { "o of chunks" } else { "o of decode" };
        assert_rows(what, &got, &expected, heads.head_dim, D::ROW_TOLERANCE);
    }
}

const WIDE_BLOCK: usize = 16;

/// Rows of one sequence at once, in chunks, and one by one beside another's.
pub fn model_rows_stand_alone<D: Lab>(lab: &D) {
    for (q_heads, kv_heads, head_dim) in [(32, 8, 128), (32, 8, 64)] {
        let heads = HeadShape { q_heads, kv_heads, head_dim };
        let (width, q) = (heads.qkv_width(), heads.q_width());
        let (a, b) = (Case::new(&[700], heads, 27), Case::new(&[60], heads, 28));
        let (whole, other) = (forward(lab, &a).0, forward(lab, &b).0);
        let blocks = |first: i32, rows: usize| -> Vec<i32> {
            (first..first + rows.div_ceil(WIDE_BLOCK) as i32).rev().collect()
        };
        for (position, rows) in [(0, 700), (699, 1), (511, 1), (0, 64), (100, 300), (650, 50)] {
            let mut qkv = b.qkv[59 * width..].to_vec();
            qkv.extend_from_slice(&a.qkv[position * width..][..rows * width]);
            let beside = Sequence { row: 0, rows: 1, position: 59, blocks: blocks(0, 60) };
            let sequence = Sequence { row: 1, rows, position, blocks: blocks(4, 700) };
            let pair = [(beside, &b), (sequence, &a)];
            let o = paged(lab, heads, (&qkv, rows + 1), &pair, (WIDE_BLOCK, 50));
            let what = format!("rows {position}+{rows} of {q_heads}/{kv_heads}/{head_dim}");
            assert_same(lab, &what, &o[q..], &whole[position * q..][..rows * q]);
            assert_same(lab, "its neighbour", &o[..q], &other[59 * q..]);
        }
    }
}

#[test]
fn gradient_is_right() {
    let heads = HeadShape { q_heads: 3, kv_heads: 1, head_dim: 4 };
    let case = Case::new(&[4, 2], heads, 23);
    let cpu = exact();
    assert_gradient("d_qkv", &case.qkv, &backward(&cpu, &case), |qkv| {
        let moved = Case { heads, examples: case.examples.clone(), qkv: qkv.to_vec(), d_o: vec![] };
        inner(&forward(&cpu, &moved).0, &case.d_o)
    });
    let grouped = HeadShape { q_heads: 4, kv_heads: 2, head_dim: 2 };
    let case = Case::new(&[3], grouped, 24);
    assert_gradient("d_qkv of groups", &case.qkv, &backward(&cpu, &case), |qkv| {
        let moved = Case {
            heads: grouped,
            examples: case.examples.clone(),
            qkv: qkv.to_vec(),
            d_o: vec![],
        };
        inner(&forward(&cpu, &moved).0, &case.d_o)
    });
}

#[test]
fn threads_change_no_bit() {
    let heads = HeadShape { q_heads: 4, kv_heads: 2, head_dim: 32 };
    let case = Case::new(&[90, 60], heads, 25);
    let [one, two] = [1, 2].map(|threads| {
        let cpu = Cpu::<f32>::new(threads).unwrap();
        (forward(&cpu, &case), backward(&cpu, &case))
    });
    assert_bits("o", &one.0.0, &two.0.0);
    assert_bits("lse", &one.0.1, &two.0.1);
    assert_bits("d_qkv", &one.1, &two.1);
}
