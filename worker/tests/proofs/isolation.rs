//! An adapter's logits, a job's losses and its gradients are the same bits alone and beside any
//! mix of other segments, however these are packed and cut, on one thread and on two.

use crate::common::reading::{Reader, blocks, logits, read};
use crate::common::training::{item, micro_batch, micro_batch_beside};
use crate::common::{Adapter, DEMO, Random, bits, gradients, model, place_all, sizes, soak};
use kernels::{Cpu, Device, Module, Out};
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::VecDeque;
use worker::model::{Batch, Model};
use worker::train::{Item, ItemResult, Kind, Sequence};

/// Rows of a packed micro-batch at most.
const MICRO_ROWS: usize = 90;

#[derive(Clone, Debug)]
struct JobMix {
    rank: usize,
    targets: u8,
    dropout: bool,
    lengths: Vec<usize>,
}

#[derive(Clone, Debug)]
struct ReaderMix {
    /// Adapter by number, past the last: the base alone.
    adapter: usize,
    length: usize,
}

#[derive(Clone, Debug)]
struct Mix {
    base: &'static str,
    jobs: Vec<JobMix>,
    readers: Vec<ReaderMix>,
    kind: Kind,
    threads: usize,
    /// Rows of the training chunks and of the readers' shares, round and round.
    cuts: Vec<(usize, usize)>,
    seed: u64,
}

fn mixes() -> impl Strategy<Value = Mix> {
    let job = (1usize..=16, 1u8..128, any::<bool>(), prop::collection::vec(2usize..22, 1..4))
        .prop_map(|(rank, targets, dropout, lengths)| JobMix { rank, targets, dropout, lengths });
    let reader =
        (0usize..4, 1usize..24).prop_map(|(adapter, length)| ReaderMix { adapter, length });
    (
        prop::sample::select(vec!["qwen3", "llama3", "odd"]),
        prop::collection::vec(job, 1..4),
        prop::collection::vec(reader, 0..4),
        prop::sample::select(vec![Kind::Train, Kind::Train, Kind::Evaluate]),
        1usize..=2,
        prop::collection::vec((1usize..48, 1usize..8), 1..6),
        any::<u64>(),
    )
        .prop_map(|(base, jobs, readers, kind, threads, cuts, seed)| Mix {
            base,
            jobs,
            readers,
            kind,
            threads,
            cuts,
            seed,
        })
}

/// A mix with its data.
struct Scene {
    mix: Mix,
    adapters: Vec<Adapter>,
    items: Vec<Vec<(Item, Sequence)>>,
    prompts: Vec<Vec<u32>>,
}

/// What a mix comes to: per job its results and gradients, per reader its logits.
#[derive(Debug, PartialEq)]
struct Outcome {
    losses: Vec<Vec<(u64, u64, u64)>>,
    gradients: Vec<Vec<u32>>,
    logits: Vec<Vec<u32>>,
}

impl Scene {
    fn new(mix: Mix) -> Self {
        let mut random = Random::new(mix.seed);
        let adapters: Vec<Adapter> = (0..)
            .zip(&mix.jobs)
            .map(|(seed, job)| {
                let targets: Vec<Module> = Module::ALL
                    .into_iter()
                    .filter(|module| job.targets >> module.index() & 1 == 1)
                    .collect();
                Adapter::random(mix.base, job.rank, &targets, seed)
            })
            .collect();
        let items = (0..).zip(&mix.jobs).map(|(slot, job)| job.items(slot, &mut random)).collect();
        let prompts = mix.readers.iter().map(|reader| random.tokens(reader.length)).collect();
        Self { mix, adapters, items, prompts }
    }

    fn model(&self, threads: usize) -> (Model<Cpu<f32>>, Vec<usize>) {
        let mut sizes = sizes();
        let pages = self.adapters.iter().map(|adapter| adapter.layout.pages()).sum();
        (sizes.pool_pages, sizes.train_pages) = (pages, pages);
        let mut model = model(self.mix.base, threads, sizes);
        let pages = place_all(&mut model, &self.adapters);
        (model, pages)
    }

    fn adapter_of(&self, reader: &ReaderMix) -> Option<(usize, usize)> {
        self.adapters.get(reader.adapter).map(|adapter| (reader.adapter, adapter.rank()))
    }

