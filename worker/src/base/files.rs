//! A base's files: configuration, texts and memory-mapped tensors, all checked at opening.
//!
//! Afterwards every tensor that the configuration promises is there once, with its shape, in bf16,
//! f16 or f32. Files may also be bytes compiled into the binary. The files of a running base must
//! not be changed: they are mapped, not copied.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use half::bf16;

use super::config::BaseConfig;
use super::error::BaseError;
use super::folder::{Content, INDEX, file_names, map, read_text, shard_names};
use super::safetensor::{self, Entry, Stored};
use super::tensors::{expected, ignorable};

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";

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

struct Shard {
    file: String,
    content: Content,
}

pub(super) struct Tensor {
    shard: usize,
    pub(super) entry: Entry,
}

/// A base's files, checked.
pub struct BaseFiles {
    config: BaseConfig,
    pub(super) texts: BTreeMap<&'static str, Content>,
    shards: Vec<Shard>,
    pub(super) tensors: BTreeMap<String, Tensor>,
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
        let names: BTreeSet<_> = table.iter().map(|want| &want.name).collect();
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

    /// Bytes of a tensor and how they are stored.
    pub(super) fn raw(&self, name: &str) -> Result<(&[u8], Stored), BaseError> {
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
