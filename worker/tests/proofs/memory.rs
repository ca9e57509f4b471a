//! The memory plan against what a model really takes.

use crate::common::{BASES, base_files, sizes};
use kernels::{Cpu, Memory};
use worker::WorkerOptions;
use worker::base::{BaseConfig, BaseWeights, SHAPES};
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

#[test]
fn random_bases_take_what_is_planned_and_repeat() {
    for shape in SHAPES {
        let config = BaseConfig::of_shape(shape).unwrap();
        let heads = config.heads;
        let footprint = BaseWeights::<Cpu<f32>>::footprint(&config, 16);
        let tables = config.vocab * config.hidden * if config.tied_embeddings { 1 } else { 2 };
        assert!(footprint.act > tables && heads.q_heads.is_multiple_of(heads.kv_heads));
    }
    let parameters = |shape| {
        let config = BaseConfig::of_shape(shape).unwrap();
        BaseWeights::<Cpu<f32>>::footprint(&config, 0).act
    };
    assert_eq!(parameters("llama3-8b"), 8_030_261_248);
    assert_eq!(parameters("llama3.2-1b"), 1_235_814_400);
    assert_eq!(parameters("qwen2.5-7b"), 7_615_616_512);
    assert_eq!(parameters("qwen3-8b"), 8_190_735_360);

    for qk_norm in [false, true] {
        let config = BaseConfig { qk_norm, ..BaseConfig::of_shape("tiny").unwrap() };
        let device = Cpu::<f32>::new(1).unwrap();
        let one = BaseWeights::random(&device, &config, 7, 40).unwrap();
        let footprint = BaseWeights::<Cpu<f32>>::footprint(&config, 40);
        assert_eq!(device.taken(), [footprint.act, footprint.wide, footprint.int]);
        let other = BaseWeights::random(&device, &config, 7, 40).unwrap();
        assert!(one.layers[1].down == other.layers[1].down && one.embed == other.embed);
        assert!(one.layers[0].o != one.layers[1].o && one.final_norm.iter().all(|w| *w == 1.0));
    }
}
