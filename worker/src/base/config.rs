//! What a base's `config.json` and `generation_config.json` say, checked and in our own terms.
//!
//! Both spellings of transformers are read: `rope_theta` + `rope_scaling` and `rope_parameters`,
//! `torch_dtype` and `dtype`. Whatever would need code the model does not have is refused here.

use kernels::HeadShape;
use serde_json::Value;

use super::dims::ModuleDims;
use super::error::BaseError;
use super::json::{FieldError, Fields, object};
use super::rope::RopeConfig;

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";

/// Largest hidden or head-row width. The limits keep every product of sizes, rank 256 included,
/// inside i32 where device tables hold it; the largest known bases stay below a quarter of each.
pub(super) const WIDTH_LIMIT: usize = 1 << 16;
/// Largest feed-forward width.
pub(super) const FFN_LIMIT: usize = 1 << 18;
/// Most layers.
pub(super) const LAYER_LIMIT: usize = 512;
/// Largest vocabulary.
const VOCAB_LIMIT: usize = 1 << 22;
/// Longest context, in tokens.
const CONTEXT_LIMIT: usize = 1 << 24;

/// Decoder families. They differ only in the switches of [`BaseConfig`]; the name is for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3.x.
    Llama,
    /// Mistral without a sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// Qwen3, dense.
    Qwen3,
}

/// A base model's architecture.
#[derive(Clone, Debug, PartialEq)]
pub struct BaseConfig {
    /// Family by `architectures`.
    pub family: Family,
    /// Hidden width (H).
    pub hidden: usize,
    /// Layers (L).
    pub layers: usize,
    /// Attention heads.
    pub heads: HeadShape,
    /// Feed-forward width (F).
    pub ffn: usize,
    /// Vocabulary (V): rows of the embedding.
    pub vocab: usize,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_eps: f64,
    /// Whether the output head is the embedding.
    pub tied_embeddings: bool,
    /// Whether query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Whether the files may hold `o_proj.bias`, which must then be zero throughout.
    pub o_bias: bool,
    /// Whether query and key heads are normed (Qwen3).
    pub qk_norm: bool,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Tokens that end an answer, ascending: those of both files.
    pub end_tokens: Vec<u32>,
}

impl BaseConfig {
    /// Reads `config.json` and, where there is one, `generation_config.json`. Errors name the
    /// file, the field and its value.
    pub fn parse(config: &[u8], generation: Option<&[u8]>) -> Result<Self, BaseError> {
        let in_config = |fault| BaseError::Field { file: CONFIG, fault };
        let in_generation = |fault| BaseError::Field { file: GENERATION, fault };
        let map = object(config).map_err(in_config)?;
        let mut parsed = read(Fields::new(&map)).map_err(in_config)?;
        if let Some(text) = generation {
            let map = object(text).map_err(in_generation)?;
            let ends = end_tokens(Fields::new(&map), parsed.vocab).map_err(in_generation)?;
            parsed.end_tokens.extend(ends);
        }
        parsed.end_tokens.sort_unstable();
        parsed.end_tokens.dedup();
        Ok(parsed)
    }

    /// Sizes of the linear modules.
    pub fn dims(&self) -> ModuleDims {
        ModuleDims { layers: self.layers, hidden: self.hidden, heads: self.heads, ffn: self.ffn }
    }
}

fn read(fields: Fields<'_>) -> Result<BaseConfig, FieldError> {
    let family = family(fields)?;
    refuse_unsupported(fields)?;
    let hidden = fields.need_count("hidden_size", WIDTH_LIMIT)?;
    let layers = fields.need_count("num_hidden_layers", LAYER_LIMIT)?;
    let context = fields.need_count("max_position_embeddings", CONTEXT_LIMIT)?;
    refuse_sliding_window(fields, family, context)?;
    let attention_bias = fields.flag("attention_bias")?;
    let biased = attention_bias && matches!(family, Family::Llama | Family::Qwen3);
    Ok(BaseConfig {
        family,
        hidden,
        layers,
        heads: heads(fields, family, hidden)?,
        ffn: fields.need_count("intermediate_size", FFN_LIMIT)?,
        vocab: fields.need_count("vocab_size", VOCAB_LIMIT)?,
        context,
        rms_eps: fields.positive("rms_norm_eps")?.unwrap_or(1e-6),
        tied_embeddings: fields.flag("tie_word_embeddings")?,
        qkv_bias: family == Family::Qwen2 || biased,
        o_bias: biased,
        qk_norm: family == Family::Qwen3,
        rope: RopeConfig::read(fields, context)?,
        end_tokens: end_tokens(fields, fields.need_count("vocab_size", VOCAB_LIMIT)?)?,
    })
}

