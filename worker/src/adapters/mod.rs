//! Adapters as data: their flat layout in memory, their first values, and PEFT files in and out.
//!
//! An adapter's kind, rank and targets are values here, never code elsewhere. Nothing in this
//! folder touches base weights.

pub mod init;
pub mod layout;
pub mod pages;
pub mod peft;
mod peft_config;
pub mod registry;

pub use init::{Init, init_adapter};
pub use layout::{AdapterLayout, AdapterShape, Part, ShapeError, TensorSpot};
pub use peft::{PeftAdapter, PeftError};

#[cfg(test)]
mod tests;
