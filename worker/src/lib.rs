//! The worker: pulls inference requests and fine-tuning jobs into one batch loop over a frozen
//! base. The dependency order is `intake, outlet → engine → {train, adapters, model} → kernels`;
//! nothing below intake knows storage.

pub mod adapters;
pub mod base;
pub mod engine;
pub mod model;
pub mod text;
pub mod train;
