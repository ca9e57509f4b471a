//! Training files: JSONL to checked examples, and examples to token ids with the marks of what
//! is trained. Uses the serving tokenizer and chat template, so that training and serving see
//! the same prompts. Knows nothing of jobs, stores or the engine.
//!
//! - [`parse`]: reads a file and collects its faults.
//! - [`encode`]: one example to token ids.

mod answer;
mod chat;
pub mod encode;
mod fault;
mod parse;

use serde_json::Value;

pub use encode::{EncodeError, Encoded, Encoder, Sequence};
pub use fault::{FileFault, ReadError};
pub use parse::read;

use crate::text::Message;

/// What a file is for; messages and error codes name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// `training_file`, at least 10 examples.
    Training,
    /// `validation_file`, at least one example.
    Validation,
}

/// The format of a file: the same on each of its lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `{"messages": […]}`.
    Chat,
    /// `{"prompt": …, "completion": …}`.
    Completion,
    /// `{"input": …, "preferred_completion": …, "non_preferred_completion": …}`.
    Preference,
}

impl Format {
    /// The name that error messages use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Chat => "fine-tune-chat",
            Self::Completion => "fine-tune-completion",
            Self::Preference => "fine-tune-preference",
        }
    }
}

/// A checked conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Chat {
    /// At least one.
    pub messages: Vec<Message>,
    /// Per message: an assistant message whose tokens are trained.
    pub trained: Vec<bool>,
    /// Tool definitions as the file has them.
    pub tools: Vec<Value>,
    /// As the file has it; templates do not see it.
    pub parallel_tool_calls: Option<bool>,
}

/// One line of a file.
#[derive(Clone, Debug, PartialEq)]
pub enum Example {
    /// A conversation that ends with the assistant and trains at least one of its messages.
    Chat(Chat),
    /// A text and how it goes on.
    Completion {
        /// Context, not trained.
        prompt: String,
        /// Trained.
        completion: String,
    },
    /// Two answers to one conversation.
    Preference(Box<Preference>),
}

/// A conversation with a better and a worse answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Preference {
    /// Ends with a user or tool message; nothing in it is trained.
    pub input: Chat,
    /// The better answer.
    pub preferred: Message,
    /// The worse answer.
    pub non_preferred: Message,
}

/// A whole file.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// Of every example.
    pub format: Format,
    /// In the order of the file.
    pub examples: Vec<Example>,
}

#[cfg(test)]
mod tests;
