//! Device operations of Loquetier: the [`Device`] trait and its implementations.
//!
//! This crate knows shapes, not models: no layer, no tokenizer, no file. [`cpu`] is the readable
//! specification, generic over f32 and f64, that other devices are proven against; [`cuda`] is the
//! fast one.

mod arguments;
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod tables;
mod ticket;
mod view;

pub use arguments::{
    AdamW, AdamWState, HeadShape, KvOut, LinearShape, LossArgs, PagedKv, QkNorm, Rope,
};
pub use cpu::Cpu;
pub use cuda::Cuda;
pub use device::{Buffer, Device, Memory};
pub use tables::{GroupModule, Module, SmlmGroup};
pub use ticket::Ticket;
pub use view::{In, Out};

/// Rows that the CPU multiplies at once, and the rows of one gradient partial. A constant: results
/// per row must not depend on how many rows a batch has.
pub const ROW_TILE: usize = 16;

/// Faults of a device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Memory ran out at start.
    #[error("device memory: {wanted} bytes wanted, {free} free")]
    OutOfMemory {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes left; 0 where the system does not say.
        free: u64,
    },
    /// The driver or a library reported a fault; the device cannot be used further.
    #[error("device fault: {0}")]
    Device(String),
}

/// Result of a device operation.
pub type Result<T> = std::result::Result<T, Error>;
