//! Names of objects, and reading them back. Nothing a client wrote ever becomes part of one.

use std::fmt;

use object_store::path::Path as StorePath;

use crate::error::{Error, Result};
use crate::ids::IdKind;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// In place of a job, for adapters that came from outside.
const IMPORTED: &str = "imported";

/// Names an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ObjectKey {
    /// An uploaded or result file.
    File {
        /// `file-…`
        id: String,
    },
    /// `adapter_config.json` of an adapter.
    AdapterConfig {
        /// Its folder, as the row names it.
        object: String,
    },
    /// `adapter_model.safetensors` of an adapter.
    AdapterWeights {
        /// Its folder, as the row names it.
        object: String,
    },
    /// Everything needed to resume a job.
    ResumePoint {
        /// `ftjob-…`
        job: String,
        /// The attempt that wrote it.
        attempt: i64,
        /// Optimizer steps done.
        step: i64,
    },
}

/// Kinds of objects, to list them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectKind {
    /// Files.
    Files,
    /// Adapters.
    Adapters,
    /// Resume points.
    ResumePoints,
}

/// Folder of an adapter a job wrote at a step of an attempt.
pub fn job_adapter_folder(job: &str, attempt: i64, step: i64) -> String {
    format!("adapters/{job}/{attempt}-{step}")
}

/// Folder of an imported adapter; `import` is a fresh random name.
pub fn imported_adapter_folder(import: &str) -> String {
    format!("adapters/{IMPORTED}/{import}")
}

impl ObjectKind {
    pub(crate) fn folder(self) -> &'static str {
        match self {
            Self::Files => "files",
            Self::Adapters => "adapters",
            Self::ResumePoints => "resume-points",
        }
    }
}

impl ObjectKey {
    pub(super) fn path(&self) -> Result<StorePath> {
        checked(self.to_string())
    }

    /// The key whose object has this name; none for a name that no key has.
    pub fn parse(name: &str) -> Option<Self> {
        let segments: Vec<&str> = name.split('/').collect();
        let key = match segments[..] {
            ["files", id] => Self::File { id: of_kind(id, IdKind::File)? },
            ["resume-points", job, numbers] => {
                let (attempt, step) = pair(numbers)?;
                Self::ResumePoint { job: of_kind(job, IdKind::Job)?, attempt, step }
            }
            ["adapters", owner, last, file] => {
                if owner != IMPORTED {
                    of_kind(owner, IdKind::Job)?;
                    pair(last)?;
                }
                let object = format!("adapters/{owner}/{last}");
                match file {
                    CONFIG => Self::AdapterConfig { object },
                    WEIGHTS => Self::AdapterWeights { object },
                    _ => return None,
                }
            }
            _ => return None,
        };
        // Numbers have one spelling only.
        key.path().is_ok_and(|path| path.as_ref() == name).then_some(key)
    }
}

impl fmt::Display for ObjectKey {
    /// The object's name.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { id } => write!(formatter, "files/{id}"),
            Self::AdapterConfig { object } => write!(formatter, "{object}/{CONFIG}"),
            Self::AdapterWeights { object } => write!(formatter, "{object}/{WEIGHTS}"),
            Self::ResumePoint { job, attempt, step } => {
                write!(formatter, "resume-points/{job}/{attempt}-{step}")
            }
        }
    }
}

fn of_kind(id: &str, kind: IdKind) -> Option<String> {
    id.starts_with(kind.prefix()).then(|| id.to_owned())
}

fn pair(text: &str) -> Option<(i64, i64)> {
    let (one, two) = text.split_once('-')?;
    Some((one.parse().ok()?, two.parse().ok()?))
}

/// Only plain segments: ids and folders come from our rows, and a wrong one must not leave the
/// store's root.
fn checked(text: String) -> Result<StorePath> {
    let plain = text.split('/').all(|segment| {
        !segment.is_empty()
            && !segment.starts_with('.')
            && segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    });
    match StorePath::parse(&text) {
        Ok(path) if plain => Ok(path),
        _ => Err(Error::ObjectName(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        let (job, folder) = ("ftjob-a".to_owned(), job_adapter_folder("ftjob-a", 3, 40));
        for key in [
            ObjectKey::File { id: "file-a".to_owned() },
            ObjectKey::AdapterConfig { object: folder.clone() },
            ObjectKey::AdapterWeights { object: folder },
            ObjectKey::AdapterWeights { object: imported_adapter_folder("x") },
            ObjectKey::ResumePoint { job, attempt: 2, step: 7 },
        ] {
            let name = key.path().expect("a name").to_string();
            assert_eq!(ObjectKey::parse(&name), Some(key), "{name}");
        }
    }

    #[test]
    fn other_names_are_no_keys() {
        for name in [
            "",
            "files",
            "files/",
            "files/notes.txt",
            "files/file-a/b",
            "files/file-ü",
            "installation",
            "adapters/imported/x/readme.md",
            "adapters/imported/x",
            "adapters/other/x/adapter_config.json",
            "adapters/ftjob-a/3/adapter_config.json",
            "resume-points/ftjob-a/03-7",
            "resume-points/ftjob-a/+3-7",
            "resume-points/ftjob-a/3-x",
            "resume-points/job/3-7",
        ] {
            assert_eq!(ObjectKey::parse(name), None, "{name}");
        }
    }
}
