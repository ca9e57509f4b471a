//! Faults of the driver and of CUDA's libraries as this crate's errors.

use cudarc::cublaslt::result::CublasError;
use cudarc::driver::DriverError;
use cudarc::nvrtc::result::NvrtcError;

use crate::Error;

/// A fault of the driver.
pub(super) fn device_fault(error: DriverError) -> Error {
    let name = error.error_name().map_or("unknown".into(), |name| name.to_string_lossy());
    let text = error.error_string().map_or("".into(), |text| text.to_string_lossy());
    Error::Device(format!("CUDA {name}: {text}"))
}

/// A fault of cuBLASLt in the product `what`.
pub(super) fn blas_fault(what: &str) -> impl Fn(CublasError) -> Error + '_ {
    move |error| Error::Device(format!("cuBLASLt {:?} in {what}", error.0))
}

/// A fault of the run-time compiler.
pub(super) fn compiler_fault(error: NvrtcError) -> Error {
    Error::Device(format!("NVRTC {:?}", error.0))
}
