//! Opens the device that the command line names.

use crate::cli::DeviceKind;
use anyhow::Context;
use kernels::{Cpu, Cuda};

/// A device ready for work.
#[allow(clippy::large_enum_variant, reason = "there is one, moved once")]
pub enum Opened {
    /// The processor.
    Cpu(Cpu<f32>),
    /// A GPU.
    Cuda(Box<Cuda>),
}

/// Opens a device. `auto` takes the GPU where there is one; one that cannot be used is an error,
/// not a reason to compute a hundred times more slowly.
/// `batch_invariant` is [`Cuda::batch_invariant`]; the CPU always is.
pub fn open(kind: DeviceKind, threads: usize, batch_invariant: bool) -> anyhow::Result<Opened> {
    let cpu = || Ok(Opened::Cpu(Cpu::new(threads)?));
    match kind {
        DeviceKind::Cpu => cpu(),
        DeviceKind::Auto if !Cuda::is_available() => {
            tracing::info!("no GPU: computing on the processor");
            cpu()
        }
        DeviceKind::Auto | DeviceKind::Cuda => {
            let refused = "the GPU cannot be used (--device cpu computes on the processor)";
            let cuda = Cuda::open(0).context(refused)?;
            let cuda = if batch_invariant { cuda.batch_invariant() } else { cuda };
            Ok(Opened::Cuda(Box::new(cuda)))
        }
    }
}
