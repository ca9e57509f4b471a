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
use crate::text::spellings::Control;
use crate::text::{Conversation, Ending, Message, Rendered, Role, Text, TextError, TokenizerError};

/// Stands for a message's content where only the text before it is of interest.
const PLACEHOLDER: &str = "\u{f0000}";
/// Longest text of a template between the generation prompt and an answer's content, in bytes.
const ANSWER_HEADER_MAX: usize = 256;

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

/// What follows a prompt.
struct Answer {
    tokens: Vec<u32>,
    /// As in [`Growing`], of prompt and answer together.
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
            Example::Preference { .. } => return Err(EncodeError::Preference),
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

    fn render(
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

    /// What the model has to generate after `prompt` to say message `index`.
    fn answer(&self, chat: &Chat, index: usize, prompt: &Rendered) -> Result<Answer, EncodeError> {
        let closed = self.render(chat, &chat.messages[..=index], Ending::Closed)?;
        if !closed.text.starts_with(&prompt.text) {
            let start = self.answer_start(chat, index, prompt, &closed)?;
            return self.loose_answer(&closed, start);
        }
        let Some(tokens) = self.tokens_behind(prompt, &closed)? else {
            return self.loose_answer(&closed, prompt.text.len());
        };
        let (tokens, turn_end) = self.until_turn_end(tokens)?;
        let exact = turn_end.and_then(|nth| {
            let earlier = prompt.controls.len();
            let last = earlier + nth;
            let end = closed.controls.get(last)?.range.end;
            let text = closed.text[..end].to_owned();
            Some((Rendered { text, controls: closed.controls[..=last].to_vec() }, last))
        });
        Ok(Answer { tokens, exact })
    }

    /// The tokens that `closed` has after those of `prompt`, if it starts with those. Both are
    /// tokenised from the prompt's last control token on.
    fn tokens_behind(
        &self,
        prompt: &Rendered,
        closed: &Rendered,
    ) -> Result<Option<Vec<u32>>, EncodeError> {
        let tokenizer = &self.text.tokenizer;
        let shared = prompt.controls.len();
        if closed.controls.get(..shared) != Some(&prompt.controls[..]) {
            return Ok(None);
        }
        let (before, all) = match shared.checked_sub(1) {
            Some(last) => {
                (tokenizer.encode_after(prompt, last)?, tokenizer.encode_after(closed, last)?)
            }
            None => (tokenizer.encode_rendered(prompt)?, tokenizer.encode_rendered(closed)?),
        };
        Ok(all.strip_prefix(&before[..]).map(<[u32]>::to_vec))
    }

    /// Where the answer starts in `closed` when that does not start with the prompt. Found with
    /// another answer, whose own text cannot be taken for the template's.
    fn answer_start(
        &self,
        chat: &Chat,
        index: usize,
        prompt: &Rendered,
        closed: &Rendered,
    ) -> Result<usize, EncodeError> {
        let before = self.render(chat, &chat.messages[..index], Ending::Closed)?;
        let mut messages = chat.messages[..index].to_vec();
        messages.push(Message::new(Role::Assistant, PLACEHOLDER));
        let probe = self.render(chat, &messages, Ending::Closed)?;
        let content = probe.text.rfind(PLACEHOLDER);
        // The generation prompt may hold more than the conversation does (an opened think
        // block): the answer starts behind what both have in common.
        let header = common_prefix(&probe.text, &prompt.text);
        let whole_context = header >= common_prefix(&before.text, &prompt.text);
        let start = match content {
            Some(_) if whole_context => Some(header),
            Some(content) => start_behind(&probe.text[..content], prompt),
            None => None,
        };
        start
            .filter(|start| closed.text.get(..*start) == probe.text.get(..*start))
            .ok_or(EncodeError::Unaligned(index + 1))
    }

    /// The answer when its tokens are not those of prompt and answer together: tokenised alone.
    fn loose_answer(&self, closed: &Rendered, start: usize) -> Result<Answer, EncodeError> {
        let behind = closed.controls.iter().filter(|control| control.range.start >= start);
        let moved = |control: &Control| Control {
            range: control.range.start - start..control.range.end - start,
            id: control.id,
        };
        let tail = Rendered {
            text: closed.text[start..].to_owned(),
            controls: behind.map(moved).collect(),
        };
        let tokens = self.text.tokenizer.encode_continued(&tail)?;
        Ok(Answer { tokens: self.until_turn_end(tokens)?.0, exact: None })
    }

    /// Cuts behind the end-of-turn token: the first at which serving stops, else the last
    /// control token, else one that is added. Also says the how-manieth control token it is,
    /// if it was not added.
    fn until_turn_end(
        &self,
        mut tokens: Vec<u32>,
    ) -> Result<(Vec<u32>, Option<usize>), EncodeError> {
        let is_control = |id: &u32| self.text.tokenizer.is_control(*id);
        let stops = tokens.iter().position(|id| self.end_tokens.contains(id));
        let Some(end) = stops.or_else(|| tokens.iter().rposition(is_control)) else {
            tokens.push(*self.end_tokens.first().ok_or(EncodeError::NoEndToken)?);
            return Ok((tokens, None));
        };
        tokens.truncate(end + 1);
        let controls = tokens.iter().filter(|id| is_control(id)).count();
        let last_is_control = tokens.last().is_some_and(is_control);
        Ok((tokens, controls.checked_sub(1).filter(|_| last_is_control)))
    }
}

impl Sequence {
    fn add(&mut self, tokens: &[u32], trained: bool) {
        self.tokens.extend(tokens);
        self.trained.resize(self.tokens.len(), trained);
    }
}

/// Where an answer starts in `text`, which ends where its content starts, if the template changed
/// something earlier (Mistral moves the system message to the last user message): behind that
/// part of the prompt's end which stands here too and holds a control token.
fn start_behind(text: &str, prompt: &Rendered) -> Option<usize> {
    let last_control = prompt.controls.last()?;
    let least = prompt.text.len() - last_control.range.start;
    let places = text.char_indices().map(|(at, _)| at).chain([text.len()]);
    let nearest = places.filter(|at| text.len() - at <= ANSWER_HEADER_MAX);
    nearest
        .map(|at| (common_suffix(&text[..at], &prompt.text), at))
        .filter(|(len, _)| *len >= least)
        .max()
        .map(|(_, at)| at)
}

/// Bytes that two texts end with alike.
fn common_suffix(first: &str, second: &str) -> usize {
    first.bytes().rev().zip(second.bytes().rev()).take_while(|(a, b)| a == b).count()
}

/// Bytes that two texts start with alike, in whole characters.
fn common_prefix(first: &str, second: &str) -> usize {
    let pairs = first.char_indices().zip(second.chars());
    let differs = pairs.into_iter().find(|((_, a), b)| a != b);
    differs.map_or(first.len().min(second.len()), |((at, _), _)| at)
}
