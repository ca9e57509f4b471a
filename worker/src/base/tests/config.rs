//! Configurations of every family, in both spellings, and each refusal.

use kernels::{HeadShape, Module};
use serde_json::{Value, json};

use super::{BASES, golden_bytes};
use crate::base::{BaseConfig, Family, RopeConfig, RopeScaling};

fn parse_golden(name: &str) -> BaseConfig {
    let config = golden_bytes(&format!("bases/{name}/config.json"));
    let generation = golden_bytes(&format!("bases/{name}/generation_config.json"));
    BaseConfig::parse(&config, Some(&generation)).unwrap()
}

fn parse(config: &Value) -> Result<BaseConfig, String> {
    BaseConfig::parse(config.to_string().as_bytes(), None).map_err(|error| error.to_string())
}

/// A published Llama 3.1 configuration in the older spelling.
fn llama31() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3"
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256
    })
}

fn with(mut config: Value, field: &str, value: Value) -> Value {
    config[field] = value;
    config
}

fn without(mut config: Value, field: &str) -> Value {
    config.as_object_mut().unwrap().remove(field).unwrap();
    config
}

#[test]
fn reads_each_family_as_transformers_saves_it() {
    let configs = BASES.map(parse_golden);
    let families = configs.each_ref().map(|config| config.family);
    let heads = configs.each_ref().map(|config| config.heads);
    use Family::{Llama, Mistral, Qwen2, Qwen3};
    assert_eq!(families, [Llama, Llama, Mistral, Qwen2, Qwen3, Llama, Mistral]);
    let shape = |q_heads, kv_heads, head_dim| HeadShape { q_heads, kv_heads, head_dim };
    let expected = [
        shape(4, 4, 8),
        shape(4, 2, 16),
        shape(4, 2, 12),
        shape(4, 2, 8),
        shape(4, 2, 16),
        shape(3, 1, 10),
        shape(4, 2, 8),
    ];
    assert_eq!(heads, expected);
    let switches = |config: &BaseConfig| {
        (config.tied_embeddings, config.qkv_bias, config.o_bias, config.qk_norm)
    };
    let expected = [
        (false, false, false, false),
        (true, false, false, false),
        (false, false, false, false),
        (true, true, false, false),
        (false, false, false, true),
        (false, true, true, false),
        (false, false, false, false),
    ];
    assert_eq!(configs.each_ref().map(switches), expected);
    let ends = configs.map(|config| config.end_tokens);
    assert_eq!(ends[..5], [vec![2], vec![2, 5, 7], vec![2], vec![2, 3], vec![2]]);
}

#[test]
fn reads_both_spellings_alike() {
    let old = parse(&llama31()).unwrap();
    assert_eq!(old.layers, 32);
    assert_eq!(old.context, 131_072);
    assert_eq!(old.rms_eps, 1e-5);
    assert_eq!(old.end_tokens, [128_001, 128_008, 128_009]);
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192,
    };
    assert_eq!(old.rope, RopeConfig { theta: 500_000.0, scaling });

    let mut new = llama31();
    let fields = new.as_object_mut().unwrap();
    let mut rope = fields.remove("rope_scaling").unwrap();
    rope["rope_theta"] = fields.remove("rope_theta").unwrap();
    fields.insert("rope_parameters".into(), rope);
    let dtype = fields.remove("torch_dtype").unwrap();
    fields.insert("dtype".into(), dtype);
    assert_eq!(parse(&new).unwrap(), old);
}

#[test]
fn reads_older_and_sparser_forms() {
    let plain = without(without(llama31(), "rope_scaling"), "rope_theta");
    let rope = parse(&plain).unwrap().rope;
    assert_eq!(rope, RopeConfig { theta: 10_000.0, scaling: RopeScaling::None });
    let linear = with(llama31(), "rope_scaling", json!({"type": "linear", "factor": 4}));
    assert_eq!(parse(&linear).unwrap().rope.scaling, RopeScaling::Linear { factor: 4.0 });
    let nothing = with(llama31(), "rope_scaling", Value::Null);
    assert_eq!(parse(&nothing).unwrap().rope.scaling, RopeScaling::None);
    let mha = without(llama31(), "num_key_value_heads");
    assert_eq!(parse(&mha).unwrap().heads.kv_heads, 32);
    let by_type = without(llama31(), "architectures");
    assert_eq!(parse(&by_type).unwrap().family, Family::Llama);
    assert!(parse(&without(llama31(), "eos_token_id")).unwrap().end_tokens.is_empty());
}

#[test]
fn end_tokens_of_both_files_are_joined() {
    let generation = json!({"eos_token_id": [7, 128001]}).to_string();
    let config = llama31().to_string();
    let config = BaseConfig::parse(config.as_bytes(), Some(generation.as_bytes())).unwrap();
    assert_eq!(config.end_tokens, [7, 128_001, 128_008, 128_009]);
}

