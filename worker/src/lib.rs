//! placeholder
pub mod adapters;
pub mod base;
