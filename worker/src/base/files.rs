//! A base's files: configuration, texts and memory-mapped tensors, all checked at opening.
//!
//! Afterwards every tensor that the configuration promises is there once, with its shape, in bf16,
//! f16 or f32. Files may also be bytes compiled into the binary. The files of a running base must
//! not be changed: they are mapped, not copied.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use half::bf16;
use memmap2::Mmap;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::config::BaseConfig;
use super::error::BaseError;
use super::json;
use super::safetensor::{self, Entry, Stored};
use super::tensors::{expected, ignorable};

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// Small files that belong to a base; those that are there are kept and fingerprinted.
pub const TEXT_FILES: [&str; 7] = [
    CONFIG,
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];
/// Largest text file, in bytes: the largest known tokenizers stay below 40 MB.
const TEXT_LIMIT_BYTES: u64 = 256 << 20;
/// Tensors above this sum of bytes are fingerprinted by samples.
const WHOLE_HASH_LIMIT_BYTES: usize = 2 << 30;
/// Bytes of one sample: taken from the start, middle and end of a tensor.
const SAMPLE_BYTES: usize = 64 << 10;

/// Bytes of one file.
enum Content {
    Mapped(Mmap),
    Embedded(&'static [u8]),
    Read(Vec<u8>),
}

impl Content {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Embedded(bytes) => bytes,
            Self::Read(bytes) => bytes,
        }
    }
}

struct Shard {
    file: String,
    content: Content,
}

struct Tensor {
    shard: usize,
    entry: Entry,
}

/// A base's files, checked.
pub struct BaseFiles {
    config: BaseConfig,
    texts: BTreeMap<&'static str, Content>,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Tensor>,
}

/// Elements of one tensor as they are stored.
pub(super) enum Elements<'a> {
    /// bf16 as in the file.
    Bf16(Cow<'a, [bf16]>),
    /// f32, or f16 widened.
    F32(Cow<'a, [f32]>),
}

impl Elements<'_> {
    /// Number of elements.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Bf16(values) => values.len(),
            Self::F32(values) => values.len(),
        }
    }
}

impl BaseFiles {
    /// Opens a folder in Hugging Face layout. Tensors come from `model.safetensors`, else from the
    /// files of `model.safetensors.index.json`, else from every `*.safetensors` file.
    pub fn open(dir: &Path) -> Result<Self, BaseError> {
        let mut texts = BTreeMap::new();
        for name in TEXT_FILES {
            if let Some(text) = read_text(&dir.join(name))? {
                texts.insert(name, Content::Read(text));
            }
        }
        let present = file_names(dir)?;
        let names = shard_names(&present, || {
            read_text(&dir.join(INDEX))?.ok_or_else(|| BaseError::file(INDEX, "is missing"))
        })?;
        let shard = |file: String| {
            let content = Content::Mapped(map(&dir.join(&file))?);
            Ok(Shard { file, content })
        };
        let shards = names.into_iter().map(shard).collect::<Result<_, BaseError>>()?;
        Self::check(texts, shards)
    }

