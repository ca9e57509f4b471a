//! The worker: pulls inference requests and fine-tuning jobs into one batch loop over a frozen
//! base. The dependency order is `intake, outlet → engine → {train, adapters, model} → kernels`;
//! nothing below intake knows storage.

pub mod adapters;
pub mod base;
pub mod dataset;
pub mod engine;
pub mod footprint;
pub mod intake;
pub mod model;
pub mod options;
mod outlet;
pub mod plan;
pub mod run;
pub mod text;
pub mod train;

pub use options::WorkerOptions;
pub use run::Worker;

/// Random cases of a test, times `LOQUETIER_SOAK` where `./dev soak` sets it.
#[cfg(test)]
fn soak(cases: u32) -> u32 {
    let factor = std::env::var("LOQUETIER_SOAK").ok().and_then(|text| text.parse().ok());
    cases * factor.unwrap_or(1)
}
