//! Opens the device that the command line names.

use crate::cli::DeviceKind;
use anyhow::Context;
use kernels::{Cpu, Cuda};

/// A device ready for work.
pub enum Opened {
    /// The processor.
    Cpu(Cpu<f32>),
    /// A GPU.
    Cuda(Cuda),
}

/// Opens a device. With `auto` a GPU that cannot be used is no error: the processor is taken.
pub fn open(kind: DeviceKind, threads: usize) -> anyhow::Result<Opened> {
    let cpu = || Ok(Opened::Cpu(Cpu::new(threads)?));
    match kind {
        DeviceKind::Cpu => cpu(),
        DeviceKind::Cuda => {
            Ok(Opened::Cuda(Cuda::open(0).context("--device cuda: the GPU cannot be used")?))
        }
        DeviceKind::Auto => match Cuda::open(0) {
            Ok(cuda) => Ok(Opened::Cuda(cuda)),
            Err(reason) => {
                tracing::info!(%reason, "computing on the processor");
                cpu()
            }
        },
    }
}
