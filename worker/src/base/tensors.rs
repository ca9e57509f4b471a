//! The table of tensors that a configuration promises: Hugging Face names and shapes.

use kernels::Module;

use super::config::BaseConfig;

/// Token embedding `(V, H)`.
pub(super) const EMBED: &str = "model.embed_tokens.weight";
/// Last norm `(H)`.
pub(super) const FINAL_NORM: &str = "model.norm.weight";
/// Output head `(V, H)`; in the files only where embeddings are not tied.
pub(super) const LM_HEAD: &str = "lm_head.weight";

/// A tensor of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LayerTensor {
    InputNorm,
    PostNorm,
    QNorm,
    KNorm,
    Weight(Module),
    Bias(Module),
}

/// Path of a module inside its layer, as in `self_attn.q_proj`.
pub(crate) fn module_path(module: Module) -> &'static str {
    match module {
        Module::Q => "self_attn.q_proj",
        Module::K => "self_attn.k_proj",
        Module::V => "self_attn.v_proj",
        Module::O => "self_attn.o_proj",
        Module::Gate => "mlp.gate_proj",
        Module::Up => "mlp.up_proj",
        Module::Down => "mlp.down_proj",
    }
}

impl LayerTensor {
    /// Its full name in layer `layer`.
    pub(super) fn name(self, layer: usize) -> String {
        match self {
            Self::InputNorm => format!("model.layers.{layer}.input_layernorm.weight"),
            Self::PostNorm => format!("model.layers.{layer}.post_attention_layernorm.weight"),
            Self::QNorm => format!("model.layers.{layer}.self_attn.q_norm.weight"),
            Self::KNorm => format!("model.layers.{layer}.self_attn.k_norm.weight"),
            Self::Weight(module) => format!("model.layers.{layer}.{}.weight", module_path(module)),
            Self::Bias(module) => format!("model.layers.{layer}.{}.bias", module_path(module)),
        }
    }

    fn shape(self, config: &BaseConfig) -> Vec<usize> {
        let dims = config.dims();
        match self {
            Self::InputNorm | Self::PostNorm => vec![config.hidden],
            Self::QNorm | Self::KNorm => vec![config.heads.head_dim],
            Self::Weight(module) => {
                let (input, output) = dims.of(module);
                vec![output, input]
            }
            Self::Bias(module) => vec![dims.of(module).1],
        }
    }
}

/// A tensor to be found in the files.
pub(super) struct Expected {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    /// May be missing; where present it must be zero throughout.
    pub(super) zero: bool,
}

/// Everything that `config` promises.
pub(super) fn expected(config: &BaseConfig) -> Vec<Expected> {
    let table = vec![config.vocab, config.hidden];
    let need = |name: String, shape| Expected { name, shape, zero: false };
    let mut all =
        vec![need(EMBED.into(), table.clone()), need(FINAL_NORM.into(), vec![config.hidden])];
    if !config.tied_embeddings {
        all.push(need(LM_HEAD.into(), table));
    }
    let mut kinds = vec![LayerTensor::InputNorm, LayerTensor::PostNorm];
    kinds.extend(Module::ALL.map(LayerTensor::Weight));
    if config.qkv_bias {
        kinds.extend([Module::Q, Module::K, Module::V].map(LayerTensor::Bias));
    }
    if config.qk_norm {
        kinds.extend([LayerTensor::QNorm, LayerTensor::KNorm]);
    }
    for layer in 0..config.layers {
        all.extend(kinds.iter().map(|kind| need(kind.name(layer), kind.shape(config))));
        if config.o_bias {
            let bias = LayerTensor::Bias(Module::O);
            let (name, shape) = (bias.name(layer), bias.shape(config));
            all.push(Expected { name, shape, zero: true });
        }
    }
    all
}

/// Whether a tensor that nobody expects may lie in the files unread: constants that old versions
/// of transformers saved, and the copy of a tied output head.
pub(super) fn ignorable(name: &str, config: &BaseConfig) -> bool {
    name.ends_with("rotary_emb.inv_freq") || (config.tied_embeddings && name == LM_HEAD)
}
