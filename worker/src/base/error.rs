//! Faults of a base model's files: each is one line that names the file and the field or tensor.

use super::json::{FieldError, quoted};

/// Longest file or tensor name in an error, in characters: paths are longer than tensor names.
const NAME_CHARS: usize = 400;

/// Why a base cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// A file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// A field of a JSON file is missing, malformed or names something unsupported.
    #[error("{file}: {fault}")]
    Field {
        /// The file.
        file: &'static str,
        /// The field and what is wrong with it.
        fault: FieldError,
    },
    /// A file as a whole is missing or malformed.
    #[error("{file}: {reason}")]
    File {
        /// The file.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor is missing or is not what the configuration promises.
    #[error("tensor `{name}`: {reason}")]
    Tensor {
        /// Its name in the safetensors file.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The device could not take the weights.
    #[error(transparent)]
    Device(#[from] kernels::Error),
}

impl BaseError {
    pub(super) fn file(file: impl Into<String>, reason: impl ToString) -> Self {
        Self::File { file: quoted(&file.into(), NAME_CHARS), reason: reason.to_string() }
    }

    pub(super) fn tensor(name: impl Into<String>, reason: impl ToString) -> Self {
        Self::Tensor { name: quoted(&name.into(), NAME_CHARS), reason: reason.to_string() }
    }
}
