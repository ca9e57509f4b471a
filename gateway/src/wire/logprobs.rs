//! Log-probabilities on their way out: which entries have been returned with the text so far, and
//! the two shapes clients read them in.
//!
//! A token's entry leaves together with the text it belongs to, so streamed entries concatenate
//! to the list of a reply sent whole. Entries whose text a stop cut away, and the end token, are
//! never returned.

use serde::{Serialize, Serializer};
use storage::queue::message::{Finish, Token, TokenLogprob};
use utoipa::ToSchema;

/// `choice.logprobs` of chat completions.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// One entry per returned token.
    pub content: Vec<ChatTokenLogprob>,
    /// Always null.
    pub refusal: Option<Vec<ChatTokenLogprob>>,
}

/// One returned token.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatTokenLogprob {
    /// Its text; bytes that are no text alone appear as `\xNN`.
    pub token: String,
    /// Natural logarithm of its probability; −9999 stands for −∞.
    pub logprob: f32,
    /// Its exact bytes.
    pub bytes: Vec<u8>,
    /// The likeliest tokens here, descending.
    pub top_logprobs: Vec<TopLogprob>,
}

/// An alternative at one position.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TopLogprob {
    /// Its text.
    pub token: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// Its exact bytes.
    pub bytes: Vec<u8>,
}

/// `choice.logprobs` of text completions: four lists of one length.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    /// Text of each token.
    pub tokens: Vec<String>,
    /// Its log-probability.
    pub token_logprobs: Vec<f32>,
    /// The likeliest tokens by text.
    #[schema(value_type = Vec<Object>)]
    pub top_logprobs: Vec<Alternatives>,
    /// Where it starts, in characters of the returned text.
    pub text_offset: Vec<u32>,
}

/// Alternatives by text, likeliest first; an object in JSON.
#[derive(Clone, Debug, Default)]
pub struct Alternatives(Vec<(String, f32)>);

impl Serialize for Alternatives {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}

/// A token with the place of its text.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    /// What the worker reported.
    pub entry: TokenLogprob,
    /// Characters of text before it.
    pub offset_chars: u32,
}

/// Entries of one choice that wait for their text.
#[derive(Debug, Default)]
pub struct Pending {
    waiting: std::collections::VecDeque<(u64, Placed)>,
    /// Bytes and characters of all tokens seen.
    seen_bytes: u64,
    seen_chars: u32,
    /// Bytes of text returned.
    returned_bytes: u64,
}

impl Pending {
    /// Takes new tokens and the text that became certain with them; gives the entries to return
    /// with that text.
    pub fn advance(
        &mut self,
        tokens: Vec<Token>,
        text: &str,
        finish: Option<Finish>,
    ) -> Vec<Placed> {
        for entry in tokens.into_iter().filter_map(|token| token.logprob) {
            let bytes = entry.bytes.len() as u64;
            let starts = entry.bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count() as u32;
            let placed = Placed { entry, offset_chars: self.seen_chars };
            self.waiting.push_back((self.seen_bytes, placed));
            self.seen_bytes += bytes;
            self.seen_chars += starts;
        }
        self.returned_bytes += text.len() as u64;
        let all = finish == Some(Finish::Length);
        let ready =
            self.waiting.iter().take_while(|(start, _)| all || *start < self.returned_bytes);
        let count = ready.count();
        self.waiting.drain(..count).map(|(_, placed)| placed).collect()
    }
}

/// The chat shape.
pub fn chat(entries: Vec<Placed>) -> ChatLogprobs {
    let one = |placed: Placed| ChatTokenLogprob {
        token: token_text(&placed.entry.bytes),
        logprob: finite(placed.entry.logprob),
        top_logprobs: placed.entry.top.into_iter().map(top).collect(),
        bytes: placed.entry.bytes,
    };
    ChatLogprobs { content: entries.into_iter().map(one).collect(), refusal: None }
}

fn top((bytes, logprob): (Vec<u8>, f32)) -> TopLogprob {
    TopLogprob { token: token_text(&bytes), logprob: finite(logprob), bytes }
}

/// The text-completion shape; `before_chars` is the length of an echoed prompt.
pub fn completion(entries: Vec<Placed>, before_chars: u32) -> CompletionLogprobs {
    let mut lists = CompletionLogprobs::default();
    for placed in entries {
        lists.tokens.push(token_text(&placed.entry.bytes));
        lists.token_logprobs.push(finite(placed.entry.logprob));
        lists.text_offset.push(before_chars + placed.offset_chars);
        let mut alternatives: Vec<(String, f32)> = Vec::with_capacity(placed.entry.top.len());
        for (bytes, logprob) in placed.entry.top {
            let token = token_text(&bytes);
            // Two tokens may share their text; the likelier one stands for both.
            if alternatives.iter().all(|(known, _)| *known != token) {
                alternatives.push((token, finite(logprob)));
            }
        }
        lists.top_logprobs.push(Alternatives(alternatives));
    }
    lists
}

/// JSON has no infinities.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

/// Text of a token; what is no text alone is shown as `\xNN` escapes.
fn token_text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(bytes: &[u8]) -> Token {
        let logprob = TokenLogprob {
            logprob: -0.5,
            bytes: bytes.to_vec(),
            top: vec![(bytes.to_vec(), -0.5)],
        };
        Token { id: 1, logprob: Some(logprob) }
    }

    fn texts(entries: &[Placed]) -> Vec<String> {
        entries.iter().map(|placed| token_text(&placed.entry.bytes)).collect()
    }

    #[test]
    fn entries_wait_for_their_text_and_a_cut_stop_is_not_returned() {
        let mut pending = Pending::default();
        let first = pending.advance(vec![token(b"Hi"), token(b" ST")], "Hi", None);
        assert_eq!(texts(&first), ["Hi"]);
        let last = pending.advance(vec![token(b"OP"), token(b"")], "", Some(Finish::Stop));
        assert!(last.is_empty(), "{last:?}");
    }

    #[test]
    fn all_entries_leave_when_the_limit_ends_a_choice() {
        let mut pending = Pending::default();
        let held = pending.advance(vec![token(&[0xF0, 0x9F])], "", None);
        assert!(held.is_empty());
        let last = pending.advance(vec![token(&[0xA6, 0x80])], "🦀", Some(Finish::Length));
        assert_eq!(texts(&last), ["\\xf0\\x9f", "\\xa6\\x80"]);
        assert_eq!(last.iter().map(|p| p.offset_chars).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn values_are_always_json() {
        let mut bad = token(b"x");
        if let Some(entry) = &mut bad.logprob {
            entry.logprob = f32::NEG_INFINITY;
        }
        let entries = Pending::default().advance(vec![bad], "x", None);
        assert_eq!(chat(entries).content[0].logprob, -9999.0);
    }
}
