//! Finds CUDA's libraries at run time, so that the binary needs none to start.
//!
//! The loader's own path comes first. Toolkits often lie outside it; a library loaded here by its
//! full path is then found under its plain name as well.

use std::path::PathBuf;

use crate::{Error, Result};

/// Folders where toolkits put their libraries.
fn folders() -> Vec<PathBuf> {
    let named = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os);
    let roots = named.map(PathBuf::from).chain([PathBuf::from("/usr/local/cuda")]);
    roots.flat_map(|root| [root.join("lib64"), root.join("lib")]).collect()
}

/// Loads `names` from the first folder that holds the first of them.
fn load_from_toolkit(names: &[&str]) -> bool {
    let Some(first) = names.first() else { return false };
    let Some(folder) = folders().into_iter().find(|folder| folder.join(first).exists()) else {
        return false;
    };
    names.iter().all(|name| {
        // SAFETY: NVIDIA's libraries have initialisers without preconditions.
        match unsafe { libloading::Library::new(folder.join(name)) } {
            Ok(library) => {
                // Stays loaded as long as the process runs.
                std::mem::forget(library);
                true
            }
            Err(_) => false,
        }
    })
}

/// Whether the driver is there.
pub(super) fn has_driver() -> bool {
    // SAFETY: loading the driver has no precondition.
    unsafe { cudarc::driver::sys::is_culib_present() }
}

/// Whether the run-time compiler is there.
pub(super) fn has_compiler() -> bool {
    // SAFETY: as above.
    let found = || unsafe { cudarc::nvrtc::sys::is_culib_present() };
    found() || (load_from_toolkit(&["libnvrtc.so.13"]) && found())
}

/// Makes cuBLASLt loadable, or says how.
pub(super) fn need_cublaslt() -> Result<()> {
    // SAFETY: as above.
    let found = || unsafe { cudarc::cublaslt::sys::is_culib_present() };
    if found() || (load_from_toolkit(&["libcublasLt.so.13"]) && found()) {
        return Ok(());
    }
    let message = "libcublasLt was not found: install CUDA 13's cuBLAS, or set LD_LIBRARY_PATH \
                   or CUDA_HOME to where it is";
    Err(Error::Device(message.to_owned()))
}
