//! Fine-tuning jobs: what each trains next, and the micro-batch that is under way.
//!
//! Yields micro-batches and owns no loop: the engine drives. Plain data, no device, no storage.

pub mod auto;
mod cursor;
mod fields;
pub mod metrics;
pub mod order;
pub mod pack;
pub mod resume;
pub mod schedule;
pub mod spec;
mod tally;
mod trainer;

pub use cursor::{Cursor, Item, ItemResult, Kind, Slice};
pub use metrics::StepMetrics;
pub use spec::{JobSpec, LoraSpec, TrainingSpec};
pub use trainer::{Due, Next, Stage, Trainer};

/// A run of tokens that goes through the model as one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sequence {
    /// All tokens `(n)`.
    pub tokens: Vec<u32>,
    /// Whether each token is trained, that is, predicted from the ones before it `(n)`.
    pub trained: Vec<bool>,
}

impl Sequence {
    /// Rows it takes: its last token predicts nothing.
    pub fn rows(&self) -> usize {
        self.tokens.len().saturating_sub(1)
    }

    /// Label of row `row`, if its next token is trained.
    pub fn label(&self, row: usize) -> Option<u32> {
        self.trained[row + 1].then(|| self.tokens[row + 1])
    }

    /// Number of trained tokens; the first token has nothing before it and never counts.
    pub fn labels(&self) -> usize {
        self.trained.iter().skip(1).filter(|trained| **trained).count()
    }
}

/// A training example: as a rule one sequence, more where the chat template shows an answer
/// otherwise once the conversation went on.
pub type Example = Vec<Sequence>;
