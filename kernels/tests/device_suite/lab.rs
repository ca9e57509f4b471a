//! What every test of an operation needs: host values in and out of a device, poison around what
//! an operation may write, comparisons, finite differences.

use half::bf16;
use kernels::{Cpu, Cuda, Device, In, Out};
use proptest::prelude::ProptestConfig;
use proptest::test_runner::RngSeed;

/// A device under test. Host values are f64; a device rounds them as its memory does.
pub trait Lab: Device {
    /// Largest error against a reference, relative to the reference's largest value.
    const TOLERANCE: f64;
    /// The same for wide results that no activation comes between.
    const WIDE_TOLERANCE: f64 = Self::TOLERANCE;
    /// Largest error of a row or head, relative to its norm.
    const ROW_TOLERANCE: f64 = Self::TOLERANCE;
    /// Whether results of a row are the same bits whatever lies beside it.
    fn rows_stand_alone(&self) -> bool {
        true
    }

    /// Elements of poison on either side of an output: odd lengths come with odd addresses, so that
    /// an operation's paths for aligned and for other memory are both taken.
    fn margin(&self, len: usize) -> usize {
        if len.is_multiple_of(8) { 8 } else { 5 }
    }

    fn act(&self, values: &[f64]) -> Self::Act {
        let mut buffer = self.alloc_act(values.len()).unwrap();
        let values: Vec<f32> = values.iter().map(|value| *value as f32).collect();
        self.upload_act(Out::all(&mut buffer), &values).unwrap();
        buffer
    }
    fn wide(&self, values: &[f64]) -> Self::Wide {
        let mut buffer = self.alloc_wide(values.len()).unwrap();
        let values: Vec<f32> = values.iter().map(|value| *value as f32).collect();
        self.upload_wide(Out::all(&mut buffer), &values).unwrap();
        buffer
    }
    fn ints(&self, values: &[i32]) -> Self::Int {
        let mut buffer = self.alloc_int(values.len()).unwrap();
        self.upload_int(Out::all(&mut buffer), values).unwrap();
        buffer
    }
    fn read(&self, buffer: &Self::Act) -> Vec<f64> {
        let values = self.download_act(In::all(buffer)).unwrap().wait().unwrap();
        values.into_iter().map(f64::from).collect()
    }
    fn read_wide(&self, buffer: &Self::Wide) -> Vec<f64> {
        let values = self.download_wide(In::all(buffer)).unwrap().wait().unwrap();
        values.into_iter().map(f64::from).collect()
    }
    fn read_ints(&self, buffer: &Self::Int) -> Vec<i32> {
        self.download_int(In::all(buffer)).unwrap().wait().unwrap()
    }

