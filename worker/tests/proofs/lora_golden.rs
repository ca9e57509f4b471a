//! Adapters against PEFT: logits, every gradient, and twenty AdamW steps of training.

use crate::common::reading::read;
use crate::common::training::{item, micro_batch, update};
use crate::common::{
    Adapter, Expected, golden, gradients, largest_difference, model, place, relative_difference,
    sizes,
};
use kernels::tables::PAGE;
use kernels::{AdamW, Cpu, Module};
use serde_json::Value;
use std::sync::Arc;
use worker::adapters::{AdapterLayout, Part, TensorSpot, peft};
use worker::model::Model;
use worker::train::{Item, Kind, Sequence};

const ADAPTERS: [&str; 3] = ["all-linear", "qv", "rslora"];

/// One golden adapter on its base.
struct Case {
    name: &'static str,
    expected: Expected,
    run: Value,
    adapter: Adapter,
    model: Model<Cpu<f32>>,
}

impl Case {
    fn open(name: &'static str) -> Self {
        let run = std::fs::read(golden(&format!("adapters/{name}/run.json"))).unwrap();
        let run: Value = serde_json::from_slice(&run).unwrap();
        let mut model = model(run["base"].as_str().unwrap(), 1, sizes());
        let adapter = read_adapter(&model, &format!("adapters/{name}"));
        place(&mut model, 2, 1, &adapter);
        let expected = Expected::open(&format!("adapters/{name}/expected.safetensors"));
        Self { name, expected, run, adapter, model }
    }

    fn example(&self, index: u64) -> Sequence {
        let tokens = self.expected.ints(&format!("example.{index}.ids"));
        let trained = self.expected.ints(&format!("example.{index}.trained"));
        Sequence { tokens, trained: trained.into_iter().map(|flag| flag == 1).collect() }
    }

    fn logits(&mut self) -> Vec<f32> {
        let rank = self.adapter.rank();
        read(&mut self.model, &self.expected.ints("ids"), Some((2, rank)), &[20, 1])
    }

    /// Runs examples as one micro-batch; their summed losses.
    fn train(&mut self, examples: &[Sequence]) -> Vec<f64> {
        let labels: usize = examples.iter().map(Sequence::labels).sum();
        let item = item(0, 2, self.adapter.rank(), 1.0 / labels as f32);
        let items: Vec<(Item, &Sequence)> =
            examples.iter().map(|example| (item.clone(), example)).collect();
        let results = micro_batch(&mut self.model, Kind::Train, items, 19);
        results.iter().map(|result| result.loss).collect()
    }
}

fn read_adapter(model: &Model<Cpu<f32>>, folder: &str) -> Adapter {
    let file = |name: &str| std::fs::read(golden(folder).join(name)).unwrap();
    let (config, weights) = (file("adapter_config.json"), file("adapter_model.safetensors"));
    let dims = model.config.dims();
    let read = peft::read(&config, &weights, &dims, "base").unwrap();
    let layout = Arc::new(AdapterLayout::new(&dims, &read.shape));
    Adapter { layout, values: Arc::new(read.values) }
}

fn gradient_key(spot: &TensorSpot) -> String {
    let part = if spot.part == Part::A { "lora_A" } else { "lora_B" };
    let path = match spot.module {
        Module::Q | Module::K | Module::V | Module::O => "self_attn",
        Module::Gate | Module::Up | Module::Down => "mlp",
    };
    let name = worker::adapters::layout::module_name(spot.module);
    let layer = spot.layer;
    format!("grad.base_model.model.model.layers.{layer}.{path}.{name}.{part}.weight")
}

#[test]
fn adapter_logits_are_those_of_peft() {
    for name in ADAPTERS {
        let mut case = Case::open(name);
        let found = case.logits();
        let expected = case.expected.floats("logits");
        let difference = largest_difference(&found, &expected);
        assert!(difference <= 1e-4, "{name}: {difference}");
        assert!(relative_difference(&found, &expected) <= 1e-4, "{name}");
    }
}

#[test]
fn every_gradient_is_that_of_peft() {
    for name in ADAPTERS {
        let mut case = Case::open(name);
        let examples = [0, 1, 2].map(|index| case.example(index));
        let labels: usize = examples.iter().map(Sequence::labels).sum();
        assert_eq!(vec![labels as u32], case.expected.ints("trained_tokens"));
        let losses: Vec<f32> = case.train(&examples).iter().map(|loss| *loss as f32).collect();
        let difference = relative_difference(&losses, &case.expected.floats("loss_sums"));
        assert!(difference <= 1e-4, "{name}: losses differ by {difference}");
        let found = gradients(&case.model, 1, &case.adapter);
        for spot in case.adapter.layout.tensors() {
            let key = gradient_key(&spot);
            let expected = case.expected.floats(&key);
            let found = &found[spot.offset..spot.offset + spot.len()];
            let difference = relative_difference(found, &expected);
            assert!(difference <= 1e-4, "{name}: {key} differs by {difference}");
        }
    }
}

#[test]
fn twenty_steps_of_training_are_those_of_peft() {
    for name in ADAPTERS {
        let mut case = Case::open(name);
        let number = |field: &str| case.run[field].as_f64().unwrap();
        let mut step = AdamW {
            learning_rate: 0.0,
            beta1: number("adam_beta1"),
            beta2: number("adam_beta2"),
            eps: number("adam_eps"),
            weight_decay: number("weight_decay"),
            max_grad_norm: number("max_grad_norm"),
            step: 0,
        };
        let records = case.run["records"].as_array().unwrap().clone();
        assert_eq!(records.len(), 20);
        for record in records {
            let indices = record["examples"].as_array().unwrap();
            let examples: Vec<Sequence> =
                indices.iter().map(|index| case.example(index.as_u64().unwrap())).collect();
            let labels: usize = examples.iter().map(Sequence::labels).sum();
            let loss = case.train(&examples).iter().sum::<f64>() / labels as f64;
            step.step += 1;
            step.learning_rate = record["learning_rate"].as_f64().unwrap();
            update(&mut case.model, case.adapter.layout.len(), step);
            let norm = f64::from(case.model.train.norm[0]);
            for (found, field) in [(loss, "loss"), (norm, "grad_norm")] {
                let expected = record[field].as_f64().unwrap();
                let difference = (found - expected).abs() / expected.abs();
                let at = step.step;
                assert!(difference <= 1e-4, "{}: {field} of step {at}: {difference}", case.name);
            }
        }
        let trained = read_adapter(&case.model, &format!("adapters/{name}/trained"));
        let found = &case.model.train.params[PAGE..][..case.adapter.layout.len()];
        for spot in case.adapter.layout.tensors() {
            let range = spot.offset..spot.offset + spot.len();
            let difference = relative_difference(&found[range.clone()], &trained.values[range]);
            assert!(difference <= 1e-4, "{name}: trained {spot:?} differs by {difference}");
        }
        let difference =
            relative_difference(&case.logits(), &case.expected.floats("trained_logits"));
        assert!(difference <= 1e-4, "{name}: trained logits differ by {difference}");
    }
}
