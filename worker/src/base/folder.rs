//! Finds and reads the files of a base: which files hold tensors, how their bytes are reached.
//!
//! Knows file names, not what is in the files. The crate's only unsafe code is the memory map here.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;
use serde_json::Value;

use super::error::BaseError;
use super::json;

/// Lists the files of a base that is split into several.
pub(super) const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Largest text file, in bytes: the largest known tokenizers stay below 40 MB.
const TEXT_LIMIT_BYTES: u64 = 256 << 20;

/// Bytes of one file.
pub(super) enum Content {
    Mapped(Mmap),
    Embedded(&'static [u8]),
    Read(Vec<u8>),
}

impl Content {
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Embedded(bytes) => bytes,
            Self::Read(bytes) => bytes,
        }
    }
}

/// Which of the files `present` hold the tensors.
pub(super) fn shard_names(
    present: &[String],
    index: impl FnOnce() -> Result<Vec<u8>, BaseError>,
) -> Result<Vec<String>, BaseError> {
    let has = |name: &str| present.iter().any(|file| file == name);
    if has(SINGLE) {
        return Ok(vec![SINGLE.to_owned()]);
    }
    let names = if has(INDEX) {
        index_names(&index()?)?
    } else {
        present.iter().filter(|file| file.ends_with(".safetensors")).cloned().collect()
    };
    match names.iter().find(|name| !has(name)) {
        Some(name) => Err(BaseError::file(name, format!("is missing, {INDEX} names it"))),
        None if names.is_empty() => Err(BaseError::file(SINGLE, "is missing")),
        None => Ok(names),
    }
}

fn index_names(index: &[u8]) -> Result<Vec<String>, BaseError> {
    let map = json::object(index).map_err(|fault| BaseError::Field { file: INDEX, fault })?;
    let fault = || BaseError::file(INDEX, "field `weight_map` must map tensors to file names");
    let weights = map.get("weight_map").and_then(Value::as_object).ok_or_else(fault)?;
    let mut names = Vec::new();
    for file in weights.values() {
        names.push(file.as_str().ok_or_else(fault)?.to_owned());
    }
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

fn io_fault(path: &Path) -> impl FnOnce(std::io::Error) -> BaseError {
    let path = path.display().to_string();
    move |source| BaseError::Io { path, source }
}

/// Names of the files in a folder, ascending.
pub(super) fn file_names(dir: &Path) -> Result<Vec<String>, BaseError> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io_fault(dir))? {
        let entry = entry.map_err(io_fault(dir))?;
        // A name that is not UTF-8 is none of the files that are looked for.
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// A text file, where it is there.
pub(super) fn read_text(path: &Path) -> Result<Option<Vec<u8>>, BaseError> {
    let length = match std::fs::metadata(path) {
        Ok(found) => found.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_fault(path)(error)),
    };
    if length > TEXT_LIMIT_BYTES {
        let reason = format!("has {length} bytes, more than {TEXT_LIMIT_BYTES}");
        return Err(BaseError::file(path.display().to_string(), reason));
    }
    std::fs::read(path).map(Some).map_err(io_fault(path))
}

/// Maps a file of tensors.
pub(super) fn map(path: &Path) -> Result<Mmap, BaseError> {
    let file = File::open(path).map_err(io_fault(path))?;
    // SAFETY: the map is read only. Its bytes are used as plain numbers, for which every pattern
    // is valid, and all offsets are checked against the length at mapping. What remains is that
    // another process changes or cuts the file meanwhile; whoever serves a base must not do that
    // (a cut ends the process with SIGBUS), as the module's documentation says.
    unsafe { Mmap::map(&file) }.map_err(io_fault(path))
}