fn family(fields: Fields<'_>) -> Result<Family, FieldError> {
    const SUPPORTED: &str = "supported are LlamaForCausalLM, MistralForCausalLM, \
                             Qwen2ForCausalLM and Qwen3ForCausalLM";
    let name = match fields.get("architectures") {
        Some(Value::Array(list)) if list.len() == 1 => list[0].as_str(),
        None => match fields.text("model_type")? {
            Some("llama") => Some("LlamaForCausalLM"),
            Some("mistral") => Some("MistralForCausalLM"),
            Some("qwen2") => Some("Qwen2ForCausalLM"),
            Some("qwen3") => Some("Qwen3ForCausalLM"),
            Some(_) => return Err(fields.fault("model_type", SUPPORTED)),
            None => None,
        },
        Some(_) => None,
    };
    match name {
        Some("LlamaForCausalLM") => Ok(Family::Llama),
        Some("MistralForCausalLM") => Ok(Family::Mistral),
        Some("Qwen2ForCausalLM") => Ok(Family::Qwen2),
        Some("Qwen3ForCausalLM") => Ok(Family::Qwen3),
        _ => Err(fields.fault("architectures", SUPPORTED)),
    }
}

fn heads(fields: Fields<'_>, family: Family, hidden: usize) -> Result<HeadShape, FieldError> {
    let q_heads = fields.need_count("num_attention_heads", WIDTH_LIMIT)?;
    let kv_heads = fields.count("num_key_value_heads", WIDTH_LIMIT)?;
    // A missing count means what transformers' class of that family takes.
    let kv_heads = kv_heads.unwrap_or(match family {
        Family::Mistral => 8,
        Family::Llama | Family::Qwen2 | Family::Qwen3 => q_heads,
    });
    if !q_heads.is_multiple_of(kv_heads) {
        let reason = format!("it must divide the {q_heads} query heads");
        return Err(fields.fault("num_key_value_heads", &reason));
    }
    let head_dim = match fields.count("head_dim", WIDTH_LIMIT)? {
        Some(dim) => dim,
        None if family == Family::Qwen3 => 128,
        None if hidden.is_multiple_of(q_heads) => hidden / q_heads,
        None => {
            let reason = format!("without head_dim it must divide hidden_size {hidden}");
            return Err(fields.fault("num_attention_heads", &reason));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(fields.fault("head_dim", "an even head dimension is needed"));
    }
    if q_heads * head_dim > WIDTH_LIMIT {
        let reason = format!("heads times head dimension may not exceed {WIDTH_LIMIT}");
        return Err(fields.fault("num_attention_heads", &reason));
    }
    Ok(HeadShape { q_heads, kv_heads, head_dim })
}

fn refuse_unsupported(fields: Fields<'_>) -> Result<(), FieldError> {
    for name in ["hidden_act", "hidden_activation"] {
        if !matches!(fields.text(name)?, None | Some("silu" | "swish")) {
            return Err(fields.fault(name, "only silu is supported"));
        }
    }
    for name in ["torch_dtype", "dtype"] {
        if !matches!(fields.text(name)?, None | Some("float32" | "bfloat16" | "float16")) {
            return Err(fields.fault(name, "only float32, bfloat16 and float16 are supported"));
        }
    }
    fields.refuse_set("mlp_bias", "a feed-forward bias is not supported")?;
    fields.refuse_set("quantization_config", "quantised weights are not supported")?;
    if fields.positive("partial_rotary_factor")?.is_some_and(|part| part != 1.0) {
        return Err(fields.fault("partial_rotary_factor", "only whole heads are rotated"));
    }
    Ok(())
}

/// A window at least as long as the context never cuts anything and is accepted.
fn refuse_sliding_window(
    fields: Fields<'_>,
    family: Family,
    context: usize,
) -> Result<(), FieldError> {
    const REASON: &str = "sliding-window attention is not supported";
    let window = fields.count("sliding_window", CONTEXT_LIMIT)?;
    match family {
        Family::Llama => {}
        Family::Mistral => {
            // transformers takes 4096 where the field is left out, and null as none.
            let left_out = !fields.contains("sliding_window");
            let window = if left_out { Some(4096) } else { window };
            if window.is_some_and(|window| window < context) {
                return Err(fields.fault("sliding_window", REASON));
            }
        }
        Family::Qwen2 | Family::Qwen3 => {
            if fields.flag("use_sliding_window")? {
                return Err(fields.fault("use_sliding_window", REASON));
            }
        }
    }
    if let Some(Value::Array(kinds)) = fields.get("layer_types")
        && kinds.iter().any(|kind| kind.as_str() != Some("full_attention"))
    {
        return Err(fields.fault("layer_types", "only full_attention is supported"));
    }
    Ok(())
}

fn end_tokens(fields: Fields<'_>, vocab: usize) -> Result<Vec<u32>, FieldError> {
    const NAME: &str = "eos_token_id";
    let one = |value: &Value| {
        let id = value.as_u64().filter(|id| *id < vocab as u64);
        let reason = format!("a token id below {vocab}, or a list of them, is needed");
        id.map(|id| id as u32).ok_or_else(|| fields.fault(NAME, &reason))
    };
    match fields.get(NAME) {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(one).collect(),
        Some(value) => Ok(vec![one(value)?]),
    }
}
