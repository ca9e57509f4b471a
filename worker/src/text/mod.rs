//! Text in, text out: chat template, tokenizer, incremental detokenizer, the same for serving and
//! for training. Knows nothing of requests, jobs, rows or the engine.
//!
//! - [`message`]: a conversation as templates see it.
//! - [`template`]: the base's chat template, rendered as `transformers` does.
//! - [`spellings`]: keeps text that clients control from becoming control tokens.
//! - [`tokenizer`]: text to ids; [`token_bytes`]: ids to bytes; [`detokenizer`]: ids to text.

mod added;
pub mod detokenizer;
mod inputs;
mod jinja;
pub mod message;
mod python;
pub mod spellings;
pub mod template;
mod template_source;
pub mod token_bytes;
pub mod tokenizer;
mod vocabulary;

use std::path::Path;

use thiserror::Error;

pub use detokenizer::{Delta, Detokenizer, TextStart};
pub use message::{Conversation, Ending, Message, Role, ToolCall};
pub use spellings::Rendered;
pub use template::{ChatTemplate, TemplateError};
pub use tokenizer::{Tokenizer, TokenizerError};

/// Why a base's text files could not be loaded, or a prompt not be made.
#[derive(Debug, Error)]
pub enum TextError {
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template; [`TemplateError::is_refusal`] says whether the conversation is at fault.
    #[error(transparent)]
    Template(#[from] TemplateError),
}

/// Tokenizer and chat template of one base.
#[derive(Debug)]
pub struct Text {
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template; bases that were never tuned to chat have none.
    pub template: Option<ChatTemplate>,
}

impl Text {
    /// Loads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` from a folder in
    /// Hugging Face layout.
    pub fn load(folder: &Path) -> Result<Self, TextError> {
        let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json"))?;
        Ok(Self { tokenizer, template: ChatTemplate::load(folder)? })
    }

    /// The prompt of a conversation as text with its control tokens.
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<Rendered, TextError> {
        let template = self.template.as_ref().ok_or(TemplateError::Missing)?;
        Ok(template.render(conversation, self.tokenizer.spellings())?)
    }

    /// The token ids of a conversation's prompt.
    pub fn chat_prompt(&self, conversation: &Conversation<'_>) -> Result<Vec<u32>, TextError> {
        Ok(self.tokenizer.encode_rendered(&self.render(conversation)?)?)
    }
}

#[cfg(test)]
pub(crate) mod tests;
