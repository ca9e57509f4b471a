//! Judges imported adapters by the shapes of the base that this process serves.

use async_trait::async_trait;
use bytes::Bytes;
use gateway::{AdapterCheck, CheckRefusal, CheckedAdapter};
use worker::adapters::layout::module_name;
use worker::adapters::{AdapterLayout, peft};
use worker::base::ModuleDims;

/// See the module.
pub struct BaseCheck {
    /// Name of the base.
    pub base: String,
    /// Fingerprint of its weights.
    pub fingerprint: String,
    /// Sizes of its modules.
    pub dims: ModuleDims,
}

#[async_trait]
impl AdapterCheck for BaseCheck {
    async fn check(
        &self,
        base: &str,
        config: Bytes,
        weights: Bytes,
    ) -> Result<CheckedAdapter, CheckRefusal> {
        if base != self.base {
            return Err(CheckRefusal::Unavailable(format!("no worker here serves '{base}'")));
        }
        let (dims, base, fingerprint) = (self.dims, base.to_owned(), self.fingerprint.clone());
        let judge = move || judge(&dims, &base, fingerprint, &config, &weights);
        let judged = tokio::task::spawn_blocking(judge).await;
        judged.unwrap_or_else(|error| {
            tracing::error!(%error, "judging an adapter failed");
            Err(CheckRefusal::Unavailable("the adapter could not be checked".to_owned()))
        })
    }
}

/// Reads the files as serving will, and writes them anew: what is stored is what was understood.
fn judge(
    dims: &ModuleDims,
    base: &str,
    base_fingerprint: String,
    config: &[u8],
    weights: &[u8],
) -> Result<CheckedAdapter, CheckRefusal> {
    let read = peft::read(config, weights, dims, base).map_err(|error| invalid(&error))?;
    for warning in &read.warnings {
        tracing::warn!(warning, "an imported adapter is odd");
    }
    let layout = AdapterLayout::new(dims, &read.shape);
    let names = read.shape.targets.iter().map(|module| module_name(*module).to_owned());
    let weights = peft::write_weights(&layout, &read.values);
    Ok(CheckedAdapter {
        rank: read.shape.rank as i64,
        alpha: read.shape.alpha,
        use_rslora: read.shape.use_rslora,
        target_modules: names.collect(),
        config: peft::write_config(&read.shape, 0.0, base).into(),
        device_bytes: (read.values.len() * size_of::<f32>()) as i64,
        base_fingerprint,
        weights: weights.into(),
    })
}

/// PEFT errors begin with the name of the file at fault.
fn invalid(error: &peft::PeftError) -> CheckRefusal {
    let message = error.to_string();
    let param = if message.starts_with("adapter_config") { "config" } else { "weights" };
    CheckRefusal::Invalid { param, message }
}
