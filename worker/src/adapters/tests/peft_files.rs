//! PEFT files read, written and read again.

use half::{bf16, f16};
use kernels::Module;
use safetensors::tensor::Dtype;
use serde_json::Value;

use super::{ADAPTERS, dims, golden_files, read_golden, tensors, weights};
use crate::adapters::layout::{AdapterLayout, Part};
use crate::adapters::peft;
use crate::base::tests::{golden, golden_bytes};

#[test]
fn reads_what_peft_saved() {
    use Module::{Down, Gate, K, O, Q, V};
    let targets = [Module::ALL.to_vec(), vec![Q, V], vec![K, O, Gate, Down]];
    let scales = [2.0, 7.0 / 3.0, 3.0];
    for (((adapter, base), targets), scale) in ADAPTERS.into_iter().zip(targets).zip(scales) {
        let read = read_golden(adapter, base);
        assert_eq!(read.shape.targets, targets);
        assert_eq!(read.shape.scale(), scale);
        assert!(read.warnings.is_empty());
        let layout = AdapterLayout::new(&dims(base), &read.shape);
        let all = tensors(&golden_files(adapter).1);
        assert_eq!(all.len(), layout.tensors().count());
        let spot = layout.tensors().find(|spot| spot.layer == 1 && spot.part == Part::B).unwrap();
        let path = match spot.module {
            Q => "q_proj",
            K => "k_proj",
            _ => unreachable!("first targets"),
        };
        let key = format!("base_model.model.model.layers.1.self_attn.{path}.lora_B.weight");
        let bytes: &[u8] = bytemuck::cast_slice(&read.values[spot.offset..][..spot.len()]);
        assert_eq!(bytes, all[&key].2);
    }
}

#[test]
fn round_trip_keeps_every_value_and_byte() {
    for (adapter, base) in ADAPTERS {
        let first = read_golden(adapter, base);
        let layout = AdapterLayout::new(&dims(base), &first.shape);
        let name = format!("golden/{base}");
        let config = peft::write_config(&first.shape, 0.0, &name);
        let file = peft::write_weights(&layout, &first.values);
        let second = peft::read(&config, &file, &dims(base), &name).unwrap();
        assert_eq!(first, second);
        assert_eq!(file, peft::write_weights(&layout, &second.values));
        // PEFT writes the same tensors in the same order.
        assert_eq!(tensors(&file), tensors(&golden_files(adapter).1));
    }
}

/// `check_export.py` proves with PEFT that these files compute the golden logits.
#[test]
fn exports_are_kept() {
    for (adapter, base) in ADAPTERS {
        let read = read_golden(adapter, base);
        let layout = AdapterLayout::new(&dims(base), &read.shape);
        let files = [
            (
                "adapter_config.json",
                peft::write_config(&read.shape, 0.0, &format!("golden/{base}")),
            ),
            ("adapter_model.safetensors", peft::write_weights(&layout, &read.values)),
        ];
        for (name, bytes) in files {
            let path = format!("exports/{adapter}/{name}");
            if std::env::var_os("REGENERATE_GOLDEN").is_some() {
                std::fs::create_dir_all(golden(&format!("exports/{adapter}"))).unwrap();
                std::fs::write(golden(&path), &bytes).unwrap();
            }
            let kept = golden_bytes(&path) == bytes;
            assert!(kept, "{path} differs: see README.md there to regenerate");
        }
    }
}

#[test]
fn written_config_has_the_fields_of_peft() {
    let (theirs, _) = golden_files("rslora");
    let theirs: Value = serde_json::from_slice(&theirs).unwrap();
    let shape = read_golden("rslora", "qwen2").shape;
    let ours = peft::write_config(&shape, 0.0, "golden/qwen2");
    let ours: Value = serde_json::from_slice(&ours).unwrap();
    let ours = ours.as_object().unwrap();
    for (field, value) in ours {
        assert_eq!(&theirs[field], value, "{field}");
    }
    assert!(ours.keys().is_sorted());
    let fraction =
        peft::write_config(&crate::adapters::AdapterShape { alpha: 2.5, ..shape }, 0.1, "b");
    let fraction: Value = serde_json::from_slice(&fraction).unwrap();
    assert_eq!((&fraction["lora_alpha"], &fraction["lora_dropout"]), (&2.5.into(), &0.1.into()));
}

#[test]
fn half_precision_is_widened() {
    let (config, file) = golden_files("qv");
    let full = read_golden("qv", "qwen3").values;
    type Narrow = fn(f32) -> [u8; 2];
    type Widen = fn([u8; 2]) -> f32;
    let kinds: [(Dtype, Narrow, Widen); 2] = [
        (Dtype::BF16, |v| bf16::from_f32(v).to_le_bytes(), |b| bf16::from_le_bytes(b).to_f32()),
        (Dtype::F16, |v| f16::from_f32(v).to_le_bytes(), |b| f16::from_le_bytes(b).to_f32()),
    ];
    for (dtype, narrow, widen) in kinds {
        let mut all = tensors(&file);
        for (stored, _, bytes) in all.values_mut() {
            let values: Vec<f32> =
                bytes.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect();
            *bytes = values.into_iter().flat_map(narrow).collect();
            *stored = dtype;
        }
        let read = peft::read(&config, &weights(&all), &dims("qwen3"), "golden/qwen3").unwrap();
        let expected: Vec<f32> = full.iter().map(|value| widen(narrow(*value))).collect();
        assert_eq!(read.values, expected);
    }
}

#[test]
fn another_base_name_only_warns() {
    let (config, file) = golden_files("qv");
    let read = peft::read(&config, &file, &dims("qwen3"), "elsewhere").unwrap();
    let warning = "the adapter was made for base \"golden/qwen3\", here it is \"elsewhere\"";
    assert_eq!(read.warnings, [warning]);
}
