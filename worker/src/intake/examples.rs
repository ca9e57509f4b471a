//! A job's files: object store → checked examples → token ids. The same for validation, for the
//! first start and for every resumption, so that all of them see the same tokens.

use super::Shared;
use crate::dataset::{self, Dataset, EncodeError, Encoder, FileFault, Format, Purpose, ReadError};
use crate::train::metrics::{FileRole, JobNotice};
use crate::train::{Example, Sequence};
use serde_json::Map;
use std::io::{self, BufReader, Read};
use std::sync::{Arc, Weak};
use storage::db::{JobError, JobRow};
use storage::objects::ObjectKey;

/// A file ready to train on.
pub struct Examples {
    /// Examples with something to train on, in the order of the file.
    pub examples: Vec<Example>,
    /// What the owner should know.
    pub notices: Vec<JobNotice>,
}

/// Why a file cannot be used.
#[derive(Debug)]
pub enum Unusable {
    /// The job fails.
    Fault(JobError),
    /// It may work later.
    Later(anyhow::Error),
}

impl From<anyhow::Error> for Unusable {
    fn from(error: anyhow::Error) -> Self {
        Self::Later(error)
    }
}

impl From<FileFault> for Unusable {
    fn from(fault: FileFault) -> Self {
        let FileFault { code, message, param } = fault;
        Self::Fault(JobError { code: code.to_owned(), message, param: Some(param.to_owned()) })
    }
}

/// Whether somebody still waits for the work on a file. A thread can't be dropped as a future can;
/// one that worked on would keep a worker that leaves from ending.
struct Wanted(Weak<()>);

impl Wanted {
    fn check(&self) -> io::Result<()> {
        let nobody = || io::Error::other("nobody waits for the file any more");
        if self.0.strong_count() > 0 { Ok(()) } else { Err(nobody()) }
    }
}

/// A file's bytes, as long as somebody waits.
struct WhileWanted<'a> {
    bytes: &'a [u8],
    wanted: &'a Wanted,
}

impl Read for WhileWanted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wanted.check()?;
        self.bytes.read(buffer)
    }
}

/// Reads and checks a file; encodes it with sequences of at most `max_tokens`. The work ends when
/// this is dropped.
pub async fn load(
    shared: &Arc<Shared>,
    job: &JobRow,
    purpose: Purpose,
    max_tokens: usize,
) -> Result<Examples, Unusable> {
    let id = match purpose {
        Purpose::Training => &job.training_file,
        Purpose::Validation => match &job.validation_file {
            Some(id) => id,
            None => return Ok(Examples { examples: Vec::new(), notices: Vec::new() }),
        },
    };
    let key = ObjectKey::File { id: id.clone() };
    let bytes = shared.storage.objects.get(&key).await.map_err(anyhow::Error::from)?;
    let (shared, id, created_at) = (shared.clone(), id.clone(), job.created_at);
    let waiting = Arc::new(());
    let wanted = Wanted(Arc::downgrade(&waiting));
    let work = move || -> Result<Examples, Unusable> {
        let reader = BufReader::new(WhileWanted { bytes: &bytes, wanted: &wanted });
        let dataset = match dataset::read(reader, purpose) {
            Ok(dataset) => dataset,
            Err(ReadError::Fault(fault)) => return Err(fault.into()),
            Err(ReadError::Io(error)) => return Err(Unusable::Later(error.into())),
        };
        if dataset.format == Format::Preference {
            let fault = FileFault::wrong_format(purpose, &id, dataset.format, "supervised");
            return Err(fault.into());
        }
        encode(&shared, &dataset, purpose, max_tokens, created_at, &wanted)
    };
    let worked = tokio::task::spawn_blocking(work).await;
    drop(waiting);
    match worked {
        Ok(result) => result,
        Err(error) => Err(Unusable::Later(error.into())),
    }
}

fn encode(
    shared: &Shared,
    dataset: &Dataset,
    purpose: Purpose,
    max_tokens: usize,
    unix_time: i64,
    wanted: &Wanted,
) -> Result<Examples, Unusable> {
    let template_kwargs = Map::new();
    let encoder = Encoder {
        text: &shared.text,
        end_tokens: &shared.config.end_tokens,
        max_tokens,
        template_kwargs: &template_kwargs,
        unix_time,
    };
    let (mut cut, mut dropped) = (0, 0);
    let mut examples = Vec::with_capacity(dataset.examples.len());
    for (at, example) in dataset.examples.iter().enumerate() {
        wanted.check().map_err(anyhow::Error::from)?;
        let encoded = encoder.encode(example).map_err(|error| at_fault(purpose, at, &error))?;
        let sequence = |sequence: dataset::Sequence| Sequence {
            tokens: sequence.tokens,
            trained: sequence.trained,
        };
        let sequences: Example = encoded.sequences.into_iter().map(sequence).collect();
        if sequences.is_empty() {
            dropped += 1;
            continue;
        }
        cut += usize::from(encoded.truncated);
        examples.push(sequences);
    }
    let role = match purpose {
        Purpose::Training => FileRole::Training,
        Purpose::Validation => FileRole::Validation,
    };
    let mut notices = Vec::new();
    if cut > 0 {
        notices.push(JobNotice::truncated(role, cut, max_tokens));
    }
    if dropped > 0 {
        notices.push(JobNotice::dropped(role, dropped, max_tokens));
    }
    if examples.is_empty() {
        let message = format!("nothing is left to train on within {max_tokens} tokens");
        return Err(Unusable::Fault(fault(purpose, message)));
    }
    Ok(Examples { examples, notices })
}

fn at_fault(purpose: Purpose, example: usize, error: &EncodeError) -> Unusable {
    let message = format!(
        "The job failed due to an invalid {} file. Example {}: {error}",
        name(purpose),
        example + 1
    );
    Unusable::Fault(fault(purpose, message))
}

fn fault(purpose: Purpose, message: String) -> JobError {
    let name = name(purpose);
    JobError { code: format!("invalid_{name}_file"), message, param: Some(format!("{name}_file")) }
}

fn name(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Training => "training",
        Purpose::Validation => "validation",
    }
}
