//! Splits a text at its added tokens as the `tokenizers` crate does, with one difference: control
//! tokens stand where the caller says, never where a spelling happens to occur.

use std::ops::Range;

use aho_corasick::{AhoCorasick, BuildError, MatchKind};
use tokenizers::normalizer::Range as TextRange;
use tokenizers::{AddedToken, NormalizedString, Normalizer, NormalizerWrapper, Token};

use super::spellings::Control;

/// One piece of a split: its text, and the token it already is, if so.
type Piece = (NormalizedString, Option<Vec<Token>>);

/// Added tokens of one kind, found by their spelling.
#[derive(Debug)]
struct Matcher {
    patterns: AhoCorasick,
    tokens: Vec<(AddedToken, u32)>,
}

/// The added tokens of a tokenizer, in their three kinds.
#[derive(Debug)]
pub struct AddedTokens {
    controls: Vec<(AddedToken, u32)>,
    raw: Matcher,
    normalized: Matcher,
}

impl AddedTokens {
    /// From all added tokens and their ids; the normalizer is applied to the spellings of those
    /// that match in normalized text.
    pub fn new(
        tokens: Vec<(AddedToken, u32)>,
        normalizer: Option<&NormalizerWrapper>,
    ) -> Result<Self, BuildError> {
        let (controls, ordinary): (Vec<_>, Vec<_>) =
            tokens.into_iter().partition(|(token, _)| token.special);
        let (normalized, raw): (Vec<_>, Vec<_>) =
            ordinary.into_iter().partition(|(token, _)| token.normalized);
        let spelling = |token: &AddedToken| {
            let mut text = NormalizedString::from(token.content.as_str());
            if let Some(normalizer) = normalizer
                && normalizer.normalize(&mut text).is_err()
            {
                return token.content.clone();
            }
            text.get().to_owned()
        };
        Ok(Self {
            controls,
            raw: Matcher::new(raw, |token| token.content.clone())?,
            normalized: Matcher::new(normalized, spelling)?,
        })
    }

    /// Splits at control tokens; `text` is the whole text they refer to.
    pub fn split_controls(&self, text: &NormalizedString, controls: &[Control]) -> Vec<Piece> {
        let found = controls.iter().filter_map(|control| {
            let (token, _) = self.controls.iter().find(|(_, id)| *id == control.id)?;
            Some((token, control.id, control.range.clone()))
        });
        split(text, found)
    }

    /// Splits at ordinary added tokens that match in raw text.
    pub fn split_raw(&self, text: &NormalizedString) -> Vec<Piece> {
        self.raw.split(text)
    }

    /// Splits at ordinary added tokens that match in normalized text.
    pub fn split_normalized(&self, text: &NormalizedString) -> Vec<Piece> {
        self.normalized.split(text)
    }
}

impl Matcher {
    fn new(
        tokens: Vec<(AddedToken, u32)>,
        spelling: impl Fn(&AddedToken) -> String,
    ) -> Result<Self, BuildError> {
        let patterns = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|(token, _)| spelling(token)))?;
        Ok(Self { patterns, tokens })
    }

    fn split(&self, text: &NormalizedString) -> Vec<Piece> {
        let found = self.patterns.find_iter(text.get()).map(|found| {
            let (token, id) = &self.tokens[found.pattern().as_usize()];
            (token, *id, found.range())
        });
        split(text, found)
    }
}

/// Cuts `text` at the tokens found, minding which of them take the whitespace around them and
/// which match whole words only.
fn split<'a>(
    text: &NormalizedString,
    found: impl Iterator<Item = (&'a AddedToken, u32, Range<usize>)>,
) -> Vec<Piece> {
    let sentence = text.get();
    let mut pieces = Vec::new();
    let mut done = 0;
    for (token, id, Range { mut start, mut end }) in found {
        if token.single_word && !stands_alone(sentence, start, end) {
            continue;
        }
        if token.lstrip {
            start = sentence[..start].trim_end().len();
        }
        start = start.max(done);
        if token.rstrip {
            let rest = &sentence[end..];
            end += rest.len() - rest.trim_start().len();
        }
        push_piece(&mut pieces, text, done..start, None);
        push_piece(&mut pieces, text, start..end, Some(id));
        done = end;
    }
    push_piece(&mut pieces, text, done..sentence.len(), None);
    pieces
}

fn push_piece(
    pieces: &mut Vec<Piece>,
    text: &NormalizedString,
    range: Range<usize>,
    id: Option<u32>,
) {
    if range.is_empty() {
        return;
    }
    if let Some(slice) = text.slice(TextRange::Normalized(range)) {
        let token = id.map(|id| {
            let value = slice.get().to_owned();
            let len = value.len();
            vec![Token::new(id, value, (0, len))]
        });
        pieces.push((slice, token));
    }
}

fn stands_alone(sentence: &str, start: usize, end: usize) -> bool {
    let word = |character: Option<char>| character.is_some_and(|c| c.is_alphanumeric() || c == '_');
    !word(sentence[..start].chars().next_back()) && !word(sentence[end..].chars().next())
}
