//! Tests of adapter layout, first values and PEFT files.

mod init;
mod layout;
mod peft_damage;
mod peft_files;
mod peft_refused;

use std::collections::BTreeMap;

use safetensors::tensor::{Dtype, TensorView, serialize};

use super::peft::{self, PeftAdapter, PeftError};
use crate::base::safetensor::{read_entries, to_f32};
use crate::base::tests::golden_bytes;
use crate::base::{BaseConfig, ModuleDims};

/// Golden adapters and their bases.
const ADAPTERS: [(&str, &str); 3] =
    [("all-linear", "llama3"), ("qv", "qwen3"), ("rslora", "qwen2")];

fn dims(base: &str) -> ModuleDims {
    let config = golden_bytes(&format!("bases/{base}/config.json"));
    BaseConfig::parse(&config, None).unwrap().dims()
}

fn golden_files(adapter: &str) -> (Vec<u8>, Vec<u8>) {
    let file = |name: &str| golden_bytes(&format!("adapters/{adapter}/{name}"));
    (file("adapter_config.json"), file("adapter_model.safetensors"))
}

fn read_golden(adapter: &str, base: &str) -> PeftAdapter {
    let (config, weights) = golden_files(adapter);
    peft::read(&config, &weights, &dims(base), &format!("golden/{base}")).unwrap()
}

/// Tensors of a weights file, for a test to hurt.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(weights: &[u8]) -> Tensors {
    let entries = read_entries(weights).unwrap().into_iter();
    let own = |(name, entry): (String, crate::base::safetensor::Entry)| {
        let values = to_f32(&weights[entry.bytes], entry.stored.unwrap());
        (name, (Dtype::F32, entry.shape, bytemuck::cast_slice(&values).to_vec()))
    };
    entries.map(own).collect()
}

fn weights(tensors: &Tensors) -> Vec<u8> {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    serialize(views, None).unwrap()
}

/// Reads the `qv` adapter with its weights changed.
fn read_changed(change: impl FnOnce(&mut Tensors)) -> Result<PeftAdapter, PeftError> {
    let (config, file) = golden_files("qv");
    let mut all = tensors(&file);
    change(&mut all);
    peft::read(&config, &weights(&all), &dims("qwen3"), "golden/qwen3")
}
