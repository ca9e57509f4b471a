//! Finds the answer in a rendered conversation by comparing it with its prompt, whatever the
//! template.

use super::Chat;
use super::encode::{EncodeError, Encoder};
use crate::text::spellings::Control;
use crate::text::{Ending, Message, Rendered, Role};

/// Stands for a message's content where only the text before it is of interest.
const PLACEHOLDER: &str = "\u{f0000}";
/// Longest text of a template between the generation prompt and an answer's content, in bytes.
const ANSWER_HEADER_MAX: usize = 256;

/// What follows a prompt.
pub(super) struct Answer {
    pub(super) tokens: Vec<u32>,
    /// The text of prompt and answer together and the index of the control token that ends
    /// it, if tokenising that text gives the prompt's tokens and these.
    pub(super) exact: Option<(Rendered, usize)>,
}

impl Encoder<'_> {
    /// What the model has to generate after `prompt` to say message `index`.
    pub(super) fn answer(
        &self,
        chat: &Chat,
        index: usize,
        prompt: &Rendered,
    ) -> Result<Answer, EncodeError> {
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
