//! A base of random weights, made on the device: speed does not depend on what weights hold.

use kernels::{Device, Out, Result};

use super::config::BaseConfig;
use super::weights::{BaseWeights, LayerWeights, rope_tables};

/// Matrices and biases are uniform within this bound: a standard deviation of 0.02, as bases are
/// initialised.
const BOUND: f32 = 0.034_641_016;

/// Makes one tensor after another, each from a seed of its own.
struct Maker<'a, D: Device> {
    device: &'a D,
    seed: u64,
}

impl<D: Device> BaseWeights<D> {
    /// Random weights of these shapes, a pure function of `seed`; norms are one.
    pub fn random(
        device: &D,
        config: &BaseConfig,
        seed: u64,
        max_positions: usize,
    ) -> Result<Self> {
        let [rope_cos, rope_sin] = rope_tables(device, config, max_positions)?;
        let mut make = Maker { device, seed };
        let table = config.vocab * config.hidden;
        Ok(Self {
            embed: make.matrix(table)?,
            lm_head: if config.tied_embeddings { None } else { Some(make.matrix(table)?) },
            final_norm: make.ones(config.hidden)?,
            layers: (0..config.layers).map(|_| make.layer(config)).collect::<Result<_>>()?,
            rope_cos,
            rope_sin,
        })
    }
}

impl<D: Device> Maker<'_, D> {
    fn matrix(&mut self, len: usize) -> Result<D::Act> {
        let mut buffer = self.device.alloc_act(len)?;
        self.seed = self.seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        self.device.fill_uniform(Out::all(&mut buffer), self.seed, BOUND)?;
        Ok(buffer)
    }

    fn ones(&self, len: usize) -> Result<D::Act> {
        let mut buffer = self.device.alloc_act(len)?;
        self.device.fill_act(Out::all(&mut buffer), 1.0)?;
        Ok(buffer)
    }

    fn layer(&mut self, config: &BaseConfig) -> Result<LayerWeights<D>> {
        let (hidden, ffn, heads) = (config.hidden, config.ffn, config.heads);
        let head_norm = |make: &Self| make.ones(heads.head_dim);
        Ok(LayerWeights {
            input_norm: self.ones(hidden)?,
            qkv: self.matrix(heads.qkv_width() * hidden)?,
            qkv_bias: if config.qkv_bias { Some(self.matrix(heads.qkv_width())?) } else { None },
            q_norm: if config.qk_norm { Some(head_norm(self)?) } else { None },
            k_norm: if config.qk_norm { Some(head_norm(self)?) } else { None },
            o: self.matrix(hidden * heads.q_width())?,
            post_norm: self.ones(hidden)?,
            gate_up: self.matrix(2 * ffn * hidden)?,
            down: self.matrix(hidden * ffn)?,
        })
    }
}
