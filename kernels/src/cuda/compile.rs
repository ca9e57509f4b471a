//! Sources to machine code: NVRTC, and a cache on disk that may be filled on another machine.
//!
//! A cached file is named by a hash of source, flags and architecture, and by the compiler's
//! version. Where there is no compiler, machine code of any version serves.

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use cudarc::nvrtc::{result, sys};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::fault::compiler_fault;
use super::libraries;
use super::sources::{SOURCES, Source};
use crate::{Error, Result};

/// Flags of every compilation, beside the architecture.
const FLAGS: [&str; 2] = ["--std=c++17", "-default-device"];

/// A GPU architecture, for example `sm_90a`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arch(String);

impl Arch {
    /// That of a compute capability. Hopper's own instructions need its `a` form.
    pub fn of_capability(major: i32, minor: i32) -> Self {
        let suffix = if (major, minor) == (9, 0) { "a" } else { "" };
        Self(format!("sm_{major}{minor}{suffix}"))
    }
}

impl FromStr for Arch {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let digits = text.strip_prefix("sm_").map(|rest| rest.trim_end_matches('a'));
        match digits.and_then(|digits| digits.parse::<u32>().ok()) {
            Some(80..) => Ok(Self(text.to_owned())),
            Some(_) => Err(format!("'{text}' is too old: kernels need sm_80 or newer")),
            None => Err(format!("'{text}' is no architecture such as sm_80 or sm_90a")),
        }
    }
}

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where machine code is kept: `LOQUETIER_KERNEL_CACHE`, else the user's cache folder.
pub fn cache_folder() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(folder) = variable("LOQUETIER_KERNEL_CACHE") {
        return folder.into();
    }
    let cache = variable("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".cache")));
    cache.unwrap_or_else(std::env::temp_dir).join("loquetier").join("kernels")
}

/// What [`compile_all`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    /// Files compiled anew.
    pub compiled: usize,
    /// Files found in the cache.
    pub cached: usize,
}

/// Fills the cache for `arch`. Needs NVRTC where something is missing, but no GPU.
pub fn compile_all(arch: &Arch, folder: &Path) -> Result<Compiled> {
    let mut done = Compiled::default();
    for (_, fresh) in machine_code(arch, folder)? {
        if fresh {
            done.compiled += 1;
        } else {
            done.cached += 1;
        }
    }
    Ok(done)
}

/// Machine code of all sources in order, each with whether it was compiled just now.
pub(super) fn machine_code(arch: &Arch, folder: &Path) -> Result<Vec<(Vec<u8>, bool)>> {
    let version = compiler_version()?;
    SOURCES.par_iter().map(|source| of_source(source, arch, folder, version)).collect()
}

/// Version of NVRTC, none where it is missing.
fn compiler_version() -> Result<Option<(i32, i32)>> {
    if !libraries::has_compiler() {
        return Ok(None);
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: two valid out-pointers.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(compiler_fault)?;
    Ok(Some((major, minor)))
}

fn of_source(
    source: &Source,
    arch: &Arch,
    folder: &Path,
    version: Option<(i32, i32)>,
) -> Result<(Vec<u8>, bool)> {
    let text = source.parts.concat();
    let key = key(&text, arch);
    let Some((major, minor)) = version else {
        let found = any_version(folder, &key).ok_or_else(|| {
            Error::Device(format!(
                "libnvrtc was not found and {} holds no machine code of {} for {arch}: install \
                 CUDA 13's NVRTC, or run `loquetier kernels compile --arch {arch}` elsewhere and \
                 bring that folder",
                folder.display(),
                source.name
            ))
        })?;
        return Ok((found, false));
    };
    let path = folder.join(format!("{key}-nvrtc{major}.{minor}.cubin"));
    if let Ok(code) = std::fs::read(&path) {
        return Ok((code, false));
    }
    let code = compile(source.name, &text, arch)?;
    if let Err(error) = store(&path, &code) {
        // Only costs the next start its time.
        eprintln!("kernel cache {}: {error}", path.display());
    }
    Ok((code, true))
}

fn key(text: &str, arch: &Arch) -> String {
    let mut hash = Sha256::new();
    for part in [text, &FLAGS.join(" "), &arch.0] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

fn any_version(folder: &Path, key: &str) -> Option<Vec<u8>> {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(folder).ok()?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    entries.sort();
    let of_key = |path: &&PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with(key) && name.ends_with(".cubin")
    };
    std::fs::read(entries.iter().rev().find(of_key)?).ok()
}

/// Writes beside, then renames: another process never reads half a file.
fn store(path: &Path, code: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder)?;
    let partial = path.with_extension(format!("partial{}", std::process::id()));
    std::fs::write(&partial, code)?;
    std::fs::rename(&partial, path)
}

/// One NVRTC program, destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by `create_program`, destroyed once.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

fn compile(name: &str, text: &str, arch: &Arch) -> Result<Vec<u8>> {
    let bad = |_| Error::Device(format!("{name} holds a zero byte"));
    let (text, file) = (CString::new(text).map_err(bad)?, CString::new(name).map_err(bad)?);
    let program = result::create_program(&text, Some(&file)).map_err(compiler_fault)?;
    let program = Program(program);
    let architecture = format!("--gpu-architecture={arch}");
    let options: Vec<&str> = FLAGS.into_iter().chain([architecture.as_str()]).collect();
    // SAFETY: the program is live.
    if let Err(error) = unsafe { result::compile_program(program.0, &options) } {
        // SAFETY: the program is live.
        let log = unsafe { result::get_program_log(program.0) }.map_err(compiler_fault)?;
        let log: Vec<u8> = log.into_iter().map(|c| c as u8).take_while(|c| *c != 0).collect();
        let log = String::from_utf8_lossy(&log);
        return Err(Error::Device(format!("{name} for {arch}: {:?}\n{log}", error.0)));
    }
    let mut len = 0;
    // SAFETY: the program is compiled, the pointer valid.
    unsafe { sys::nvrtcGetCUBINSize(program.0, &mut len) }.result().map_err(compiler_fault)?;
    let mut code = vec![0u8; len];
    // SAFETY: the buffer has the length just asked for.
    unsafe { sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast()) }
        .result()
        .map_err(compiler_fault)?;
    Ok(code)
}
