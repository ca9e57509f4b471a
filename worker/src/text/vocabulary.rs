//! What a tokenizer's vocabulary says about single ids, worked out once at start.

use tokenizers::{Model, ModelWrapper};

use super::token_bytes::{Decoding, TokenBytes};
use super::tokenizer::{TokenizerError, invalid};

/// Ids end below this: no vocabulary is larger, and the per-id table is dense.
const VOCAB_MAX: u32 = 4_000_000;

/// The id that stands for text the model cannot spell. Byte-pair models only: every family of
/// base that is served has one.
pub(super) fn unknown_id(model: &ModelWrapper) -> Result<Option<u32>, TokenizerError> {
    let ModelWrapper::BPE(bpe) = model else {
        return Err(invalid("its model is not of type BPE"));
    };
    Ok(bpe.get_unk_token().as_ref().and_then(|token| bpe.token_to_id(token)))
}

/// Ids of the characters of a control token's spelling: vocabulary entries, else byte tokens,
/// else the unknown token.
pub(super) fn spell(
    model: &ModelWrapper,
    spelling: &str,
    own: u32,
    unknown: Option<u32>,
) -> Vec<u32> {
    let mut ids = Vec::new();
    for character in spelling.chars() {
        let mut buffer = [0; 4];
        let text = character.encode_utf8(&mut buffer);
        match model.token_to_id(text).filter(|id| *id != own) {
            Some(id) => ids.push(id),
            None => {
                let byte = |byte: &u8| model.token_to_id(&format!("<0x{byte:02X}>")).or(unknown);
                ids.extend(text.as_bytes().iter().filter_map(byte));
            }
        }
    }
    ids
}

/// The table of bytes per token id.
pub(super) fn token_bytes(
    inner: &tokenizers::Tokenizer,
    added: &[(tokenizers::AddedToken, u32)],
    decoding: &Decoding,
) -> Result<TokenBytes, TokenizerError> {
    let vocab = inner.get_vocab(false);
    let highest = vocab.values().copied().chain(added.iter().map(|(_, id)| *id)).max();
    let Some(highest) = highest.filter(|id| *id < VOCAB_MAX) else {
        return Err(invalid("its vocabulary is empty or too large"));
    };
    let mut per_id = vec![Vec::new(); highest as usize + 1];
    for (token, id) in &vocab {
        per_id[*id as usize] = decoding.bytes(token);
    }
    for (token, id) in added {
        per_id[*id as usize] =
            if token.special { Vec::new() } else { decoding.added_bytes(&token.content) };
    }
    Ok(TokenBytes::new(per_id.into_iter(), decoding.leading_spaces))
}
