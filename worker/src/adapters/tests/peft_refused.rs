//! Every refusal of PEFT files, by field or key.

use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use super::{dims, golden_files, read_changed};
use crate::adapters::peft;

const A: &str = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight";
const B: &str = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight";

fn read_with(field: &str, value: Value) -> Result<(), String> {
    let (config, weights) = golden_files("qv");
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config[field] = value;
    let read = peft::read(config.to_string().as_bytes(), &weights, &dims("qwen3"), "b");
    read.map(|_| ()).map_err(|error| error.to_string())
}

#[test]
fn refuses_fields_that_change_what_is_computed() {
    for (field, value) in [
        ("peft_type", json!("IA3")),
        ("peft_type", Value::Null),
        ("task_type", json!("SEQ_CLS")),
        ("bias", json!("lora_only")),
        ("use_dora", json!(true)),
        ("use_qalora", json!(true)),
        ("use_bdlora", json!({"a": 1})),
        ("lora_bias", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("rank_pattern", json!({"q_proj": 8})),
        ("alpha_pattern", json!({"q_proj": 8})),
        ("modules_to_save", json!(["lm_head"])),
        ("layers_pattern", json!("blocks")),
        ("layers_to_transform", json!([0, 2])),
        ("layers_to_transform", json!(0)),
        ("layer_replication", json!([[0, 2]])),
        ("trainable_token_indices", json!([1])),
        ("target_parameters", json!(["mlp.experts"])),
        ("alora_invocation_tokens", json!([1, 2])),
        ("megatron_config", json!({"a": 1})),
        ("init_lora_weights", json!("pissa")),
        ("init_lora_weights", json!("loftq")),
        ("r", json!(0)),
        ("r", json!(257)),
        ("r", json!(3.5)),
        ("lora_alpha", json!(0)),
        ("lora_alpha", json!("8")),
        ("use_rslora", json!("no")),
        ("target_modules", json!(7)),
        ("target_modules", json!(["q_proj", "v_proj", "o_proj"])),
        ("target_modules", json!(["q_proj"])),
    ] {
        let error = read_with(field, value).unwrap_err();
        let start = format!("adapter_config.json: field `{field}` ");
        assert!(error.starts_with(&start), "{error}");
    }
}

#[test]
fn accepts_fields_that_do_not_matter() {
    for (field, value) in [
        ("task_type", Value::Null),
        ("layers_to_transform", json!([2, 1, 0])),
        ("init_lora_weights", json!("gaussian")),
        ("init_lora_weights", json!(false)),
        ("target_modules", json!("all-linear")),
        ("target_modules", json!(".*\\.(q|v)_proj")),
        ("target_modules", json!(["self_attn.q_proj", "layers.0.self_attn.v_proj"])),
        ("exclude_modules", json!(["lm_head"])),
        ("lora_dropout", json!(0.1)),
        ("megatron_core", json!("megatron.core")),
        ("some_later_field", json!({"a": 1})),
    ] {
        assert_eq!(read_with(field, value), Ok(()), "{field}");
    }
}

#[test]
fn refuses_a_rank_that_the_weights_do_not_have() {
    let error = read_with("r", json!(4)).unwrap_err();
    let key = A.replace("layers.1", "layers.0");
    assert_eq!(
        error,
        format!("adapter_model.safetensors: key `{key}` has rank 3, adapter_config.json says 4")
    );
}

fn key_error(change: impl FnOnce(&mut super::Tensors)) -> String {
    let error = read_changed(change).unwrap_err().to_string();
    let start = "adapter_model.safetensors: key ";
    error.strip_prefix(start).unwrap_or_else(|| panic!("{error}")).to_owned()
}

#[test]
fn refuses_keys_it_does_not_know() {
    for key in [
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.+1.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.99999999999999999999.mlp.up_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ] {
        let error = key_error(|all| {
            all.insert(key.into(), (Dtype::F32, vec![1], vec![0; 4]));
        });
        assert!(error.starts_with(&format!("`{key}` is not supported")), "{error}");
    }
    let beyond = A.replace("layers.1", "layers.3");
    let error = key_error(|all| drop(all.insert(beyond.clone(), all[A].clone())));
    assert_eq!(error, format!("`{beyond}` is beyond the base's 3 layers"));
}

#[test]
fn refuses_missing_matrices() {
    for key in [A, B] {
        let error = key_error(|all| drop(all.remove(key)));
        assert!(error.starts_with(&format!("`{key}` is missing")), "{error}");
    }
    let layer = |key: &String| key.contains("layers.2.");
    let error = key_error(|all| all.retain(|key, _| !layer(key)));
    assert!(error.contains("layers.2.self_attn.q_proj.lora_A.weight` is missing"), "{error}");
    let error = read_changed(|all| all.clear()).unwrap_err().to_string();
    assert_eq!(error, "adapter_model.safetensors: holds no tensor");
}

#[test]
fn refuses_wrong_shapes_types_and_values() {
    let change = |key: &'static str, shape: Vec<usize>| {
        key_error(move |all| {
            let length = 4 * shape.iter().product::<usize>();
            all.insert(key.into(), (Dtype::F32, shape, vec![0; length]));
        })
    };
    let error = change(A, vec![3, 31]);
    assert_eq!(error, format!("`{A}` has shape [3, 31], the base needs [3, 32]"));
    let error = change(B, vec![64, 5]);
    assert_eq!(error, format!("`{B}` has rank 5, adapter_config.json says 3"));
    assert!(change(A, vec![96]).contains("has shape [96]"));
    assert!(change(A, vec![0, 32]).contains("has rank 0"));
    let error = key_error(|all| all.get_mut(A).unwrap().0 = Dtype::I32);
    assert!(error.starts_with(&format!("`{A}` is stored as I32")), "{error}");
    for (value, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let error = key_error(|all| {
            all.get_mut(A).unwrap().2[20..24].copy_from_slice(&value.to_le_bytes());
        });
        assert_eq!(error, format!("`{A}` holds {name} at element 5"));
    }
}
