//! One choice of a request while it runs: its tokens, blocks and slot. Plain data.

use super::blocks::Block;
use super::command::{Finish, RequestKey, SamplingSpec, Target};
use crate::adapters::registry::Slot;
use crate::text::Detokenizer;
use std::sync::Arc;

/// Number of a sequence; ascending with admission.
pub type SequenceId = u64;

/// What the choices of a request share.
#[derive(Debug)]
pub struct Shared {
    /// The request.
    pub request: RequestKey,
    /// What it runs on.
    pub target: Target,
    /// Drawing.
    pub sampling: SamplingSpec,
    /// Tokens that end a choice.
    pub end_tokens: Vec<u32>,
    /// End tokens are banned before so many generated tokens.
    pub min_tokens: u32,
}

/// See the module.
pub struct Sequence {
    /// Shared parameters.
    pub shared: Arc<Shared>,
    /// Choice index.
    pub choice: u32,
    /// Prompt and generated tokens.
    pub tokens: Vec<u32>,
    /// Length of the prompt.
    pub prompt_len: usize,
    /// Longest length, prompt included.
    pub max_len: usize,
    /// Tokens whose keys and values are cached.
    pub cached: usize,
    /// KV blocks, in order.
    pub blocks: Vec<Block>,
    /// Adapter slot it reads, none: the base alone.
    pub slot: Option<Slot>,
    /// Rank of that adapter, 0: none.
    pub rank: usize,
    /// Text state.
    pub detokenizer: Detokenizer,
}

impl Sequence {
    /// Tokens generated so far.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Whether drawing looks at the tokens so far.
    pub fn penalised(&self) -> bool {
        let sampling = &self.shared.sampling;
        sampling.presence_penalty != 0.0
            || sampling.frequency_penalty != 0.0
            || sampling.repetition_penalty != 1.0
    }

    /// Most pairs of token and count that drawing may come to need.
    pub fn history_bound(&self) -> usize {
        if self.penalised() { self.max_len } else { 0 }
    }

    /// Tokens that still have to go through the model before the next can be drawn.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.cached
    }

    /// Whether it only needs its last token's row.
    pub fn decodes(&self) -> bool {
        self.pending() == 1 && self.cached > 0
    }

    /// Appends a drawn token: its index among the generated ones, and whether it is the last. Stop
    /// texts are not looked for yet.
    pub fn append(&mut self, id: u32) -> (u32, Option<Finish>) {
        let index = self.generated() as u32;
        self.tokens.push(id);
        let finish = if self.shared.end_tokens.contains(&id) {
            Some(Finish::Stop)
        } else if self.tokens.len() >= self.max_len {
            Some(Finish::Length)
        } else {
            None
        };
        (index, finish)
    }

    /// Text that became certain with an appended token, and how the choice ends with it.
    pub fn speak(
        &mut self,
        index: u32,
        id: u32,
        finish: Option<Finish>,
    ) -> (String, Option<Finish>) {
        if finish == Some(Finish::Stop) {
            return (self.detokenizer.finish(), finish);
        }
        self.detokenizer.arm_stops(index >= self.shared.min_tokens);
        let delta = self.detokenizer.push(id);
        let mut text = delta.text;
        if delta.stopped {
            return (text, Some(Finish::Stop));
        }
        if finish.is_some() {
            text.push_str(&self.detokenizer.finish());
        }
        (text, finish)
    }
}
