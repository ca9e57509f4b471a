//! Which linear modules share an input: the four SMLM groups of a layer.

use crate::base::BaseConfig;
use kernels::{GroupModule, Module};

/// One group's modules with their columns, and its widths.
#[derive(Clone, Debug)]
pub struct Group {
    /// Modules in column order.
    pub modules: Vec<GroupModule>,
    /// Width of the shared input.
    pub input: usize,
    /// Width of the fused output.
    pub width: usize,
}

impl Group {
    fn new(input: usize, parts: &[(Module, usize)]) -> Self {
        let mut column = 0;
        let mut modules = Vec::with_capacity(parts.len());
        for &(module, width) in parts {
            modules.push(GroupModule { module, column, width });
            column += width;
        }
        Self { modules, input, width: column }
    }
}

/// The groups of every layer; all layers are alike.
#[derive(Clone, Debug)]
pub struct Groups {
    /// q, k, v on the normed residual.
    pub qkv: Group,
    /// o on the attention output.
    pub o: Group,
    /// gate, up on the normed residual.
    pub gate_up: Group,
    /// down on the gated activation.
    pub down: Group,
}

impl Groups {
    /// Columns as the fused base weights have them.
    pub fn new(config: &BaseConfig) -> Self {
        let heads = config.heads;
        let (q, kv) = (heads.q_width(), heads.kv_width());
        let (hidden, ffn) = (config.hidden, config.ffn);
        Self {
            qkv: Group::new(hidden, &[(Module::Q, q), (Module::K, kv), (Module::V, kv)]),
            o: Group::new(q, &[(Module::O, hidden)]),
            gate_up: Group::new(hidden, &[(Module::Gate, ffn), (Module::Up, ffn)]),
            down: Group::new(ffn, &[(Module::Down, hidden)]),
        }
    }

    /// The four groups in layer order.
    pub fn all(&self) -> [&Group; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }
}
