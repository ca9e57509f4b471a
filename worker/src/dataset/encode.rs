//! One example to token ids, with marks on those that are trained.
//!
//! For each trained assistant message the prompt is exactly what serving renders for the messages
//! before it, and what is trained is exactly what the model would have to generate after that
//! prompt: the message's tokens and its end-of-turn token. Nothing is assumed of the template
//! but that it renders; it is compared with itself, with and without the answer.
//!
//! As a rule one sequence holds all trained messages of an example. A template that shows an
//! answer otherwise once the conversation went on (Qwen3 drops earlier reasoning) yields one
//! sequence per answer that does not fit the text before it.

use serde_json::{Map, Value};
use thiserror::Error;

use super::{Chat, Example};
use crate::text::{Conversation, Ending, Message, Rendered, Text, TextError, TokenizerError};

/// Why an example could not be encoded. The example or the base's template is at fault.
#[derive(Debug, Error)]
pub enum EncodeError {
    /// The template refused it, or there is none; or the tokenizer failed.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The template gives no way to tell the answer from the prompt.
    #[error(
        "message {0}: the model's chat template renders the messages before it differently with \
         and without it, so that no prompt can be told from the answer"
    )]
    Unaligned(usize),
    /// Neither the template nor the base ends a turn with a token of its own.
    #[error("the model has no end-of-turn token to train on")]
    NoEndToken,
    /// Preference pairs have no single answer.
    #[error("preference examples cannot be encoded for supervised training")]
    Preference,
}

impl From<TokenizerError> for EncodeError {
    fn from(error: TokenizerError) -> Self {
        Self::Text(error.into())
    }
}

/// Token ids of one forward pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sequence {
    /// All tokens, the begin token included.
    pub tokens: Vec<u32>,
    /// Per token: it is a target, to be predicted from the tokens before it. Never the first.
    pub trained: Vec<bool>,
}

/// One example encoded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Nearly always one. None when nothing trainable remains within the length limit.
    pub sequences: Vec<Sequence>,
    /// Whether tokens were cut off at the end.
    pub truncated: bool,
}

/// Encodes the examples of one job.
#[derive(Clone, Debug)]
pub struct Encoder<'a> {
    /// Tokenizer and chat template that also serve the base.
    pub text: &'a Text,
    /// Token ids that end generation when the base serves, the most usual first.
    pub end_tokens: &'a [u32],
    /// Longest sequence, in tokens.
    pub max_tokens: usize,
    /// Template variables that serving sets by default.
    pub template_kwargs: &'a Map<String, Value>,
    /// The time that templates see: the job's creation, whenever it runs.
    pub unix_time: i64,
}

/// A sequence while answers are added to it.
#[derive(Default)]
struct Growing {
    sequence: Sequence,
    /// The text it spells and the index of the control token that ends it, if tokenising that
    /// text gives these very tokens.
    exact: Option<(Rendered, usize)>,
}

impl Encoder<'_> {
    /// Encodes one example.
    pub fn encode(&self, example: &Example) -> Result<Encoded, EncodeError> {
        let sequences = match example {
            Example::Chat(chat) => self.chat(chat)?,
            Example::Completion { prompt, completion } => {
                vec![self.completion(prompt, completion)?]
            }
            Example::Preference(_) => return Err(EncodeError::Preference),
        };
        Ok(self.limited(sequences))
    }

    /// Cuts sequences at the length limit and drops those without a target.
    fn limited(&self, sequences: Vec<Sequence>) -> Encoded {
        let mut encoded = Encoded::default();
        for mut sequence in sequences {
            encoded.truncated |= sequence.tokens.len() > self.max_tokens;
            sequence.tokens.truncate(self.max_tokens);
            sequence.trained.truncate(self.max_tokens);
            if let Some(first) = sequence.trained.first_mut() {
                *first = false;
            }
            if sequence.trained.contains(&true) {
                encoded.sequences.push(sequence);
            }
        }
        encoded
    }

    fn completion(&self, prompt: &str, completion: &str) -> Result<Sequence, EncodeError> {
        let tokenizer = &self.text.tokenizer;
        let end = *self.end_tokens.first().ok_or(EncodeError::NoEndToken)?;
        let tokens = tokenizer.encode_plain(prompt, true)?;
        let whole = tokenizer.encode_plain(&format!("{prompt}{completion}"), true)?;
        let mut answer = match whole.strip_prefix(&tokens[..]) {
            Some(rest) => rest.to_vec(),
            None => {
                let text = completion.to_owned();
                tokenizer.encode_continued(&Rendered { text, controls: Vec::new() })?
            }
        };
        answer.push(end);
        let mut sequence = Sequence { trained: vec![false; tokens.len()], tokens };
        sequence.add(&answer, true);
        Ok(sequence)
    }

    fn chat(&self, chat: &Chat) -> Result<Vec<Sequence>, EncodeError> {
        let mut done = Vec::new();
        let mut growing = Growing::default();
        for (index, _) in chat.trained.iter().enumerate().filter(|(_, trained)| **trained) {
            let prompt = self.render(chat, &chat.messages[..index], Ending::Open)?;
            let prompt_tokens = self.prompt_tokens(&prompt, &growing)?;
            match prompt_tokens.strip_prefix(&growing.sequence.tokens[..]) {
                Some(new) => growing.sequence.add(new, false),
                None => {
                    let mut sequence = Sequence::default();
                    sequence.add(&prompt_tokens, false);
                    done.push(std::mem::replace(&mut growing.sequence, sequence));
                }
            }
            let answer = self.answer(chat, index, &prompt)?;
            growing.sequence.add(&answer.tokens, true);
            growing.exact = answer.exact;
            if growing.sequence.tokens.len() > self.max_tokens {
                break;
            }
        }
        done.push(growing.sequence);
        Ok(done)
    }

    pub(super) fn render(
        &self,
        chat: &Chat,
        messages: &[Message],
        ending: Ending,
    ) -> Result<Rendered, EncodeError> {
        Ok(self.text.render(&Conversation {
            messages,
            tools: &chat.tools,
            template_kwargs: self.template_kwargs,
            ending,
            unix_time: self.unix_time,
        })?)
    }

    /// The tokens serving would make of a prompt. Those of the sequence so far are not made
    /// again where the prompt starts with its text.
    fn prompt_tokens(&self, prompt: &Rendered, growing: &Growing) -> Result<Vec<u32>, EncodeError> {
        let tokenizer = &self.text.tokenizer;
        if let Some((before, last)) = &growing.exact
            && prompt.text.starts_with(&before.text)
            && prompt.controls.get(..=*last) == before.controls.get(..=*last)
        {
            let mut tokens = growing.sequence.tokens.clone();
            tokens.extend(tokenizer.encode_after(prompt, *last)?);
            return Ok(tokens);
        }
        Ok(tokenizer.encode_rendered(prompt)?)
    }
}

impl Sequence {
    fn add(&mut self, tokens: &[u32], trained: bool) {
        self.tokens.extend(tokens);
        self.trained.resize(self.tokens.len(), trained);
    }
}