    /// As [`BaseFiles::open`] over files compiled into the binary, given by name.
    pub fn from_bytes(files: &[(&str, &'static [u8])]) -> Result<Self, BaseError> {
        let find = |name: &str| files.iter().find(|file| file.0 == name).map(|file| file.1);
        let texts = TEXT_FILES
            .iter()
            .filter_map(|name| Some((*name, Content::Embedded(find(name)?))))
            .collect();
        let present: Vec<String> = files.iter().map(|file| file.0.to_owned()).collect();
        let names = shard_names(&present, || {
            let index = find(INDEX).ok_or_else(|| BaseError::file(INDEX, "is missing"))?;
            Ok(index.to_vec())
        })?;
        let shard = |file: String| match find(&file) {
            Some(bytes) => Ok(Shard { file, content: Content::Embedded(bytes) }),
            None => Err(BaseError::file(file, "is missing")),
        };
        let shards = names.into_iter().map(shard).collect::<Result<_, BaseError>>()?;
        Self::check(texts, shards)
    }

    fn check(
        texts: BTreeMap<&'static str, Content>,
        shards: Vec<Shard>,
    ) -> Result<Self, BaseError> {
        let missing = || BaseError::file(CONFIG, "is missing");
        let config = texts.get(CONFIG).ok_or_else(missing)?;
        let config = BaseConfig::parse(config.bytes(), texts.get(GENERATION).map(Content::bytes))?;
        let tensors = collect_tensors(&shards, &config)?;
        let files = Self { config, texts, shards, tensors };
        files.check_tensors()?;
        Ok(files)
    }

    fn check_tensors(&self) -> Result<(), BaseError> {
        let table = expected(&self.config);
        for want in &table {
            let Some(tensor) = self.tensors.get(&want.name) else {
                if want.zero {
                    continue;
                }
                return Err(BaseError::tensor(&want.name, "is missing"));
            };
            if tensor.entry.shape != want.shape {
                let reason = format!(
                    "has shape {:?}, {CONFIG} promises {:?}",
                    tensor.entry.shape, want.shape
                );
                return Err(BaseError::tensor(&want.name, reason));
            }
            let (bytes, stored) = self.raw(&want.name)?;
            if want.zero && safetensor::to_f32(bytes, stored).iter().any(|value| *value != 0.0) {
                let reason = "is not zero: a bias of the output projection is not supported";
                return Err(BaseError::tensor(&want.name, reason));
            }
        }
        let names: std::collections::BTreeSet<_> = table.iter().map(|want| &want.name).collect();
        match self.tensors.keys().find(|name| !names.contains(name)) {
            Some(name) => {
                let reason =
                    format!("is none of a {:?} base as {CONFIG} has it", self.config.family);
                Err(BaseError::tensor(name, reason))
            }
            None => Ok(()),
        }
    }

    /// What `config.json` says.
    pub fn config(&self) -> &BaseConfig {
        &self.config
    }

    /// A text file of [`TEXT_FILES`], where it is there.
    pub fn text(&self, name: &str) -> Option<&[u8]> {
        self.texts.get(name).map(Content::bytes)
    }

    /// Bytes of all tensors, as stored.
    pub fn tensor_bytes(&self) -> usize {
        self.tensors.values().map(|tensor| tensor.entry.bytes.len()).sum()
    }

    fn raw(&self, name: &str) -> Result<(&[u8], Stored), BaseError> {
        let Some(tensor) = self.tensors.get(name) else {
            return Err(BaseError::tensor(name, "is missing"));
        };
        let stored = tensor.entry.stored.clone();
        let stored = stored.map_err(|reason| BaseError::tensor(name, reason))?;
        let bytes = &self.shards[tensor.shard].content.bytes()[tensor.entry.bytes.clone()];
        Ok((bytes, stored))
    }

    /// Elements of a tensor of the table, row-major.
    pub(super) fn elements(&self, name: &str) -> Result<Elements<'_>, BaseError> {
        let (bytes, stored) = self.raw(name)?;
        Ok(match stored {
            Stored::Bf16 => Elements::Bf16(safetensor::elements(bytes)),
            Stored::F16 | Stored::F32 => Elements::F32(safetensor::to_f32(bytes, stored)),
        })
    }

    /// SHA-256, in hex, of the text files and of every tensor's name, shape, type and content, in
    /// name order: the same for a base however it is split into files. Of tensors that sum to more
    /// than 2 GiB only the first, middle and last 64 KiB of each are read, so that start stays
    /// fast.
    pub fn fingerprint(&self) -> Result<String, BaseError> {
        let mut hash = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        for (name, text) in &self.texts {
            field(name.as_bytes());
            field(text.bytes());
        }
        let sampled = self.tensor_bytes() > WHOLE_HASH_LIMIT_BYTES;
        for (name, tensor) in &self.tensors {
            let (bytes, stored) = self.raw(name)?;
            field(name.as_bytes());
            field(format!("{} {:?}", stored.name(), tensor.entry.shape).as_bytes());
            if sampled && bytes.len() > 3 * SAMPLE_BYTES {
                let middle = (bytes.len() - SAMPLE_BYTES) / 2;
                for start in [0, middle, bytes.len() - SAMPLE_BYTES] {
                    field(&bytes[start..start + SAMPLE_BYTES]);
                }
            } else {
                field(bytes);
            }
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// Which of the files `present` hold the tensors.
fn shard_names(
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

fn collect_tensors(
    shards: &[Shard],
    config: &BaseConfig,
) -> Result<BTreeMap<String, Tensor>, BaseError> {
    let mut tensors = BTreeMap::new();
    for (shard, Shard { file, content }) in shards.iter().enumerate() {
        let entries = safetensor::read_entries(content.bytes());
        for (name, entry) in entries.map_err(|reason| BaseError::file(file, reason))? {
            if ignorable(&name, config) {
                continue;
            }
            if let Some(Tensor { shard: other, .. }) = tensors.get(&name) {
                let other: &usize = other;
                let reason = format!("lies in both {} and {file}", shards[*other].file);
                return Err(BaseError::tensor(name, reason));
            }
            tensors.insert(name, Tensor { shard, entry });
        }
    }
    Ok(tensors)
}

fn io_fault(path: &Path) -> impl FnOnce(std::io::Error) -> BaseError {
    let path = path.display().to_string();
    move |source| BaseError::Io { path, source }
}

fn file_names(dir: &Path) -> Result<Vec<String>, BaseError> {
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

fn read_text(path: &Path) -> Result<Option<Vec<u8>>, BaseError> {
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

fn map(path: &Path) -> Result<Mmap, BaseError> {
    let file = File::open(path).map_err(io_fault(path))?;
    // SAFETY: the map is read only. Its bytes are used as plain numbers, for which every pattern
    // is valid, and all offsets are checked against the length at mapping. What remains is that
    // another process changes or cuts the file meanwhile; whoever serves a base must not do that
    // (a cut ends the process with SIGBUS), as the module's documentation says.
    unsafe { Mmap::map(&file) }.map_err(io_fault(path))
}
