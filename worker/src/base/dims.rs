//! Sizes of the linear modules that adapters may change, and their form in a base's row: whoever
//! judges an adapter needs nothing else of the base.

use kernels::{HeadShape, Module};
use serde_json::{Value, json};

use super::config::{FFN_LIMIT, LAYER_LIMIT, WIDTH_LIMIT};

/// Sizes of the linear modules that adapters may change.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModuleDims {
    /// Layers (L).
    pub layers: usize,
    /// Hidden width (H).
    pub hidden: usize,
    /// Attention heads.
    pub heads: HeadShape,
    /// Feed-forward width (F).
    pub ffn: usize,
}

impl ModuleDims {
    /// `(in, out)` of a module.
    pub fn of(&self, module: Module) -> (usize, usize) {
        match module {
            Module::Q => (self.hidden, self.heads.q_width()),
            Module::K | Module::V => (self.hidden, self.heads.kv_width()),
            Module::O => (self.heads.q_width(), self.hidden),
            Module::Gate | Module::Up => (self.hidden, self.ffn),
            Module::Down => (self.ffn, self.hidden),
        }
    }

    /// For a base's row.
    pub fn to_json(&self) -> Value {
        json!({
            "layers": self.layers,
            "hidden": self.hidden,
            "q_heads": self.heads.q_heads,
            "kv_heads": self.heads.kv_heads,
            "head_dim": self.heads.head_dim,
            "ffn": self.ffn,
        })
    }

    /// From a base's row; none where a size is missing or beyond what a base may have.
    pub fn from_json(row: &Value) -> Option<Self> {
        let size = |field: &str, most: usize| {
            let size = usize::try_from(row.get(field)?.as_u64()?).ok()?;
            (1..=most).contains(&size).then_some(size)
        };
        let heads = HeadShape {
            q_heads: size("q_heads", WIDTH_LIMIT)?,
            kv_heads: size("kv_heads", WIDTH_LIMIT)?,
            head_dim: size("head_dim", WIDTH_LIMIT)?,
        };
        // Each factor is below 2¹⁷, so the product cannot overflow.
        let widest = heads.q_heads.max(heads.kv_heads) * heads.head_dim;
        let dims = Self {
            layers: size("layers", LAYER_LIMIT)?,
            hidden: size("hidden", WIDTH_LIMIT)?,
            ffn: size("ffn", FFN_LIMIT)?,
            heads,
        };
        (widest <= WIDTH_LIMIT).then_some(dims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{BaseConfig, SHAPES};

    #[test]
    fn every_base_comes_back_from_its_row() {
        for name in SHAPES {
            let dims = BaseConfig::of_shape(name).expect("is known").dims();
            assert_eq!(ModuleDims::from_json(&dims.to_json()), Some(dims), "{name}");
        }
    }

    #[test]
    fn rows_that_no_base_has_are_refused() {
        let good = BaseConfig::of_shape("tiny").expect("is known").dims().to_json();
        for (field, value) in [
            ("layers", json!(0)),
            ("layers", json!(100_000)),
            ("hidden", json!(-1)),
            ("hidden", json!("64")),
            ("head_dim", json!(65_536)),
            ("ffn", Value::Null),
        ] {
            let mut row = good.clone();
            row[field] = value.clone();
            assert_eq!(ModuleDims::from_json(&row), None, "{field}: {value}");
        }
        assert_eq!(ModuleDims::from_json(&json!([])), None);
    }
}
