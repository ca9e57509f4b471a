//! Text to token ids. Wraps the `tokenizers` crate for one rule: a control token's spelling in
//! text that a client controls is encoded as plain text. Hence no method here looks for control
//! tokens in a text; they stand where a [`Rendered`] prompt says, or nowhere.
//!
//! Where no client text spells one, the ids equal those of `transformers`. Added tokens that are
//! not special (`<think>`, `<tool_call>`) are ordinary vocabulary and match anywhere.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use thiserror::Error;
use tokenizers::{
    Encoding, Model, Normalizer, OffsetType, PreTokenizedString, PreTokenizer, Token,
};

use super::added::AddedTokens;
use super::detokenizer::{Detokenizer, TextStart};
use super::spellings::{Control, Rendered, Spellings};
use super::token_bytes::{Decoding, TokenBytes};
use super::vocabulary::{spell, token_bytes, unknown_id};

/// Why a tokenizer could not be loaded, or a text not be encoded.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// tokenizer.json could not be read.
    #[error("{0}")]
    Read(String),
    /// tokenizer.json is not a tokenizer this build understands.
    #[error("tokenizer.json is not usable: {0}")]
    Invalid(String),
    /// Its decoder gives no bytes per token.
    #[error("tokenizer.json is not usable for streaming: {0}")]
    UnsupportedDecoder(String),
    /// The library failed on a text.
    #[error("text cannot be tokenised: {0}")]
    Encode(String),
}

/// What is read of tokenizer.json beside the library.
#[derive(Deserialize)]
struct Entries {
    #[serde(default)]
    decoder: Option<Value>,
}

/// A tokenizer of one base.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    added: AddedTokens,
    spellings: Spellings,
    bytes: Arc<TokenBytes>,
    /// Control token → the ids that spell it as plain text.
    control_spelled: HashMap<u32, Vec<u32>>,
}

