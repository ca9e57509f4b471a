//! Loads machine code and launches kernels by name.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};

use super::fault::device_fault;
use super::sources::SOURCES;
use crate::{Error, Result};

/// Blocks and threads of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grid {
    /// Blocks in x, y, z; none of them 0.
    pub blocks: (u32, u32, u32),
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory, bytes.
    pub shared: u32,
}

impl Grid {
    /// `blocks` blocks in one row.
    pub fn line(blocks: usize, threads: u32) -> Self {
        Self { blocks: (blocks as u32, 1, 1), threads, shared: 0 }
    }
    /// Blocks in two dimensions.
    pub fn plane(x: usize, y: usize, threads: u32) -> Self {
        Self { blocks: (x as u32, y as u32, 1), threads, shared: 0 }
    }
    /// Blocks in three dimensions.
    pub fn cube(x: usize, y: usize, z: usize, threads: u32) -> Self {
        Self { blocks: (x as u32, y as u32, z as u32), threads, shared: 0 }
    }
    /// With dynamic shared memory.
    pub fn with_shared(self, bytes: u32) -> Self {
        Self { shared: bytes, ..self }
    }
}

/// Types that kernels take by value; pointers travel as `u64`.
pub(super) trait Argument {}
impl Argument for u64 {}
impl Argument for u32 {}
impl Argument for i32 {}
impl Argument for f32 {}

/// The address of an argument, for [`launch!`].
pub(super) fn argument<T: Argument>(value: &T) -> *mut c_void {
    (value as *const T).cast_mut().cast()
}

/// Launches a kernel: `launch!(cuda, "name", grid, argument, …)`. Arguments must have the types
/// of the kernel's parameters.
macro_rules! launch {
    ($cuda:expr, $kernel:expr, $grid:expr, $($value:expr),+ $(,)?) => {
        $cuda.launch($kernel, $grid, &mut [$($crate::cuda::launch::argument(&$value)),+])
    };
}
pub(super) use launch;

/// All kernels, loaded.
pub(super) struct Kernels {
    functions: HashMap<&'static str, sys::CUfunction>,
    modules: Vec<sys::CUmodule>,
    context: Arc<CudaContext>,
}

// SAFETY: handles of the driver, which may be used from any thread.
unsafe impl Send for Kernels {}

impl Kernels {
    /// Loads the machine code of all sources, in order.
    pub fn load(context: &Arc<CudaContext>, code: &[(Vec<u8>, bool)]) -> Result<Self> {
        let mut kernels =
            Self { functions: HashMap::new(), modules: Vec::new(), context: context.clone() };
        for (source, (code, _)) in SOURCES.iter().zip(code) {
            // SAFETY: a whole cubin image.
            let module =
                unsafe { result::module::load_data(code.as_ptr().cast()) }.map_err(device_fault)?;
            kernels.modules.push(module);
            for kernel in source.kernels {
                let missing =
                    |_| Error::Device(format!("{} has no kernel {}", source.name, kernel.name));
                let name = CString::new(kernel.name)
                    .map_err(|_| Error::Device("zero byte in a kernel's name".to_owned()))?;
                // SAFETY: the module is loaded.
                let function =
                    unsafe { result::module::get_function(module, name) }.map_err(missing)?;
                if kernel.shared > 0 {
                    let attribute = sys::CUfunction_attribute_enum::
                        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                    // SAFETY: the function is loaded.
                    unsafe {
                        result::function::set_function_attribute(
                            function,
                            attribute,
                            kernel.shared as i32,
                        )
                    }
                    .map_err(device_fault)?;
                }
                kernels.functions.insert(kernel.name, function);
            }
        }
        Ok(kernels)
    }

    /// Enqueues a launch.
    pub fn launch(
        &self,
        stream: sys::CUstream,
        name: &str,
        grid: Grid,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let Some(function) = self.functions.get(name) else {
            return Err(Error::Device(format!("no kernel {name}")));
        };
        // SAFETY: addresses of live values whose types the caller vouches for; the driver copies
        // them before it returns.
        unsafe {
            result::launch_kernel(
                *function,
                grid.blocks,
                (grid.threads, 1, 1),
                grid.shared,
                stream,
                arguments,
            )
        }
        .map_err(|error| {
            Error::Device(format!("launch of {name} {grid:?}: {}", device_fault(error)))
        })
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            for module in self.modules.drain(..) {
                // SAFETY: loaded once, unloaded once.
                let _ = unsafe { result::module::unload(module) };
            }
        }
    }
}
