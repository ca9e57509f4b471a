//! Small bases on the CPU device, golden files, and what several proofs do with a model.

pub mod jobs;
pub mod reading;
pub mod rig;
pub mod training;

use kernels::cpu::Float;
use kernels::tables::PAGE;
use kernels::{Cpu, Device, Module};
use safetensors::SafeTensors;
use std::path::PathBuf;
use std::sync::Arc;
use worker::adapters::{AdapterLayout, AdapterShape, Init, Part, init_adapter};
use worker::base::{BaseFiles, BaseWeights};
use worker::model::{Model, Sizes};

/// Bases of `tests/golden`.
pub const BASES: [&str; 7] = ["llama2", "llama3", "mistral", "qwen2", "qwen3", "odd", "sharded"];

/// Random cases of a test, times `LOQUETIER_SOAK` where `./dev soak` sets it.
pub fn soak(cases: u32) -> u32 {
    let factor = std::env::var("LOQUETIER_SOAK").ok().and_then(|text| text.parse().ok());
    cases * factor.unwrap_or(1)
}

/// A file or folder of the repository: as it was built, or of the copy that `LOQUETIER_SOURCE`
/// names on a machine it was not built on.
fn source(path: &str) -> PathBuf {
    let built = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    std::env::var_os("LOQUETIER_SOURCE").map_or_else(built, PathBuf::from).join(path)
}

/// A file or folder of `tests/golden`.
pub fn golden(path: &str) -> PathBuf {
    source("worker/tests/golden").join(path)
}

/// The base that the binary holds: large enough that threads share its operations.
pub const DEMO: &str = "demo";

/// Folder of a golden base, or of the demo's.
fn base_folder(base: &str) -> PathBuf {
    match base {
        DEMO => source("demo/base"),
        base => golden(&format!("bases/{base}")),
    }
}

/// Files of a golden base, or of the demo's.
pub fn base_files(base: &str) -> BaseFiles {
    BaseFiles::open(&base_folder(base)).unwrap()
}

/// Values of one golden safetensors file.
pub struct Expected(Vec<u8>);

impl Expected {
    /// `path` below `tests/golden`.
    pub fn open(path: &str) -> Self {
        Self(std::fs::read(golden(path)).expect(path))
    }

    fn words(&self, name: &str) -> Vec<[u8; 4]> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let data = file.tensor(name).expect(name).data();
        data.chunks_exact(4).map(|word| word.try_into().unwrap()).collect()
    }

    /// An f32 tensor.
    pub fn floats(&self, name: &str) -> Vec<f32> {
        self.words(name).into_iter().map(f32::from_le_bytes).collect()
    }

    /// An i32 tensor of token ids, flags or counts.
    pub fn ints(&self, name: &str) -> Vec<u32> {
        self.words(name).into_iter().map(|word| i32::from_le_bytes(word) as u32).collect()
    }
}

/// Sizes that hold everything the proofs do with a golden base.
pub fn sizes() -> Sizes {
    Sizes {
        step_rows: 160,
        sample_rows: 64,
        history: 64 * 64,
        arena_rows: 160,
        arena_rank_rows: 160 * 16,
        loss_rows: 24,
        loss_chunk_rows: 16,
        max_rank: 16,
        slots: 8,
        pool_pages: 48,
        train_pages: 48,
        blocks: 48,
        block_size: 4,
        context: 64,
        max_positions: 64,
        sequences: 16,
    }
}

/// A golden base on the CPU.
pub fn model<T: Float>(base: &str, threads: usize, sizes: Sizes) -> Model<Cpu<T>>
where
    Cpu<T>: Device,
{
    let files = base_files(base);
    let device = Cpu::new(threads).unwrap();
    let weights = BaseWeights::load(&device, &files, sizes.max_positions).unwrap();
    Model::new(device, files.config().clone(), weights, sizes).unwrap()
}

/// A random adapter: A as training starts it, B random too, so that it changes answers.
#[derive(Clone)]
pub struct Adapter {
    /// Its layout.
    pub layout: Arc<AdapterLayout>,
    /// Its values.
    pub values: Arc<Vec<f32>>,
}

impl Adapter {
    /// Of `rank` on `targets` of a golden base.
    pub fn random(base: &str, rank: usize, targets: &[Module], seed: u64) -> Self {
        let files = base_files(base);
        let shape = AdapterShape::new(rank, 2.0 * rank as f64, false, targets.to_vec()).unwrap();
        let layout = AdapterLayout::new(&files.config().dims(), &shape);
        let mut values = init_adapter(&layout, seed, Init::Default);
        let mut random = Random::new(seed);
        for spot in layout.tensors().filter(|spot| spot.part == Part::B) {
            for value in &mut values[spot.offset..spot.offset + spot.len()] {
                *value = random.unit() * 0.5;
            }
        }
        Self { layout: Arc::new(layout), values: Arc::new(values) }
    }

    /// Its rank.
    pub fn rank(&self) -> usize {
        self.layout.shape().rank
    }
}

/// Puts an adapter into `slot` at `page` of both pools, as one that trains.
pub fn place<D: Device>(model: &mut Model<D>, slot: usize, page: usize, adapter: &Adapter) {
    let row = adapter.layout.slot_row(page as u32, Some(page as u32));
    model.pool.set_slot(&model.device, slot, &row).unwrap();
    model.pool.write(&model.device, page, &adapter.values).unwrap();
    model.train.load(&model.device, page, &adapter.values, None).unwrap();
}

/// Places adapters one behind another, slots ascending; their first pages.
pub fn place_all<D: Device>(model: &mut Model<D>, adapters: &[Adapter]) -> Vec<usize> {
    let mut page = 0;
    let mut pages = Vec::new();
    for (slot, adapter) in adapters.iter().enumerate() {
        place(model, slot, page, adapter);
        pages.push(page);
        page += adapter.layout.pages();
    }
    pages
}

/// Gradients of an adapter placed at `page`.
pub fn gradients<T: Copy, D: Device<Wide = Vec<T>>>(
    model: &Model<D>,
    page: usize,
    adapter: &Adapter,
) -> Vec<T> {
    model.train.grads[page * PAGE..][..adapter.layout.len()].to_vec()
}

/// A stream of random numbers.
pub struct Random(u64);

impl Random {
    /// A stream of its own per seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5DEE_CE66)
    }

    /// 32 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32
    }

    /// Below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        self.bits() as usize % limit
    }

    /// Within ±1.
    pub fn unit(&mut self) -> f32 {
        (self.bits() as f32 / (1u64 << 31) as f32) - 1.0
    }

    /// Random token ids that every golden base knows.
    pub fn tokens(&mut self, count: usize) -> Vec<u32> {
        (0..count).map(|_| self.below(96) as u32).collect()
    }
}

/// Largest absolute difference.
pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |m, d| if d > m || d.is_nan() { d } else { m })
}

/// Relative difference in the maximum norm.
pub fn relative_difference(found: &[f32], expected: &[f32]) -> f32 {
    let scale = expected.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
    largest_difference(found, expected) / scale.max(f32::MIN_POSITIVE)
}

/// Bits of floats: equal where the proofs say bit-equal.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
