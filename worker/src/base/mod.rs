//! The frozen base model as files hold it: configuration, tensors, rotary tables, device weights.
//!
//! Reads the Hugging Face layout and refuses what the model code cannot run, with one line that
//! names the field or tensor. Knows nothing of adapters, requests or jobs; writes nothing.

pub mod config;
mod dims;
mod error;
pub mod files;
mod fingerprint;
mod folder;
pub(crate) mod json;
mod random;
pub mod rope;
pub(crate) mod safetensor;
mod shapes;
mod tensors;
pub mod weights;

pub use config::{BaseConfig, Family};
pub use dims::ModuleDims;
pub use error::BaseError;
pub use files::BaseFiles;
pub use rope::{RopeConfig, RopeScaling, RopeTables};
pub use shapes::SHAPES;
pub(crate) use tensors::module_path;
pub use weights::{BaseWeights, LayerWeights};

#[cfg(test)]
pub(crate) mod tests;
