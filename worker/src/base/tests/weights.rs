//! Fused device weights against the tensors of the files.

use kernels::{Cpu, Device, In};

use super::{BASES, golden};
use crate::base::files::Elements;
use crate::base::{BaseFiles, BaseWeights};

fn values(device: &Cpu<f32>, buffer: &<Cpu<f32> as Device>::Act) -> Vec<f32> {
    device.download_act(In::all(buffer)).unwrap().wait().unwrap()
}

fn tensor(files: &BaseFiles, name: &str) -> Vec<f32> {
    match files.elements(name).unwrap() {
        Elements::Bf16(values) => values.iter().map(|value| value.to_f32()).collect(),
        Elements::F32(values) => values.to_vec(),
    }
}

fn layer_tensors(files: &BaseFiles, layer: usize, names: &[&str]) -> Vec<f32> {
    names.iter().flat_map(|name| tensor(files, &format!("model.layers.{layer}.{name}"))).collect()
}

#[test]
fn every_golden_base_loads_fused() {
    let device = Cpu::<f32>::new(1).unwrap();
    for name in BASES {
        let files = BaseFiles::open(&golden(&format!("bases/{name}")));
        let files = files.unwrap();
        let config = files.config();
        let weights = BaseWeights::load(&device, &files, 16).unwrap();
        assert_eq!(weights.layers.len(), config.layers);
        assert_eq!(weights.lm_head.is_none(), config.tied_embeddings);
        assert_eq!(values(&device, &weights.embed), tensor(&files, "model.embed_tokens.weight"));
        assert_eq!(values(&device, weights.head()).len(), config.vocab * config.hidden);
        let rope = device.download_wide(In::all(&weights.rope_cos)).unwrap().wait().unwrap();
        assert_eq!(rope, config.rope.tables(config.heads.head_dim, 16).cos);
        for (index, layer) in weights.layers.iter().enumerate() {
            let fused = |names: &[&str]| layer_tensors(&files, index, names);
            let qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
            let parts = qkv.map(|part| format!("{part}.weight"));
            let expected = fused(&parts.each_ref().map(String::as_str));
            assert_eq!(values(&device, &layer.qkv), expected);
            assert_eq!(expected.len(), config.heads.qkv_width() * config.hidden);
            let gate_up = fused(&["mlp.gate_proj.weight", "mlp.up_proj.weight"]);
            assert_eq!(values(&device, &layer.gate_up), gate_up);
            assert_eq!(values(&device, &layer.down), fused(&["mlp.down_proj.weight"]));
            assert_eq!(values(&device, &layer.o), fused(&["self_attn.o_proj.weight"]));
            let post_norm = fused(&["post_attention_layernorm.weight"]);
            assert_eq!(values(&device, &layer.post_norm), post_norm);
            let bias = layer.qkv_bias.as_ref().map(|bias| values(&device, bias));
            let parts = qkv.map(|part| format!("{part}.bias"));
            let parts = parts.each_ref().map(String::as_str);
            assert_eq!(bias, config.qkv_bias.then(|| fused(&parts)));
            let norm = layer.k_norm.as_ref().map(|norm| values(&device, norm));
            assert_eq!(norm, config.qk_norm.then(|| fused(&["self_attn.k_norm.weight"])));
        }
    }
}
