//! The worker: pulls inference requests and fine-tuning jobs into one batch loop over a frozen
//! base. The dependency order is `intake, outlet → engine → {train, adapters, model} → kernels`;
//! nothing below intake knows storage.

pub mod adapters;
pub mod base;
pub mod dataset;
pub mod engine;
mod intake;
pub mod model;
pub mod options;
mod outlet;
pub mod run;
pub mod text;
pub mod train;

pub use options::WorkerOptions;
pub use run::Worker;
