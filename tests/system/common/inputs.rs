//! What tests serve and train: a tiny base, training files, chats.

use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// A two-layer base with random weights and the demo base's tokenizer.
pub fn tiny_base(folder: &Path) -> PathBuf {
    let base = folder.join("tiny");
    std::fs::create_dir_all(&base).unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/base");
    for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        std::fs::copy(demo.join(file), base.join(file)).unwrap();
    }
    std::fs::copy(demo.join("generation_config.json"), base.join("generation_config.json"))
        .unwrap();
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(demo.join("config.json")).unwrap()).unwrap();
    let (hidden, ffn, layers, vocab) = (32, 64, 2, 4096);
    let sizes = [
        ("hidden_size", hidden),
        ("intermediate_size", ffn),
        ("num_hidden_layers", layers),
        ("num_attention_heads", 2),
        ("num_key_value_heads", 1),
        ("head_dim", 16),
    ];
    for (field, value) in sizes {
        config[field] = json!(value);
    }
    std::fs::write(base.join("config.json"), config.to_string()).unwrap();
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    for layer in 0..layers {
        let shapes = [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![32, hidden]),
            ("self_attn.k_proj", vec![16, hidden]),
            ("self_attn.v_proj", vec![16, hidden]),
            ("self_attn.o_proj", vec![hidden, 32]),
            ("mlp.gate_proj", vec![ffn, hidden]),
            ("mlp.up_proj", vec![ffn, hidden]),
            ("mlp.down_proj", vec![hidden, ffn]),
        ];
        for (name, shape) in shapes {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    std::fs::write(base.join("model.safetensors"), safetensors_of(&tensors)).unwrap();
    base
}

/// Random f32 tensors; norms are ones.
fn safetensors_of(tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
    let (mut header, mut bytes) = (serde_json::Map::new(), Vec::new());
    let mut state = 1_u64;
    for (name, shape) in tensors {
        let start = bytes.len();
        for _ in 0..shape.iter().product::<usize>() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let uniform = (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5;
            let value = if shape.len() == 1 { 1.0 } else { uniform * 0.3 };
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, bytes.len()]});
        header.insert(name.clone(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(bytes);
    file
}

/// A chat training file of `n` short examples.
pub fn chat_file(n: usize) -> String {
    let line = |i: usize| {
        let question = format!("What is {i} and {}?", i % 7);
        let answer = format!("It is {}.", i + i % 7);
        let messages = json!([
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]);
        json!({"messages": messages}).to_string() + "\n"
    };
    (0..n).map(line).collect()
}

/// A greedy chat request for exactly so many tokens.
pub fn chat(model: &str, tokens: usize) -> Value {
    json!({
        "model": model,
        "messages": [{"role": "user", "content": "What is 3 and 4?"}],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": true,
    })
}
