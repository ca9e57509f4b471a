//! placeholder
pub mod adapters;
pub mod base;
pub mod text;
