//! The judgement of imported adapters, which needs a base's dimensions: the gateway knows no
//! model, so whoever starts it brings the judge.

use async_trait::async_trait;
use bytes::Bytes;

/// An adapter that fits its base, in the form the store keeps.
#[derive(Clone, Debug)]
pub struct CheckedAdapter {
    /// LoRA rank.
    pub rank: i64,
    /// LoRA alpha.
    pub alpha: f64,
    /// Scaled by alpha/√rank.
    pub use_rslora: bool,
    /// Modules with weights.
    pub target_modules: Vec<String>,
    /// Size of the weights on a device.
    pub device_bytes: i64,
    /// Fingerprint of the base it was checked against.
    pub base_fingerprint: String,
    /// Normalised `adapter_config.json`.
    pub config: Bytes,
    /// Normalised `adapter_model.safetensors`.
    pub weights: Bytes,
}

/// Why an adapter is not taken.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CheckRefusal {
    /// Something in the files; the message names the key (400).
    #[error("{message}")]
    Invalid {
        /// Form field at fault: `config`, `weights` or `base`.
        param: &'static str,
        /// For people.
        message: String,
    },
    /// No judge for this base at the moment (503).
    #[error("{0}")]
    Unavailable(String),
}

/// Checks PEFT files against a base: unknown keys, wrong shapes, non-finite weights.
#[async_trait]
pub trait AdapterCheck: Send + Sync + 'static {
    /// Judges; never blocks the runtime.
    async fn check(
        &self,
        base: &str,
        config: Bytes,
        weights: Bytes,
    ) -> Result<CheckedAdapter, CheckRefusal>;
}
