//! The memory plan against what a model really takes.

use crate::common::{BASES, base_files, sizes};
use kernels::{Cpu, Memory};
use worker::WorkerOptions;
use worker::base::BaseWeights;
use worker::footprint::Footprint;
use worker::model::{Model, Sizes};

const MIB: u64 = 1 << 20;

/// Elements that a base and its model take of a device.
fn taken(base: &str, sizes: &Sizes) -> [usize; 3] {
    let files = base_files(base);
    let device = Cpu::<f32>::new(1).unwrap();
    let weights = BaseWeights::load(&device, &files, sizes.max_positions).unwrap();
    let model = Model::new(device, files.config().clone(), weights, sizes.clone()).unwrap();
    model.device.taken()
}

#[test]
fn the_plan_is_what_a_model_takes() {
    for base in BASES {
        let config = base_files(base).config().clone();
        let mut odd = sizes();
        (odd.step_rows, odd.sample_rows, odd.history, odd.sequences) = (37, 11, 5, 90);
        (odd.loss_rows, odd.loss_chunk_rows, odd.blocks, odd.max_rank) = (13, 7, 3, 9);
        (odd.slots, odd.pool_pages, odd.train_pages, odd.arena_rank_rows) = (5, 2, 3, 71);
        for sizes in [sizes(), odd] {
            let planned = sizes.footprints::<Cpu<f32>>(&config).into_iter();
            let sum = planned.map(|part| part.1).fold(Footprint::default(), |a, b| a + b);
            assert_eq!([sum.act, sum.wide, sum.int], taken(base, &sizes), "{base}");
        }
    }
}

#[test]
fn the_cache_takes_what_is_left_and_too_little_is_one_clear_error() {
    let config = base_files("llama3").config().clone();
    let options = WorkerOptions { max_sequences: 8, ..WorkerOptions::suited(None) };
    let plan = |options: &WorkerOptions, mib: u64| {
        let memory = Memory { free: mib * MIB, total: 2 * mib * MIB };
        options.plan::<Cpu<f32>>(&config, Some(memory))
    };
    let all = plan(&options, 1 << 20).unwrap();
    assert_eq!(all.sizes.blocks * 16, 8 * config.context, "never more than can be used");
    let workspace = 512;
    let fixed = (all.total() - all.parts.last().unwrap().1) / MIB - workspace;
    let mut last = 0;
    for mib in [2, 4, 8] {
        let tight = plan(&options, (fixed + workspace + mib) * 100 / 92 + 1).unwrap();
        assert!(tight.total() <= tight.usable.unwrap(), "{tight}");
        assert!(tight.sizes.blocks > last || tight.sizes.blocks == all.sizes.blocks);
        last = tight.sizes.blocks;
    }
    let few = WorkerOptions { kv_tokens: Some(100), ..options.clone() };
    assert_eq!(plan(&few, 1 << 20).unwrap().sizes.blocks, 7);
    let fault = plan(&options, 300).unwrap_err().to_string();
    for part in ["does not fit", "base weights", "training arena", "KV cache", "300.0 MiB"] {
        assert!(fault.contains(part), "{part} in {fault}");
    }
    println!("{fault}");
}