    /// Each job and each reader by itself, whole, on one thread.
    fn alone(&self) -> Outcome {
        let (mut model, pages) = self.model(1);
        let mut losses = Vec::new();
        for items in &self.items {
            let items = items.iter().map(|(item, example)| (item.clone(), example)).collect();
            losses.push(words(&micro_batch(&mut model, self.mix.kind, items, usize::MAX)));
        }
        let logits = self.mix.readers.iter().zip(&self.prompts);
        let logits = logits
            .map(|(reader, prompt)| bits(&read(&mut model, prompt, self.adapter_of(reader), &[])))
            .collect();
        Outcome { losses, gradients: self.gradients(&model, &pages), logits }
    }

    /// All at once, packed and cut as the mix says.
    fn together(&self) -> Outcome {
        let (mut model, pages) = self.model(self.mix.threads);
        let all: Vec<u32> = (0..model.sizes.blocks as u32).collect();
        model.poison_blocks(&all).unwrap();
        let chats = RefCell::new(self.chats(model.sizes.block_size));
        let mut losses = vec![Vec::new(); self.items.len()];
        let mut cuts = self.mix.cuts.iter().cycle();
        for items in self.packed() {
            let results = micro_batch_beside(
                &mut model,
                self.mix.kind,
                items,
                || cuts.next().unwrap().0,
                |batch| chats.borrow_mut().append(batch),
                |model, batch| chats.borrow_mut().keep(model, batch),
            );
            for result in &results {
                losses[result.job as usize].extend(words(std::slice::from_ref(result)));
            }
        }
        let mut chats = chats.into_inner();
        while chats.left() {
            let mut batch = Batch::default();
            chats.append(&mut batch);
            model.forward(&batch).unwrap();
            chats.keep(&mut model, &batch);
        }
        let logits = chats.found.iter().map(|found| bits(found)).collect();
        Outcome { losses, gradients: self.gradients(&model, &pages), logits }
    }

    fn gradients(&self, model: &Model<Cpu<f32>>, pages: &[usize]) -> Vec<Vec<u32>> {
        let placed = pages.iter().zip(&self.adapters);
        placed.map(|(page, adapter)| bits(&gradients(model, *page, adapter))).collect()
    }

    /// Micro-batches of random packing; each job's examples keep their order.
    fn packed(&self) -> Vec<Vec<(Item, &Sequence)>> {
        let mut random = Random::new(self.mix.seed ^ 1);
        let mut queues: Vec<VecDeque<&(Item, Sequence)>> =
            self.items.iter().map(|items| items.iter().collect()).collect();
        let (mut packed, mut micro, mut rows) = (Vec::new(), Vec::new(), 0);
        while queues.iter().any(|queue| !queue.is_empty()) {
            let at = random.below(queues.len());
            let Some((item, example)) = queues[at].pop_front() else { continue };
            if rows + example.rows() > MICRO_ROWS || random.below(4) == 0 {
                packed.push(std::mem::take(&mut micro));
                rows = 0;
            }
            rows += example.rows();
            micro.push((item.clone(), example));
        }
        packed.push(micro);
        packed.retain(|micro| !micro.is_empty());
        packed
    }

    fn chats(&self, block_size: usize) -> Chats {
        let mut first = 0;
        let readers = self.mix.readers.iter().zip(&self.prompts).map(|(reader, prompt)| {
            let held = blocks(first, prompt.len(), block_size);
            first += held.len() as u32;
            Reader::new(prompt, self.adapter_of(reader), held)
        });
        let readers: Vec<Reader> = readers.collect();
        let found = vec![Vec::new(); readers.len()];
        let shares = self.mix.cuts.iter().map(|cut| cut.1).collect();
        Chats { readers, found, shares, at: 0, block_size, taken: Vec::new() }
    }
}

impl JobMix {
    fn items(&self, slot: usize, random: &mut Random) -> Vec<(Item, Sequence)> {
        let mut next = |length: &usize| {
            let tokens = random.tokens(*length);
            let mut trained: Vec<bool> = (0..*length).map(|_| random.below(3) > 0).collect();
            trained[1] = true;
            let dropout = if self.dropout { 0.3 } else { 0.0 };
            let dropout_seed = random.bits() << 20;
            let item = item(slot as u64, slot, self.rank, 0.125);
            (Item { dropout_seed, dropout, ..item }, Sequence { tokens, trained })
        };
        self.lengths.iter().map(&mut next).collect()
    }
}

