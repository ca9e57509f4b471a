//! What jobs train on here: full rows of random tokens, or chats read with the demo base's
//! tokenizer and template.

use super::args::Grid;
use super::random::Random;
use crate::embedded;
use anyhow::{Context, bail};
use serde_json::Map;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::sync::Arc;
use worker::dataset::{self, Encoder, Purpose, ReadError};
use worker::text::{ChatTemplate, Text, Tokenizer};
use worker::train::{Example, Sequence};

/// The demo base's tokenizer: whatever base is measured, its first ids are these.
pub fn tokenizer() -> anyhow::Result<Tokenizer> {
    let files = embedded::open()?;
    let json = files.text("tokenizer.json").context("the demo base has no tokenizer")?;
    Ok(Tokenizer::from_bytes(json)?)
}

/// Examples of full rows, every one trained.
pub fn full_rows(random: &mut Random, grid: Grid, steps: usize, vocab: usize) -> Vec<Example> {
    let sequence = |random: &mut Random| {
        let tokens = random.tokens(grid.length + 1, vocab);
        Sequence { trained: vec![true; tokens.len()], tokens }
    };
    (0..grid.count * steps).map(|_| vec![sequence(random)]).collect()
}

/// The chats of a file, cut where they are longer than `max_tokens`. Ids that a base of a smaller
/// vocabulary has not become others, as it has no words for them anyway.
pub fn chats(path: &Path, max_tokens: usize, vocab: usize) -> anyhow::Result<Arc<Vec<Example>>> {
    let files = embedded::open()?;
    let template =
        ChatTemplate::parse(files.text("tokenizer_config.json"), files.text("chat_template.jinja"));
    let text = Text { tokenizer: tokenizer()?, template: template? };
    let encoder = Encoder {
        text: &text,
        end_tokens: &files.config().end_tokens,
        max_tokens,
        template_kwargs: &Map::new(),
        unix_time: 0,
    };
    let file = File::open(path).with_context(|| format!("--data {}", path.display()))?;
    let dataset = match dataset::read(BufReader::new(file), Purpose::Training) {
        Ok(dataset) => dataset,
        Err(ReadError::Io(error)) => return Err(error.into()),
        Err(ReadError::Fault(fault)) => bail!("--data {}: {}", path.display(), fault.message),
    };
    let mut examples = Vec::with_capacity(dataset.examples.len());
    for example in &dataset.examples {
        let sequence = |sequence: dataset::Sequence| Sequence {
            tokens: sequence.tokens.into_iter().map(|id| id % vocab as u32).collect(),
            trained: sequence.trained,
        };
        let sequences: Example =
            encoder.encode(example)?.sequences.into_iter().map(sequence).collect();
        if !sequences.is_empty() {
            examples.push(sequences);
        }
    }
    Ok(Arc::new(examples))
}
