//! The whole model on a GPU: against float32, no farther than transformers and PEFT in bfloat16;
//! the same batches give the same bits; neighbours, chunks and resuming change nothing beyond
//! rounding, and nothing at all on a device whose rows stand alone. `tests/whole/make.py` makes the
//! files on the machine with the GPU; `LOQUETIER_WHOLE_MODEL` names their folder.

use crate::common::reading::{Reader, blocks, logits, read};
use crate::common::training::{item, micro_batch, micro_batch_beside, update};
use crate::common::{Adapter, bits};
use kernels::tables::PAGE;
use kernels::{AdamW, Cuda, Device, In};
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::PathBuf;
use std::sync::Arc;
use worker::adapters::{AdapterLayout, peft};
use worker::base::{BaseFiles, BaseWeights};
use worker::model::{Model, Sizes};
use worker::train::{Item, ItemResult, Kind, Sequence};

const FAMILIES: [&str; 5] = ["llama2", "llama3", "mistral", "qwen2", "qwen3"];
/// How much farther from float32 than the reference in bfloat16.
const FACTOR: f64 = 1.25;
/// Relative difference that another batch shape may make in bfloat16.
const NOISE: f64 = 2e-2;

/// One family's files, and its base with its adapter on a device.
struct Whole<D: Device> {
    folder: PathBuf,
    run: Value,
    adapter: Adapter,
    model: Model<D>,
}

fn sizes() -> Sizes {
    Sizes {
        step_rows: 512,
        sample_rows: 256,
        arena_rows: 1024,
        arena_rank_rows: 1024 * 16,
        loss_rows: 256,
        max_rank: 16,
        pool_pages: 512,
        train_pages: 512,
        blocks: 128,
        block_size: 16,
        context: 512,
        max_positions: 512,
        ..crate::common::sizes()
    }
}

impl<D: Device> Whole<D> {
    fn open(device: D, family: &str) -> Self {
        let root = std::env::var_os("LOQUETIER_WHOLE_MODEL").expect("LOQUETIER_WHOLE_MODEL is set");
        let folder = PathBuf::from(root).join(family);
        let run = serde_json::from_slice(&std::fs::read(folder.join("run.json")).unwrap()).unwrap();
        let files = BaseFiles::open(&folder.join("base")).unwrap();
        let weights = BaseWeights::load(&device, &files, sizes().max_positions).unwrap();
        let model = Model::new(device, files.config().clone(), weights, sizes()).unwrap();
        let file = |name: &str| std::fs::read(folder.join("adapter").join(name)).unwrap();
        let (config, weights) = (file("adapter_config.json"), file("adapter_model.safetensors"));
        let dims = model.config.dims();
        let found = peft::read(&config, &weights, &dims, "base").unwrap();
        let layout = Arc::new(AdapterLayout::new(&dims, &found.shape));
        let adapter = Adapter { layout, values: Arc::new(found.values) };
        let mut whole = Self { folder, run, adapter, model };
        whole.restart();
        whole
    }

    /// Puts the adapter as it was before training.
    fn restart(&mut self) {
        crate::common::place(&mut self.model, 2, 1, &self.adapter);
    }