/// The readers of a mix while they go on.
struct Chats {
    readers: Vec<Reader>,
    found: Vec<Vec<f32>>,
    shares: Vec<usize>,
    at: usize,
    block_size: usize,
    /// Reader and rows of each share in the batch at work.
    taken: Vec<(usize, usize)>,
}

impl Chats {
    fn left(&self) -> bool {
        self.readers.iter().any(|reader| reader.cached < reader.tokens.len())
    }

    fn append(&mut self, batch: &mut Batch) {
        self.taken.clear();
        for (index, reader) in self.readers.iter_mut().enumerate() {
            let rows = self.shares[self.at % self.shares.len()];
            self.at += 1;
            let rows = rows.min(reader.tokens.len() - reader.cached);
            if rows > 0 {
                reader.append(batch, rows, self.block_size);
                self.taken.push((index, rows));
            }
        }
    }

    fn keep(&mut self, model: &mut Model<Cpu<f32>>, batch: &Batch) {
        if self.taken.is_empty() {
            return;
        }
        let all = logits(model, batch);
        let mut rows = all.chunks_exact(model.config.vocab);
        for (index, count) in &self.taken {
            self.found[*index].extend(rows.by_ref().take(*count).flatten());
        }
    }
}

fn words(results: &[ItemResult]) -> Vec<(u64, u64, u64)> {
    let word = |result: &ItemResult| (result.loss.to_bits(), result.correct, result.labels);
    results.iter().map(word).collect()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: soak(200),
        failure_persistence: None,
        ..Default::default()
    })]
    #[test]
    fn nothing_changes_beside_others(mix in mixes()) {
        let scene = Scene::new(mix);
        let (alone, together) = (scene.alone(), scene.together());
        prop_assert_eq!(&alone.losses, &together.losses);
        prop_assert!(alone.gradients == together.gradients, "gradients differ");
        prop_assert!(alone.logits == together.logits, "logits differ");
    }
}

/// Equal bits prove something only where a changed token would change them.
#[test]
fn a_changed_token_changes_the_loss() {
    let job = JobMix { rank: 2, targets: 127, dropout: false, lengths: vec![9] };
    let seen = Scene::new(Mix {
        base: "odd",
        jobs: vec![job],
        readers: vec![],
        kind: Kind::Train,
        threads: 1,
        cuts: vec![(4, 1)],
        seed: 3,
    });
    let (mut model, pages) = seen.model(1);
    let (item, example) = seen.items[0][0].clone();
    let mut run = |example: &Sequence| {
        let len = seen.adapters[0].layout.len();
        let grads = Out::range(&mut model.train.grads, pages[0], len);
        model.device.fill_wide(grads, 0.0).unwrap();
        micro_batch(&mut model, Kind::Train, vec![(item.clone(), example)], 3)[0].loss
    };
    let before = run(&example);
    assert_eq!(before, run(&example));
    let mut other = example.clone();
    other.tokens[0] ^= 1;
    assert_ne!(before, run(&other));
}

/// The bases above are so small that most of their operations stay on one thread; of this one
/// threads share nearly all.
#[test]
fn nothing_changes_where_threads_share_the_work() {
    let job = |rank, dropout, lengths| JobMix { rank, targets: 127, dropout, lengths };
    let scene = Scene::new(Mix {
        base: DEMO,
        jobs: vec![job(16, true, vec![60, 33, 20]), job(5, false, vec![45, 20])],
        readers: vec![ReaderMix { adapter: 0, length: 40 }, ReaderMix { adapter: 9, length: 30 }],
        kind: Kind::Train,
        threads: 2,
        cuts: vec![(37, 7), (64, 3)],
        seed: 9,
    });
    let (alone, together) = (scene.alone(), scene.together());
    assert_eq!(alone.losses, together.losses);
    assert!(alone.gradients == together.gradients, "gradients differ");
    assert!(alone.logits == together.logits, "logits differ");
}