#[test]
fn module_sizes_follow_the_heads() {
    let dims = parse_golden("qwen3").dims();
    let sizes = Module::ALL.map(|module| dims.of(module));
    let expected = [(32, 64), (32, 32), (32, 32), (64, 32), (32, 56), (32, 56), (56, 32)];
    assert_eq!(sizes, expected);
}

/// Sets `field` and expects an error that starts so.
fn refuses(config: Value, field: &str, value: Value, message: &str) {
    let error = parse(&with(config, field, value)).unwrap_err();
    assert!(error.starts_with(&format!("config.json: field `{message}")), "{error}");
}

fn mistral() -> Value {
    let config = with(llama31(), "architectures", json!(["MistralForCausalLM"]));
    with(config, "sliding_window", Value::Null)
}

fn qwen(family: &str) -> Value {
    with(llama31(), "architectures", json!([family]))
}

#[test]
fn refuses_what_the_model_does_not_do() {
    for (field, value, message) in [
        ("architectures", json!(["GemmaForCausalLM"]), "architectures` is [\"GemmaForCausalLM\"]:"),
        ("architectures", json!([]), "architectures` is []:"),
        ("hidden_act", json!("gelu"), "hidden_act` is \"gelu\": only silu is supported"),
        ("torch_dtype", json!("float8_e4m3fn"), "torch_dtype` is \"float8_e4m3fn\":"),
        ("dtype", json!("int8"), "dtype` is \"int8\":"),
        ("mlp_bias", json!(true), "mlp_bias` is true:"),
        ("quantization_config", json!({"bits": 4}), "quantization_config` is {\"bits\":4}:"),
        ("partial_rotary_factor", json!(0.5), "partial_rotary_factor` is 0.5:"),
        ("layer_types", json!(["sliding_attention"]), "layer_types` is [\"sliding_attention\"]:"),
        ("rope_scaling", json!({"type": "yarn"}), "rope_scaling.type` is \"yarn\":"),
        ("rope_scaling", json!({"rope_type": "dynamic"}), "rope_scaling.rope_type` is \"dynamic\""),
        ("rope_scaling", json!({"rope_type": "linear"}), "rope_scaling.factor` is missing:"),
        ("rope_scaling", json!({"rope_type": "linear", "factor": 0.1}), "rope_scaling.factor` is"),
        ("rope_theta", json!(0), "rope_theta` is 0:"),
        ("num_key_value_heads", json!(5), "num_key_value_heads` is 5: it must divide the 32"),
        ("num_attention_heads", json!(24), "num_attention_heads` is 24: without head_dim"),
        ("head_dim", json!(7), "head_dim` is 7: an even"),
        ("head_dim", json!(65536), "num_attention_heads` is 32: heads times"),
        ("vocab_size", json!("many"), "vocab_size` is \"many\": a whole number"),
        ("num_hidden_layers", json!(0), "num_hidden_layers` is 0:"),
        ("rms_norm_eps", json!(-1.0), "rms_norm_eps` is -1.0:"),
        ("eos_token_id", json!(128256), "eos_token_id` is 128256: a token id below 128256"),
        ("tie_word_embeddings", json!("yes"), "tie_word_embeddings` is \"yes\": true or false"),
    ] {
        refuses(llama31(), field, value, message);
    }
    for field in ["hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"] {
        let error = parse(&without(llama31(), field)).unwrap_err();
        assert!(error.starts_with(&format!("config.json: field `{field}` is missing")), "{error}");
    }
}

#[test]
fn refuses_only_windows_that_cut() {
    refuses(mistral(), "sliding_window", json!(4096), "sliding_window` is 4096:");
    let left_out = parse(&without(mistral(), "sliding_window")).unwrap_err();
    assert!(left_out.contains("field `sliding_window` is missing"), "{left_out}");
    assert!(parse(&mistral()).is_ok());
    assert!(parse(&with(mistral(), "sliding_window", json!(131_072))).is_ok());
    for family in ["Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        refuses(qwen(family), "use_sliding_window", json!(true), "use_sliding_window` is true:");
        assert!(parse(&with(qwen(family), "sliding_window", json!(4096))).is_ok());
    }
}

#[test]
fn refuses_text_that_is_no_object() {
    for text in ["", "[]", "{", "nonsense"] {
        let error = BaseConfig::parse(text.as_bytes(), None).unwrap_err().to_string();
        assert!(error.starts_with("config.json: is not"), "{error}");
    }
    let config = llama31().to_string();
    let error = BaseConfig::parse(config.as_bytes(), Some(b"{\"eos_token_id\": -1}")).unwrap_err();
    assert!(error.to_string().starts_with("generation_config.json: field `eos_token_id` is -1"));
}