    /// What `op` writes to an output of `len` elements that held NaN. Checks that all of it was
    /// written and nothing beside it.
    fn written(&self, len: usize, op: impl FnOnce(Out<'_, Self::Act>)) -> Vec<f64> {
        let values = self.written_partly(len, op);
        assert!(values.iter().all(|value| !value.is_nan()), "an element was not written");
        values
    }
    /// As [`Lab::written`], where parts may stay as they were: NaN.
    fn written_partly(&self, len: usize, op: impl FnOnce(Out<'_, Self::Act>)) -> Vec<f64> {
        self.changed(&vec![f64::NAN; len], op)
    }
    /// What `op` makes of `values`, with poison beside them.
    fn changed(&self, values: &[f64], op: impl FnOnce(Out<'_, Self::Act>)) -> Vec<f64> {
        let margin = self.margin(values.len());
        let mut buffer = self.act(&padded(values, margin));
        op(Out::range(&mut buffer, margin, values.len()));
        unpadded(self.read(&buffer), margin)
    }
    /// As [`Lab::changed`] for wide values.
    fn changed_wide(&self, values: &[f64], op: impl FnOnce(Out<'_, Self::Wide>)) -> Vec<f64> {
        let margin = self.margin(values.len());
        let mut buffer = self.wide(&padded(values, margin));
        op(Out::range(&mut buffer, margin, values.len()));
        unpadded(self.read_wide(&buffer), margin)
    }
    /// As [`Lab::written`] for wide values.
    fn written_wide(&self, len: usize, op: impl FnOnce(Out<'_, Self::Wide>)) -> Vec<f64> {
        let values = self.changed_wide(&vec![f64::NAN; len], op);
        assert!(values.iter().all(|value| !value.is_nan()), "an element was not written");
        values
    }
}

fn padded(values: &[f64], margin: usize) -> Vec<f64> {
    let poison = vec![f64::NAN; margin];
    [&poison, values, &poison].concat()
}

fn unpadded(mut values: Vec<f64>, margin: usize) -> Vec<f64> {
    let end = values.split_off(values.len() - margin);
    let inner = values.split_off(margin);
    assert!(values.iter().chain(&end).all(|value| value.is_nan()), "wrote beside its output");
    inner
}

impl Lab for Cpu<f32> {
    const TOLERANCE: f64 = 1e-5;
}

/// Activations are bf16. cuBLASLt and the tiles of attention sum in orders that depend on shapes.
impl Lab for Cuda {
    /// Rounding to bf16 alone is up to 3.9e-3 of a value, and some results are rounded twice.
    const TOLERANCE: f64 = 1e-2;
    const ROW_TOLERANCE: f64 = 5e-3;
    const WIDE_TOLERANCE: f64 = 1e-5;
    fn rows_stand_alone(&self) -> bool {
        self.is_batch_invariant()
    }
    /// Rows of real models are all aligned alike, and the alignment is part of what decides a
    /// product's algorithm.
    fn margin(&self, len: usize) -> usize {
        if self.is_batch_invariant() || len.is_multiple_of(8) { 8 } else { 5 }
    }
}

/// Exact: nothing is rounded on the way.
impl Lab for Cpu<f64> {
    const TOLERANCE: f64 = 1e-12;
    fn act(&self, values: &[f64]) -> Vec<f64> {
        values.to_vec()
    }
    fn wide(&self, values: &[f64]) -> Vec<f64> {
        values.to_vec()
    }
    fn read(&self, buffer: &Vec<f64>) -> Vec<f64> {
        buffer.clone()
    }
    fn read_wide(&self, buffer: &Vec<f64>) -> Vec<f64> {
        buffer.clone()
    }
}

/// The device for finite differences and for references of gradients.
pub fn exact() -> Cpu<f64> {
    Cpu::new(1).unwrap()
}

/// `count` random cases, the same in every run. `LOQUETIER_SOAK`, which `./dev soak` sets,
/// multiplies them; `LOQUETIER_CASES` is their number where each takes seconds: under a sanitizer.
pub fn cases(count: u32) -> ProptestConfig {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    ProptestConfig {
        cases: number("LOQUETIER_CASES").unwrap_or(count * number("LOQUETIER_SOAK").unwrap_or(1)),
        rng_seed: RngSeed::Fixed(1),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// A small generator for test values (SplitMix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// Below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
    /// Values in (−1, 1) that every device holds exactly, bf16 ones too.
    pub fn values(&mut self, len: usize) -> Vec<f64> {
        let value = |bits: u64| (bits >> 41) as f32 / (1 << 22) as f32 - 1.0;
        (0..len).map(|_| bf16::from_f32(value(self.next())).to_f64()).collect()
    }
}

/// Panics unless the largest difference is within `tolerance` of the largest expected value.
#[track_caller]
pub fn assert_close(what: &str, got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "length of {what}");
    let scale = expected.iter().fold(1e-6f64, |scale, value| scale.max(value.abs()));
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (got - expected).abs() / scale;
        assert!(error <= tolerance, "{what}[{index}]: {got} for {expected}, error {error:e}");
    }
}

/// Panics unless every row (or head) of `width` is near: ‖got − expected‖ / ‖expected‖.
#[track_caller]
pub fn assert_rows(what: &str, got: &[f64], expected: &[f64], width: usize, tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "length of {what}");
    let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
    let mut worst = (0.0, 0);
    for (row, (got, expected)) in got.chunks(width).zip(expected.chunks(width)).enumerate() {
        let off: Vec<f64> =
            got.iter().zip(expected).map(|(got, expected)| got - expected).collect();
        let error = norm(&off) / norm(expected).max(1e-30);
        // NaN must not pass.
        assert!(error <= tolerance, "{what}, row {row}: error {error:e}");
        worst = if error > worst.0 { (error, row) } else { worst };
    }
    println!("{what}: largest error {:.2e} at row {}", worst.0, worst.1);
}

/// The device that large shapes are compared with.
pub fn specification() -> Cpu<f32> {
    Cpu::new(0).unwrap()
}

/// Panics unless both hold the same bits (NaN equals NaN).
#[track_caller]
pub fn assert_bits(what: &str, got: &[f64], expected: &[f64]) {
    assert_eq!(got.len(), expected.len(), "length of {what}");
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        let equal = got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan());
        assert!(equal, "{what}[{index}]: {got:e} is not {expected:e}");
    }
}

/// Panics unless both hold the same bits, or on devices whose rows depend on their neighbours'
/// shapes are close: each within the tolerance of the truth.
#[track_caller]
pub fn assert_same<D: Lab>(lab: &D, what: &str, got: &[f64], expected: &[f64]) {
    match lab.rows_stand_alone() {
        true => assert_bits(what, got, expected),
        false => assert_close(what, got, expected, 2.0 * D::TOLERANCE),
    }
}

/// Panics unless `gradient` is that of `loss` at `x`, by central differences in f64.
#[track_caller]
pub fn assert_gradient(what: &str, x: &[f64], gradient: &[f64], loss: impl Fn(&[f64]) -> f64) {
    let step = 1e-5;
    let mut moved = x.to_vec();
    let numeric: Vec<f64> = (0..x.len())
        .map(|index| {
            let mut at = |value| {
                moved[index] = value;
                loss(&moved)
            };
            let (above, below) = (at(x[index] + step), at(x[index] - step));
            moved[index] = x[index];
            (above - below) / (2.0 * step)
        })
        .collect();
    assert!(numeric.iter().any(|value| value.abs() > 1e-4), "{what}: nothing to check");
    assert_close(what, gradient, &numeric, 1e-6);
}

/// `Σ a[i] · b[i]`, the loss whose gradient with respect to `a` is `b`.
pub fn inner(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