impl Tokenizer {
    /// Loads `tokenizer.json` at `path`.
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let json = std::fs::read(path).map_err(|error| {
            TokenizerError::Read(format!("{} cannot be read: {error}", path.display()))
        })?;
        Self::from_bytes(&json)
    }

    /// Loads from the bytes of a `tokenizer.json`.
    pub fn from_bytes(json: &[u8]) -> Result<Self, TokenizerError> {
        guarded(TokenizerError::Invalid, || Self::load(json))
    }

    fn load(json: &[u8]) -> Result<Self, TokenizerError> {
        let entries: Entries = serde_json::from_slice(json).map_err(invalid)?;
        let decoding = Decoding::parse(entries.decoder.as_ref())?;
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(invalid)?;
        inner.with_truncation(None).map_err(invalid)?.with_padding(None);
        let mut tokens: Vec<_> =
            inner.get_added_tokens_decoder().into_iter().map(|(id, token)| (token, id)).collect();
        tokens.sort_unstable_by_key(|(_, id)| *id);
        let unknown = unknown_id(inner.get_model())?;
        let control_spelled = tokens
            .iter()
            .filter(|(token, id)| token.special && Some(*id) != unknown)
            .map(|(token, id)| (*id, spell(inner.get_model(), &token.content, *id, unknown)))
            .collect();
        let raw: Vec<_> = tokens
            .iter()
            .filter(|(token, _)| token.special || !token.normalized)
            .map(|(token, id)| (token.content.clone(), *id, token.special))
            .collect();
        let tokenizer = Self {
            spellings: Spellings::new(&raw).map_err(invalid)?,
            bytes: Arc::new(token_bytes(&inner, &tokens, &decoding)?),
            added: AddedTokens::new(tokens, inner.get_normalizer()).map_err(invalid)?,
            control_spelled,
            inner,
        };
        // Faults that the library meets at the first text only are found now.
        match tokenizer.encode_plain("probe", true) {
            Ok(_) => Ok(tokenizer),
            Err(error) => Err(invalid(error)),
        }
    }

    /// One more than the highest id that has an entry.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// The id of a token, control tokens included.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token as tokenizer.json spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether an id is a control token: it gives no text, and plain text never holds it. The
    /// unknown token, which the model itself writes, is none.
    pub fn is_control(&self, id: u32) -> bool {
        self.control_spelled.contains_key(&id)
    }

    /// Where control tokens are spelled, for rendering.
    pub fn spellings(&self) -> &Spellings {
        &self.spellings
    }

    /// The bytes of one token; empty for control tokens and ids without an entry.
    pub fn bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id)
    }

    /// A token as log-probabilities show it: its text, `\xNN` for bytes that are not valid UTF-8
    /// alone, its spelling if it is a control token.
    pub fn display(&self, id: u32) -> String {
        let bytes = self.bytes(id);
        if bytes.is_empty() {
            return self.token(id).unwrap_or_default();
        }
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect(),
        }
    }

    /// Encodes plain text: no spelling in it is a control token. With `add_special_tokens` the
    /// tokenizer's own post-processor adds its tokens (as a rule the begin token), which is how
    /// prompts of `/v1/completions` are read.
    pub fn encode_plain(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<Vec<u32>, TokenizerError> {
        guarded(TokenizerError::Encode, || {
            let encoding = self.pieces(text, &[])?;
            let encoding =
                self.inner.post_process(encoding, None, add_special_tokens).map_err(failed)?;
            Ok(encoding.get_ids().to_vec())
        })
    }

    /// Encodes a rendered prompt; nothing is added to it, templates write their begin token.
    pub fn encode_rendered(&self, rendered: &Rendered) -> Result<Vec<u32>, TokenizerError> {
        guarded(TokenizerError::Encode, || {
            Ok(self.pieces(&rendered.text, &rendered.controls)?.get_ids().to_vec())
        })
    }

    /// Encodes the part of a rendered prompt that follows one of its control tokens, which must
    /// be `rendered.controls[control]`: the ids equal the tail of the whole prompt's.
    pub fn encode_after(
        &self,
        rendered: &Rendered,
        control: usize,
    ) -> Result<Vec<u32>, TokenizerError> {
        let Some(first) = rendered.controls.get(control) else {
            return Err(TokenizerError::Encode("no such control token".into()));
        };
        let start = first.range.start;
        let shifted = |control: &Control| Control {
            range: control.range.start - start..control.range.end - start,
            id: control.id,
        };
        let tail = Rendered {
            text: rendered.text[start..].to_owned(),
            controls: rendered.controls[control..].iter().map(shifted).collect(),
        };
        let mut ids = self.encode_rendered(&tail)?;
        ids.remove(0);
        Ok(ids)
    }

    /// Encodes text that continues other text, so that no tokenizer puts a space before it.
    pub fn encode_continued(&self, rendered: &Rendered) -> Result<Vec<u32>, TokenizerError> {
        // Encoded behind a character that does not merge with it.
        for before in ["\n", ".", "a", "0"] {
            let shifted = |control: &Control| Control {
                range: control.range.start + before.len()..control.range.end + before.len(),
                id: control.id,
            };
            let both = Rendered {
                text: format!("{before}{}", rendered.text),
                controls: rendered.controls.iter().map(shifted).collect(),
            };
            let ids = self.encode_rendered(&both)?;
            if let Some(rest) = ids.strip_prefix(&self.encode_plain(before, false)?[..]) {
                return Ok(rest.to_vec());
            }
        }
        self.encode_rendered(rendered)
    }

    /// The text of a whole sequence.
    pub fn decode(&self, ids: &[u32], start: TextStart) -> String {
        let mut detokenizer = self.detokenizer(&[], start);
        let mut text: String = ids.iter().map(|id| detokenizer.push(*id).text).collect();
        text.push_str(&detokenizer.finish());
        text
    }

    /// An incremental detokenizer for one generated sequence.
    pub fn detokenizer(&self, stops: &[String], start: TextStart) -> Detokenizer {
        Detokenizer::new(Arc::clone(&self.bytes), stops, start)
    }

    /// The library's own pipeline, with the split at added tokens replaced.
    fn pieces(&self, text: &str, controls: &[Control]) -> Result<Encoding, TokenizerError> {
        let mut pieces = PreTokenizedString::from(text);
        pieces
            .split(|_, piece| Ok(self.added.split_controls(&piece, controls)))
            .and_then(|()| pieces.split(|_, piece| Ok(self.added.split_raw(&piece))))
            .and_then(|()| {
                pieces.split(|_, mut piece| {
                    if let Some(normalizer) = self.inner.get_normalizer() {
                        normalizer.normalize(&mut piece)?;
                    }
                    Ok(self.added.split_normalized(&piece))
                })
            })
            .and_then(|()| match self.inner.get_pre_tokenizer() {
                Some(pre_tokenizer) => pre_tokenizer.pre_tokenize(&mut pieces),
                None => Ok(()),
            })
            .and_then(|()| {
                pieces.tokenize(|piece| {
                    let tokens = self.inner.get_model().tokenize(piece.get())?;
                    Ok(self.without_controls(tokens))
                })
            })
            .map_err(failed)?;
        pieces.into_encoding(None, 0, OffsetType::None).map_err(failed)
    }

    /// The model's own merges may lead to a control token where its spelling is in the
    /// vocabulary; then its characters stand for it.
    fn without_controls(&self, tokens: Vec<Token>) -> Vec<Token> {
        if !tokens.iter().any(|token| self.control_spelled.contains_key(&token.id)) {
            return tokens;
        }
        let mut plain = Vec::with_capacity(tokens.len());
        for token in tokens {
            match self.control_spelled.get(&token.id) {
                None => plain.push(token),
                Some(ids) => {
                    plain.extend(ids.iter().map(|id| Token::new(*id, String::new(), token.offsets)))
                }
            }
        }
        plain
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "Tokenizer({} ids)", self.vocab_size())
    }
}

pub(super) fn invalid(error: impl ToString) -> TokenizerError {
    TokenizerError::Invalid(one_line(&error.to_string()))
}

fn failed(error: impl ToString) -> TokenizerError {
    TokenizerError::Encode(one_line(&error.to_string()))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Runs what calls the library: it panics on some files that only a damaged copy can hold, which
/// must be an error like any other.
fn guarded<T>(
    kind: fn(String) -> TokenizerError,
    call: impl FnOnce() -> Result<T, TokenizerError>,
) -> Result<T, TokenizerError> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(kind(one_line(&text.unwrap_or_else(|| "the tokenizer library failed".into()))))
    })
}
