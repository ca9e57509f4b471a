//! The CUDA device: bf16 activations, f32 masters, sums in f32.
//!
//! Nothing is linked: driver, run-time compiler and cuBLASLt are loaded when a device is opened.
//! Kernels are embedded as source ([`sources`]), compiled once per machine ([`compile`]) and
//! launched by name ([`launch`]); one file per family of operations, beside its `.cu`. Everything
//! goes through one stream in order, so operations may share the scratch memory.

mod attention;
pub mod compile;
mod device;
mod event;
mod fault;
mod launch;
mod libraries;
mod linear;
mod loss;
mod memory;
mod norm;
mod optimizer;
mod product;
mod replay;
mod rope;
mod rows;
mod sample;
mod silu;
mod smlm;
mod sources;
mod transfer;

use std::cell::RefCell;
use std::ffi::c_void;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::{CudaContext, result, sys};

pub use memory::Buf;

use crate::{Buffer, Error, In, Out, Result};
use compile::Arch;
use event::Clock;
use fault::device_fault;
use launch::{Grid, Kernels};
use linear::Products;
use memory::Address;
use replay::Graphs;
use transfer::{Downloads, Uploads};

/// Memory that operations use for partial results.
const SCRATCH_BYTES: usize = 256 << 20;

/// One GPU. Owned by one thread at a time.
///
/// Fields are dropped in order: what the stream may still use goes after the stream has ended.
pub struct Cuda {
    stream: Stream,
    graphs: Graphs,
    kernels: Kernels,
    products: Products,
    scratch: Buf<u8>,
    uploads: RefCell<Uploads>,
    downloads: Downloads,
    clock: RefCell<Clock>,
    processors: usize,
    batch_invariant: bool,
    name: String,
    numerics: String,
    context: Arc<CudaContext>,
}

/// A stream of the driver.
struct Stream {
    stream: sys::CUstream,
    context: Arc<CudaContext>,
}

// SAFETY: a handle of the driver, which may be used from any thread.
unsafe impl Send for Stream {}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: owned; ends what it holds, then goes.
            let _ = unsafe { result::stream::synchronize(self.stream) };
            let _ = unsafe { result::stream::destroy(self.stream) };
        }
    }
}

impl Cuda {
    /// Whether this machine has a driver and a GPU.
    pub fn is_available() -> bool {
        libraries::has_driver()
            && result::init().is_ok()
            && result::device::get_count().is_ok_and(|count| count > 0)
    }

    /// Opens GPU `ordinal`. Compiles the kernels, or takes them from the cache. Errors where the
    /// GPU, its driver, the compiler (with nothing cached) or cuBLASLt is missing.
    pub fn open(ordinal: usize) -> Result<Self> {
        if !libraries::has_driver() {
            return Err(Error::Device("no NVIDIA driver was found".to_owned()));
        }
        libraries::need_cublaslt()?;
        let context = CudaContext::new(ordinal).map_err(device_fault)?;
        use sys::CUdevice_attribute as Attribute;
        let attribute = |attribute| context.attribute(attribute).map_err(device_fault);
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let processors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let arch = Arch::of_capability(major, minor);
        let code = compile::machine_code(&arch, &compile::cache_folder())?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(device_fault)?;
        let name = context.name().map_err(device_fault)?;
        Ok(Self {
            stream: Stream { stream, context: context.clone() },
            graphs: Graphs::new(&context),
            kernels: Kernels::load(&context, &code)?,
            products: Products::new(&context)?,
            scratch: Buf::zeroed(&context, SCRATCH_BYTES)?,
            uploads: RefCell::new(Uploads::new(&context)?),
            downloads: Downloads::new(&context),
            clock: RefCell::new(Clock::new(&context, stream)?),
            processors: processors as usize,
            batch_invariant: false,
            name: format!("cuda:{ordinal} {name}"),
            numerics: format!("cuda bf16 {arch}"),
            context,
        })
    }

    /// Makes what a row comes to independent of what else is in the batch, bit for bit: products
    /// take one algorithm per weight, at most 256 rows at once, and decode attends as prefill does.
    /// Costs speed.
    pub fn batch_invariant(mut self) -> Self {
        self.batch_invariant = true;
        self.numerics.push_str(" batch-invariant");
        self
    }

    /// Whether [`Cuda::batch_invariant`] was asked for.
    pub fn is_batch_invariant(&self) -> bool {
        self.batch_invariant
    }

    /// The one stream.
    fn stream(&self) -> sys::CUstream {
        self.stream.stream
    }

    /// Streaming multiprocessors of the GPU.
    fn processors(&self) -> usize {
        self.processors
    }

    /// Address of scratch memory for the operation at work, aligned to 256 bytes.
    fn scratch(&self, bytes: usize) -> Result<u64> {
        match bytes <= self.scratch.len() {
            true => Ok(In::all(&self.scratch).address()),
            false => Err(Error::Device(format!(
                "an operation needs {bytes} bytes of scratch memory, there are {SCRATCH_BYTES}"
            ))),
        }
    }

    /// Enqueues a launch; see [`launch::launch`].
    fn launch(&self, kernel: &str, grid: Grid, arguments: &mut [*mut c_void]) -> Result<()> {
        self.bind()?;
        self.kernels.launch(self.stream(), kernel, grid, arguments)
    }

    /// Enqueues `dst = convert(src)`.
    fn upload<S: Copy + Sync, T: Pod + Send>(
        &self,
        dst: &Out<'_, Buf<T>>,
        src: &[S],
        convert: impl Fn(S) -> T + Sync,
    ) -> Result<()> {
        assert_eq!(dst.len, src.len(), "lengths of an upload");
        self.bind()?;
        self.uploads.borrow_mut().copy(self.stream(), dst.address(), src, convert)
    }

    /// Makes the device current on the calling thread: a device may have moved between threads.
    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(device_fault)
    }
}
