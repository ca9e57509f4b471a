//! PEFT's two files, `adapter_config.json` and `adapter_model.safetensors`, in and out.
//!
//! Shapes decide: the weights say which modules are targets, the configuration only how strongly
//! they act. Whatever would make PEFT compute something else than `x W + scale · B A x` in every
//! layer is refused by name. Written files are the same bytes for the same adapter.

use std::collections::BTreeMap;
use std::ops::Range;

use kernels::Module;
use safetensors::tensor::{Dtype, TensorView};

use super::layout::{AdapterLayout, AdapterShape, Part, ShapeError, TensorSpot};
use super::peft_config::{PeftConfig, read_config};
use crate::base::ModuleDims;
use crate::base::json::{FieldError, quoted};
use crate::base::module_path;
use crate::base::safetensor::{Entry, Stored, read_entries, to_f32};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// Longest key in an error, in characters.
const KEY_CHARS: usize = 160;
const KEY_PREFIX: &str = "base_model.model.model.layers.";

/// An adapter read from PEFT's files.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftAdapter {
    /// Rank, scale and targets.
    pub shape: AdapterShape,
    /// Values in layout order.
    pub values: Vec<f32>,
    /// What is odd but harmless, for people.
    pub warnings: Vec<String>,
}

/// Why PEFT's files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PeftError {
    /// A field of the configuration.
    #[error("{CONFIG}: {0}")]
    Field(#[from] FieldError),
    /// Rank or alpha out of range, or no target.
    #[error("{CONFIG}: {0}")]
    Shape(#[from] ShapeError),
    /// The weights file as a whole.
    #[error("{WEIGHTS}: {0}")]
    File(String),
    /// One key of the weights file.
    #[error("{WEIGHTS}: key `{key}` {reason}")]
    Key {
        /// The key.
        key: String,
        /// Continues the sentence.
        reason: String,
    },
}

fn key_fault(key: impl Into<String>, reason: impl Into<String>) -> PeftError {
    PeftError::Key { key: quoted(&key.into(), KEY_CHARS), reason: reason.into() }
}

/// PEFT's key of a matrix.
fn key_of(layer: usize, module: Module, part: Part) -> String {
    let part = match part {
        Part::A => "lora_A",
        Part::B => "lora_B",
    };
    format!("{KEY_PREFIX}{layer}.{}.{part}.weight", module_path(module))
}

fn parse_key(key: &str, layers: usize) -> Result<(usize, Module, Part), PeftError> {
    let unknown = || {
        let reason = "is not supported: only lora_A and lora_B of the seven linear modules of a \
                      layer are";
        key_fault(key, reason)
    };
    let (layer, rest) =
        key.strip_prefix(KEY_PREFIX).and_then(|rest| rest.split_once('.')).ok_or_else(unknown)?;
    let layer: usize = layer.parse().map_err(|_| unknown())?;
    for module in Module::ALL {
        for part in [Part::A, Part::B] {
            // Rebuilding the key also refuses layer numbers such as `+1` and `01`.
            if rest.starts_with(module_path(module)) && key_of(layer, module, part) == key {
                if layer < layers {
                    return Ok((layer, module, part));
                }
                return Err(key_fault(key, format!("is beyond the base's {layers} layers")));
            }
        }
    }
    Err(unknown())
}

/// Reads PEFT's two files for a base with modules of sizes `dims`. A base name that differs from
/// `base_name` is only a warning. Errors name the file and the field or key.
pub fn read(
    config: &[u8],
    weights: &[u8],
    dims: &ModuleDims,
    base_name: &str,
) -> Result<PeftAdapter, PeftError> {
    let config = read_config(config, dims.layers)?;
    let entries = read_entries(weights).map_err(PeftError::File)?;
    let mut targets = Vec::new();
    for key in entries.keys() {
        targets.push(parse_key(key, dims.layers)?.1);
    }
    if targets.is_empty() {
        return Err(PeftError::File("holds no tensor".into()));
    }
    let shape = AdapterShape::new(config.rank, config.alpha, config.use_rslora, targets)?;
    config.check_targets(&shape.targets)?;
    let layout = AdapterLayout::new(dims, &shape);
    let tensors = check_tensors(&entries, &layout)?;
    let mut values = vec![0.0; layout.len()];
    for (spot, key, (bytes, stored)) in tensors {
        let tensor = to_f32(&weights[bytes], stored);
        if let Some(at) = tensor.iter().position(|value| !value.is_finite()) {
            return Err(key_fault(key, format!("holds {} at element {at}", tensor[at])));
        }
        values[spot.offset..spot.offset + spot.len()].copy_from_slice(&tensor);
    }
    Ok(PeftAdapter { shape, values, warnings: config.warnings(base_name) })
}

type Place = (Range<usize>, Stored);

/// Finds every matrix of the layout. Only then is memory taken, so that a small file which
/// promises much cannot claim it.
fn check_tensors(
    entries: &BTreeMap<String, Entry>,
    layout: &AdapterLayout,
) -> Result<Vec<(TensorSpot, String, Place)>, PeftError> {
    let find = |spot: TensorSpot| {
        let key = key_of(spot.layer, spot.module, spot.part);
        let Some(entry) = entries.get(&key) else {
            let reason = "is missing: a target module needs both matrices in every layer";
            return Err(key_fault(key, reason));
        };
        check_shape(&key, &entry.shape, &spot)?;
        let stored = entry.stored.clone();
        let stored = stored.map_err(|reason| key_fault(&key, format!("is {reason}")))?;
        Ok((spot, key, (entry.bytes.clone(), stored)))
    };
    layout.tensors().map(find).collect()
}

fn check_shape(key: &str, found: &[usize], spot: &TensorSpot) -> Result<(), PeftError> {
    if found == [spot.rows, spot.cols] {
        return Ok(());
    }
    let (rank, rank_axis) = match spot.part {
        Part::A => (spot.rows, 0),
        Part::B => (spot.cols, 1),
    };
    let reason = match found {
        [_, _] if found[rank_axis] != rank && found[1 - rank_axis] == spot.len() / rank => {
            format!("has rank {}, {CONFIG} says {rank}", found[rank_axis])
        }
        _ => format!("has shape {found:?}, the base needs [{}, {}]", spot.rows, spot.cols),
    };
    Err(key_fault(key, reason))
}

/// PEFT's `adapter_config.json` for an adapter; ends with a line break.
pub fn write_config(shape: &AdapterShape, dropout: f64, base_name: &str) -> Vec<u8> {
    PeftConfig::text(shape, dropout, base_name).into_bytes()
}

/// PEFT's `adapter_model.safetensors`, f32, of `values` in layout order.
///
/// Panics when `values` is not as long as the layout: a bug, not a fault.
pub fn write_weights(layout: &AdapterLayout, values: &[f32]) -> Vec<u8> {
    assert_eq!(values.len(), layout.len(), "values in layout order");
    let little: Vec<[u8; 4]> = values.iter().map(|value| value.to_le_bytes()).collect();
    let views: BTreeMap<String, TensorView<'_>> = layout
        .tensors()
        .map(|spot| {
            let bytes = little[spot.offset..spot.offset + spot.len()].as_flattened();
            let view = TensorView::new(Dtype::F32, vec![spot.rows, spot.cols], bytes);
            let view = view.expect("rows times columns is the length");
            (key_of(spot.layer, spot.module, spot.part), view)
        })
        .collect();
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize(views, Some(metadata)).expect("checked views always serialise")
}
