//! Base weights in device memory, fused as the model multiplies them. Never written after load.

use kernels::{Buffer, Device, Module, Out};

use super::config::BaseConfig;
use super::error::BaseError;
use super::files::{BaseFiles, Elements};
use super::tensors::{EMBED, FINAL_NORM, LM_HEAD, LayerTensor};
use crate::footprint::Footprint;

/// One decoder layer. Matrices are `(out, in)` row-major.
pub struct LayerWeights<D: Device> {
    /// Norm before attention `(H)`.
    pub input_norm: D::Act,
    /// Query, key and value projections below one another `((Q+2K)·D, H)`.
    pub qkv: D::Act,
    /// Their biases `((Q+2K)·D)`.
    pub qkv_bias: Option<D::Act>,
    /// Norm of query heads `(D)`.
    pub q_norm: Option<D::Act>,
    /// Norm of key heads `(D)`.
    pub k_norm: Option<D::Act>,
    /// Attention output projection `(H, Q·D)`.
    pub o: D::Act,
    /// Norm before the feed-forward `(H)`.
    pub post_norm: D::Act,
    /// Gate, then up projection `(2F, H)`.
    pub gate_up: D::Act,
    /// Down projection `(H, F)`.
    pub down: D::Act,
}

/// All weights of a base.
pub struct BaseWeights<D: Device> {
    /// Token embedding `(V, H)`.
    pub embed: D::Act,
    /// Output head `(V, H)`; absent: it is the embedding.
    pub lm_head: Option<D::Act>,
    /// Norm before the output head `(H)`.
    pub final_norm: D::Act,
    /// Layers, first to last.
    pub layers: Vec<LayerWeights<D>>,
    /// Cosines of positions `(max_positions, D/2)`.
    pub rope_cos: D::Wide,
    /// Sines of positions `(max_positions, D/2)`.
    pub rope_sin: D::Wide,
}

impl<D: Device> BaseWeights<D> {
    /// Copies the weights of `files` to `device`, with rotary tables for `max_positions` positions.
    pub fn load(device: &D, files: &BaseFiles, max_positions: usize) -> Result<Self, BaseError> {
        let config = files.config();
        let lm_head = match config.tied_embeddings {
            true => None,
            false => Some(load(device, files, &[LM_HEAD.into()])?),
        };
        let [rope_cos, rope_sin] = rope_tables(device, config, max_positions)?;
        Ok(Self {
            embed: load(device, files, &[EMBED.into()])?,
            lm_head,
            final_norm: load(device, files, &[FINAL_NORM.into()])?,
            layers: (0..config.layers)
                .map(|layer| LayerWeights::load(device, files, layer))
                .collect::<Result<_, _>>()?,
            rope_cos,
            rope_sin,
        })
    }

    /// What [`BaseWeights::load`] takes of the device.
    pub fn footprint(config: &BaseConfig, max_positions: usize) -> Footprint {
        let heads = config.heads;
        let tables = if config.tied_embeddings { 1 } else { 2 };
        let mut layer = config.hidden * (heads.qkv_width() + heads.q_width() + 3 * config.ffn + 2);
        if config.qkv_bias {
            layer += heads.qkv_width();
        }
        if config.qk_norm {
            layer += 2 * heads.head_dim;
        }
        let outer = config.hidden * (tables * config.vocab + 1);
        Footprint::act(outer + layer * config.layers)
            + Footprint::wide(2 * (heads.head_dim / 2) * max_positions)
    }

    /// The output head `(V, H)`, be it the embedding.
    pub fn head(&self) -> &D::Act {
        self.lm_head.as_ref().unwrap_or(&self.embed)
    }
}

impl<D: Device> LayerWeights<D> {
    fn load(device: &D, files: &BaseFiles, layer: usize) -> Result<Self, BaseError> {
        use LayerTensor::{Bias, InputNorm, KNorm, PostNorm, QNorm, Weight};
        let config = files.config();
        let fused = |parts: &[LayerTensor]| {
            let names: Vec<String> = parts.iter().map(|part| part.name(layer)).collect();
            load(device, files, &names)
        };
        let only = |wanted: bool, parts: &[LayerTensor]| wanted.then(|| fused(parts)).transpose();
        let qkv = [Module::Q, Module::K, Module::V];
        Ok(Self {
            input_norm: fused(&[InputNorm])?,
            qkv: fused(&qkv.map(Weight))?,
            qkv_bias: only(config.qkv_bias, &qkv.map(Bias))?,
            q_norm: only(config.qk_norm, &[QNorm])?,
            k_norm: only(config.qk_norm, &[KNorm])?,
            o: fused(&[Weight(Module::O)])?,
            post_norm: fused(&[PostNorm])?,
            gate_up: fused(&[Module::Gate, Module::Up].map(Weight))?,
            down: fused(&[Weight(Module::Down)])?,
        })
    }
}

/// Rotary cosines and sines of positions below `max_positions`.
pub(super) fn rope_tables<D: Device>(
    device: &D,
    config: &BaseConfig,
    max_positions: usize,
) -> kernels::Result<[D::Wide; 2]> {
    let tables = config.rope.tables(config.heads.head_dim, max_positions);
    let send = |values: &[f32]| {
        let mut buffer = device.alloc_wide(values.len())?;
        device.upload_wide(Out::all(&mut buffer), values)?;
        Ok(buffer)
    };
    Ok([send(&tables.cos)?, send(&tables.sin)?])
}

/// One buffer of the tensors `names` one after the other.
fn load<D: Device>(device: &D, files: &BaseFiles, names: &[String]) -> Result<D::Act, BaseError> {
    let parts = names.iter().map(|name| files.elements(name)).collect::<Result<Vec<_>, _>>()?;
    let mut buffer = device.alloc_act(parts.iter().map(Elements::len).sum())?;
    let mut start = 0;
    for part in &parts {
        let range = Out::range(&mut buffer, start, part.len());
        match part {
            Elements::Bf16(values) => device.upload_act_bf16(range, values)?,
            Elements::F32(values) => device.upload_act(range, values)?,
        }
        start += part.len();
    }
    debug_assert_eq!(start, buffer.len());
    Ok(buffer)
}
