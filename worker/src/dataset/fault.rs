//! Faults of a training file as a failed job reports them.

use std::io;

use thiserror::Error;

use super::{Format, Purpose};

/// Faults listed in one message.
pub(super) const FAULTS_MAX: usize = 10;

/// Why a file cannot be trained on: the `error` of the failed job.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct FileFault {
    /// `invalid_n_examples`, `invalid_training_file` or `invalid_validation_file`.
    pub code: &'static str,
    /// All faults found, at most ten.
    pub message: String,
    /// `training_file` or `validation_file`.
    pub param: &'static str,
}

/// Why a file could not be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// Its content is at fault, for good.
    #[error(transparent)]
    Fault(#[from] FileFault),
    /// Reading it failed; another attempt may succeed.
    #[error("the file cannot be read: {0}")]
    Io(#[from] io::Error),
}

impl Purpose {
    /// Least number of examples.
    pub(super) fn examples_min(self) -> usize {
        match self {
            Self::Training => 10,
            Self::Validation => 1,
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::Validation => "validation",
        }
    }

    fn param(self) -> &'static str {
        match self {
            Self::Training => "training_file",
            Self::Validation => "validation_file",
        }
    }
}

impl FileFault {
    /// Faults of the file's content, in order.
    pub(super) fn content(purpose: Purpose, faults: &[String]) -> Self {
        let code = match purpose {
            Purpose::Training => "invalid_training_file",
            Purpose::Validation => "invalid_validation_file",
        };
        let message = format!(
            "The job failed due to an invalid {} file. Invalid file format. {}",
            purpose.noun(),
            faults.join("; ")
        );
        Self { code, message, param: purpose.param() }
    }

    /// Too few examples.
    pub(super) fn count(purpose: Purpose, count: usize) -> Self {
        let name = match purpose {
            Purpose::Training => "Training",
            Purpose::Validation => "Validation",
        };
        let least = purpose.examples_min();
        let plural = if least == 1 { "" } else { "s" };
        let message = format!(
            "{name} file has {count} example(s), but must have at least {least} example{plural}"
        );
        Self { code: "invalid_n_examples", message, param: purpose.param() }
    }

    /// A file whose format the job's method does not train on; `method` is `supervised` or `dpo`.
    pub fn wrong_format(purpose: Purpose, file_id: &str, format: Format, method: &str) -> Self {
        let fault = format!(
            "Input file {file_id} is in the {} format, but the job uses method={method}",
            format.as_str()
        );
        Self::content(purpose, &[fault])
    }
}