    fn expected(&self, name: &str) -> Vec<f32> {
        let bytes = std::fs::read(self.folder.join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let words = file.tensor(name).expect(name).data().chunks_exact(4);
        words.map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect()
    }

    fn ids(&self) -> Vec<u32> {
        tokens(&self.run["ids"])
    }

    fn logits(&mut self, cuts: &[usize]) -> Vec<f32> {
        let ids = self.ids();
        read(&mut self.model, &ids, Some((2, self.adapter.rank())), cuts)
    }

    /// Examples of a step, all tokens but the first trained.
    fn batch(&self, step: usize) -> Vec<Sequence> {
        let examples = self.run["examples"].as_array().unwrap();
        let size = self.run["batch"].as_u64().unwrap() as usize;
        let example = |index: usize| {
            let tokens = tokens(&examples[(step * size + index) % examples.len()]);
            let trained = vec![true; tokens.len()];
            Sequence { tokens, trained }
        };
        (0..size).map(example).collect()
    }

    fn items<'a>(&self, examples: &'a [Sequence]) -> (Vec<(Item, &'a Sequence)>, usize) {
        let labels: usize = examples.iter().map(Sequence::labels).sum();
        let item = item(0, 2, self.adapter.rank(), 1.0 / labels as f32);
        (examples.iter().map(|example| (item.clone(), example)).collect(), labels)
    }

    /// Runs `steps` optimizer steps from step `first` on; the mean losses.
    fn train(&mut self, first: usize, steps: usize) -> Vec<f64> {
        (first..first + steps)
            .map(|step| {
                let examples = self.batch(step);
                let (items, labels) = self.items(&examples);
                let results = micro_batch(&mut self.model, Kind::Train, items, 300);
                self.update(step as u64 + 1);
                results.iter().map(|result| result.loss).sum::<f64>() / labels as f64
            })
            .collect()
    }

    fn update(&mut self, step: u64) {
        let len = self.adapter.layout.len();
        let learning_rate = self.run["learning_rate"].as_f64().unwrap();
        let step = AdamW {
            learning_rate,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            step,
        };
        update(&mut self.model, len, step);
    }

    /// Masters and moments.
    fn state(&self) -> [Vec<f32>; 3] {
        let (train, len) = (&self.model.train, self.adapter.layout.len());
        [&train.params, &train.m, &train.v].map(|buffer| {
            self.model.device.download_wide(In::range(buffer, PAGE, len)).unwrap().wait().unwrap()
        })
    }
}

fn tokens(list: &Value) -> Vec<u32> {
    list.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn floats(list: &Value) -> Vec<f32> {
    list.as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect()
}

/// ‖a − b‖ / ‖b‖.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let off = square(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    (off / square(&mut b.iter().map(|b| f64::from(*b)))).sqrt()
}

/// Panics unless `found` is at most [`FACTOR`] times as far from `exact` as `peer`.
fn no_farther(what: &str, found: &[f32], peer: &[f32], exact: &[f32]) {
    let (ours, theirs) = (distance(found, exact), distance(peer, exact));
    println!("{what}: {ours:.3e} from float32, the reference in bfloat16 {theirs:.3e}");
    assert!(ours <= FACTOR * theirs, "{what}: {ours:e} against {theirs:e}");
}

fn values_are_no_farther_than_the_reference<D: Device>(open: impl Fn() -> D, _exact: bool) {
    for family in FAMILIES {
        let mut whole = Whole::open(open(), family);
        let [exact, peer] = ["f32", "bf16"].map(|kind| whole.expected(&format!("logits.{kind}")));
        no_farther(&format!("{family}: logits"), &whole.logits(&[]), &peer, &exact);
        let [exact, peer] = ["f32", "bf16"].map(|kind| floats(&whole.run["losses"][kind]));
        let found: Vec<f32> = whole.train(0, exact.len()).iter().map(|loss| *loss as f32).collect();
        assert!(found[49] < 0.8 * found[0], "{family}: it learns, {found:?}");
        no_farther(&format!("{family}: 50 losses"), &found, &peer, &exact);
    }
}

fn same_batches_give_the_same_bits<D: Device>(open: impl Fn() -> D, _exact: bool) {
    let run = |family| {
        let mut whole = Whole::open(open(), family);
        let losses = whole.train(0, 6);
        (losses, whole.state(), whole.logits(&[70, 1, 64]))
    };
    for family in FAMILIES {
        let (first, second) = (run(family), run(family));
        assert!(first == second, "{family}: two runs of the same batches differ");
    }
}

fn a_resumed_run_is_the_undisturbed_one<D: Device>(open: impl Fn() -> D, _exact: bool) {
    let mut whole = Whole::open(open(), "llama3");
    let mut losses = whole.train(0, 4);
    let [params, m, v] = whole.state();
    losses.extend(whole.train(4, 4));
    let undisturbed = whole.state();

    let mut resumed = Whole::open(open(), "llama3");
    let model = &mut resumed.model;
    model.train.load(&model.device, 1, &params, Some((&m, &v))).unwrap();
    model.pool.write(&model.device, 1, &params).unwrap();
    assert!(resumed.train(4, 4) == losses[4..], "losses after resuming");
    assert!(resumed.state() == undisturbed, "state after resuming");
}

/// Greedy tokens are the same wherever the margin is above the noise; `exact`: all bits are.
fn near(what: &str, found: &[f32], expected: &[f32], vocab: usize, exact: bool) {
    assert!(!exact || bits(found) == bits(expected), "{what}: bits differ");
    let off = distance(found, expected);
    assert!(off <= NOISE, "{what}: {off:e}");
    for (row, (found, expected)) in found.chunks(vocab).zip(expected.chunks(vocab)).enumerate() {
        let mut order: Vec<usize> = (0..vocab).collect();
        order.sort_by(|a, b| expected[*b].total_cmp(&expected[*a]));
        let margin = expected[order[0]] - expected[order[1]];
        let size = expected.iter().fold(0.0f32, |size, value| size.max(value.abs()));
        let best = (0..vocab).max_by(|a, b| found[*a].total_cmp(&found[*b])).unwrap();
        let clear = f64::from(margin) > NOISE * f64::from(size);
        assert!(best == order[0] || !clear, "{what}, row {row}: margin {margin}");
    }
}

fn chunks_and_decode_stay_within_the_noise<D: Device>(open: impl Fn() -> D, exact: bool) {
    for family in FAMILIES {
        let mut whole = Whole::open(open(), family);
        let (whole_prefill, vocab) = (whole.logits(&[]), whole.model.config.vocab);
        for cuts in [&[1; 200][..], &[64, 1, 1, 70], &[33; 7], &[199, 1]] {
            let what = format!("{family} in {} chunks", cuts.len());
            near(&what, &whole.logits(cuts), &whole_prefill, vocab, exact);
        }
    }
}

/// A reader and a job together: both as alone, within the noise.
fn neighbours_stay_within_the_noise<D: Device>(open: impl Fn() -> D, exact: bool) {
    for family in ["llama3", "qwen3"] {
        let mut whole = Whole::open(open(), family);
        let (alone, vocab) = (whole.logits(&[]), whole.model.config.vocab);
        let examples = whole.batch(0);
        let (items, _) = whole.items(&examples);
        let losses = |results: Vec<ItemResult>| -> Vec<f32> {
            results.iter().map(|result| result.loss as f32).collect()
        };
        let undisturbed = losses(micro_batch(&mut whole.model, Kind::Evaluate, items, 300));
        let (ids, rank, size) = (whole.ids(), whole.adapter.rank(), whole.model.sizes.block_size);
        let mut reader = Reader::new(&ids, Some((2, rank)), blocks(5, ids.len(), size));
        let mut cuts = [50, 1, 1, 90].into_iter().cycle();
        let (mut found, mut rows) = (Vec::new(), [37, 120, 64].into_iter().cycle());
        let (items, _) = whole.items(&examples);
        let results = micro_batch_beside(
            &mut whole.model,
            Kind::Evaluate,
            items,
            || rows.next().unwrap(),
            |batch| {
                let left = ids.len() - reader.cached;
                if left > 0 {
                    reader.append(batch, cuts.next().unwrap().min(left), size);
                }
            },
            |model, batch| {
                if !batch.sample_rows.is_empty() {
                    found.extend(logits(model, batch));
                }
            },
        );
        let what = format!("{family}: beside a job");
        near(&what, &found, &alone[..found.len()], vocab, exact);
        assert!(found.len() > 40 * vocab, "the reader rode beside the job");
        let losses = losses(results);
        assert!(!exact || bits(&losses) == bits(&undisturbed), "{family}: bits of losses");
        let off = distance(&losses, &undisturbed);
        assert!(off <= NOISE, "{family}: losses beside a reader: {off:e}");
    }
}

/// The proofs on one device.
macro_rules! whole_model {
    ($name:ident, $open:expr, $exact:expr, $($proof:ident),+) => {
        mod $name {
            $(#[test]
            #[ignore = "needs a GPU and the files of tests/whole/make.py"]
            fn $proof() {
                super::$proof($open, $exact);
            })+
        }
    };
}

whole_model!(
    cuda,
    || super::Cuda::open(0).unwrap(),
    false,
    values_are_no_farther_than_the_reference,
    same_batches_give_the_same_bits,
    a_resumed_run_is_the_undisturbed_one,
    chunks_and_decode_stay_within_the_noise,
    neighbours_stay_within_the_noise
);
whole_model!(
    cuda_batch_invariant,
    || super::Cuda::open(0).unwrap().batch_invariant(),
    true,
    values_are_no_farther_than_the_reference,
    chunks_and_decode_stay_within_the_noise,
    neighbours_stay_within_the_noise
);
