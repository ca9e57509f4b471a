//! Judges imported adapters by the shapes in their base's row: no worker need be alive.

use async_trait::async_trait;
use bytes::Bytes;
use gateway::{AdapterCheck, CheckRefusal, CheckedAdapter};
use storage::Db;
use worker::adapters::layout::module_name;
use worker::adapters::{AdapterLayout, peft};
use worker::base::ModuleDims;

/// See the module.
pub struct RowCheck {
    /// Where bases are rows.
    pub db: Db,
}

impl RowCheck {
    /// Sizes and fingerprint of a base as its last worker described it.
    async fn base(&self, base: &str) -> Result<(ModuleDims, String), CheckRefusal> {
        let row = self.db.bases().get(base).await.map_err(|error| {
            tracing::error!(%error, base, "a base could not be read");
            CheckRefusal::Unavailable("The database cannot be reached at the moment.".to_owned())
        })?;
        let described = row.and_then(|row| {
            let dims = ModuleDims::from_json(row.modules.as_ref()?)?;
            Some((dims, row.fingerprint))
        });
        described.ok_or_else(|| {
            CheckRefusal::Unavailable(format!("No worker has described the base `{base}` yet."))
        })
    }
}

#[async_trait]
impl AdapterCheck for RowCheck {
    async fn check(
        &self,
        base: &str,
        config: Bytes,
        weights: Bytes,
    ) -> Result<CheckedAdapter, CheckRefusal> {
        let (dims, fingerprint) = self.base(base).await?;
        let base = base.to_owned();
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
