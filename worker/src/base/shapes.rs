//! Shapes of well-known bases, for measurements on random weights: no file is needed.

use super::config::{BaseConfig, Family};
use super::rope::{RopeConfig, RopeScaling};
use kernels::HeadShape;

/// Names that [`BaseConfig::of_shape`] knows.
pub const SHAPES: [&str; 5] = ["llama3-8b", "llama3.2-1b", "qwen2.5-7b", "qwen3-8b", "tiny"];

impl BaseConfig {
    /// The configuration that is published under `name`: Meta-Llama-3-8B, Llama-3.2-1B,
    /// Qwen2.5-7B-Instruct, Qwen3-8B; or a tiny one for trials.
    pub fn of_shape(name: &str) -> Option<Self> {
        match name {
            "llama3-8b" => Some(llama3_8b()),
            "llama3.2-1b" => Some(llama32_1b()),
            "qwen2.5-7b" => Some(qwen25_7b()),
            "qwen3-8b" => Some(qwen3_8b()),
            "tiny" => Some(tiny()),
            _ => None,
        }
    }
}

fn plain(theta: f64) -> RopeConfig {
    RopeConfig { theta, scaling: RopeScaling::None }
}

fn llama3_8b() -> BaseConfig {
    BaseConfig {
        family: Family::Llama,
        hidden: 4096,
        layers: 32,
        heads: HeadShape { q_heads: 32, kv_heads: 8, head_dim: 128 },
        ffn: 14_336,
        vocab: 128_256,
        context: 8192,
        rms_eps: 1e-5,
        tied_embeddings: false,
        qkv_bias: false,
        o_bias: false,
        qk_norm: false,
        rope: plain(500_000.0),
        end_tokens: vec![128_001],
    }
}

fn llama32_1b() -> BaseConfig {
    let scaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192,
    };
    BaseConfig {
        hidden: 2048,
        layers: 16,
        heads: HeadShape { q_heads: 32, kv_heads: 8, head_dim: 64 },
        ffn: 8192,
        context: 131_072,
        tied_embeddings: true,
        rope: RopeConfig { theta: 500_000.0, scaling },
        ..llama3_8b()
    }
}

fn qwen25_7b() -> BaseConfig {
    BaseConfig {
        family: Family::Qwen2,
        hidden: 3584,
        layers: 28,
        heads: HeadShape { q_heads: 28, kv_heads: 4, head_dim: 128 },
        ffn: 18_944,
        vocab: 152_064,
        context: 32_768,
        rms_eps: 1e-6,
        tied_embeddings: false,
        qkv_bias: true,
        o_bias: false,
        qk_norm: false,
        rope: plain(1_000_000.0),
        end_tokens: vec![151_643, 151_645],
    }
}

fn qwen3_8b() -> BaseConfig {
    BaseConfig {
        family: Family::Qwen3,
        hidden: 4096,
        layers: 36,
        heads: HeadShape { q_heads: 32, kv_heads: 8, head_dim: 128 },
        ffn: 12_288,
        vocab: 151_936,
        context: 40_960,
        qkv_bias: false,
        qk_norm: true,
        ..qwen25_7b()
    }
}

fn tiny() -> BaseConfig {
    BaseConfig {
        hidden: 64,
        layers: 2,
        heads: HeadShape { q_heads: 4, kv_heads: 2, head_dim: 16 },
        ffn: 160,
        vocab: 512,
        context: 2048,
        end_tokens: vec![0],
        ..llama3_8b()
    }
}
