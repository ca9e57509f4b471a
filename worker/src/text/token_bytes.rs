//! The bytes each token stands for, worked out once from the decoder of tokenizer.json. Knows
//! byte-level alphabets (GPT-2, Llama 3, Qwen) and SentencePiece forms (Llama 2, Mistral); any
//! other decoder is refused at start.

use serde_json::Value;

use super::tokenizer::TokenizerError;

/// Token id → bytes. Control tokens and ids without an entry have none.
#[derive(Debug, Default)]
pub struct TokenBytes {
    bytes: Vec<u8>,
    /// Id i owns `bytes[ends[i - 1]..ends[i]]`.
    ends: Vec<u32>,
    /// Spaces that the decoder takes from the start of a text.
    pub(super) leading_spaces: usize,
}

impl TokenBytes {
    /// From per-id bytes, in order.
    pub(super) fn new(per_id: impl Iterator<Item = Vec<u8>>, leading_spaces: usize) -> Self {
        let mut table = Self { leading_spaces, ..Self::default() };
        for bytes in per_id {
            table.bytes.extend(bytes);
            table.ends.push(u32::try_from(table.bytes.len()).unwrap_or(u32::MAX));
        }
        table
    }

    /// Ids it covers, from 0.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether it covers no id.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The bytes of one token; empty for control tokens and ids without an entry.
    pub fn get(&self, id: u32) -> &[u8] {
        let index = id as usize;
        let Some(&end) = self.ends.get(index) else { return &[] };
        let start = index.checked_sub(1).map_or(0, |previous| self.ends[previous]);
        &self.bytes[start as usize..end as usize]
    }
}

/// What a decoder does to one token.
#[derive(Debug, PartialEq)]
enum Rewrite {
    Replace(String, String),
    ByteFallback,
    ByteLevel,
}

/// A decoder of tokenizer.json as far as single tokens are concerned.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Decoding {
    rewrites: Vec<Rewrite>,
    pub(super) leading_spaces: usize,
}

impl Decoding {
    /// Reads the `decoder` entry.
    pub(super) fn parse(decoder: Option<&Value>) -> Result<Self, TokenizerError> {
        let decoder = decoder.filter(|value| !value.is_null()).ok_or_else(|| {
            TokenizerError::UnsupportedDecoder("tokenizer.json names no decoder".into())
        })?;
        let mut decoding = Self::default();
        let mut fused = false;
        decoding.add(decoder, &mut fused, 0)?;
        Ok(decoding)
    }

    fn add(&mut self, step: &Value, fused: &mut bool, depth: u8) -> Result<(), TokenizerError> {
        let kind = step["type"].as_str().unwrap_or_default();
        let refuse = |why: &str| {
            Err(TokenizerError::UnsupportedDecoder(format!("decoder step \"{kind}\" {why}")))
        };
        if *fused && !matches!(kind, "Fuse" | "Strip") {
            return refuse("after Fuse is not supported");
        }
        match kind {
            "Sequence" if depth < 4 => {
                for inner in step["decoders"].as_array().into_iter().flatten() {
                    self.add(inner, fused, depth + 1)?;
                }
            }
            "Fuse" => *fused = true,
            "ByteFallback" => self.rewrites.push(Rewrite::ByteFallback),
            "ByteLevel" => self.rewrites.push(Rewrite::ByteLevel),
            "Metaspace" => {
                let Some(from) = step["replacement"].as_str() else {
                    return refuse("has no replacement");
                };
                self.rewrites.push(Rewrite::Replace(from.to_owned(), " ".to_owned()));
                let never = step["prepend_scheme"] == "never" || step["add_prefix_space"] == false;
                self.leading_spaces += usize::from(!never);
            }
            "Replace" => {
                let from = step["pattern"]["String"].as_str().filter(|from| !from.is_empty());
                let (Some(from), Some(to)) = (from, step["content"].as_str()) else {
                    return refuse("with a regular expression is not supported");
                };
                self.rewrites.push(Rewrite::Replace(from.to_owned(), to.to_owned()));
            }
            "Strip" => {
                let start = step["start"].as_u64().unwrap_or(0);
                let plain = step["content"] == " " && step["stop"].as_u64() == Some(0);
                if !plain || !*fused || start > 64 {
                    return refuse("is supported for spaces at the start of the text only");
                }
                self.leading_spaces += start as usize;
            }
            _ => return refuse("is not supported"),
        }
        Ok(())
    }

    /// The bytes of an entry of the model's vocabulary.
    pub(super) fn bytes(&self, token: &str) -> Vec<u8> {
        let mut text = token.to_owned();
        for rewrite in &self.rewrites {
            match rewrite {
                Rewrite::Replace(from, to) => text = text.replace(from, to),
                Rewrite::ByteFallback => {
                    if let Some(byte) = fallback_byte(&text) {
                        return vec![byte];
                    }
                }
                Rewrite::ByteLevel => {
                    if let Some(bytes) = text.chars().map(alphabet_byte).collect() {
                        return bytes;
                    }
                }
            }
        }
        text.into_bytes()
    }

    /// The bytes of an added token, which byte-level alphabets do not apply to.
    pub(super) fn added_bytes(&self, token: &str) -> Vec<u8> {
        match self.rewrites.contains(&Rewrite::ByteLevel) {
            true => token.as_bytes().to_vec(),
            false => self.bytes(token),
        }
    }
}

/// The byte of a `<0x0A>` token.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// The byte a character of GPT-2's alphabet stands for: printable Latin-1 is itself, the other
/// 68 bytes follow from U+0100 on in ascending order.
fn alphabet_byte(character: char) -> Option<u8> {
    match character as u32 {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121) as u8 + 0x7f),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_alphabet_covers_each_byte_once() {
        let mut seen: Vec<u8> =
            (0..0x200).filter_map(char::from_u32).filter_map(alphabet_byte).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
        assert_eq!(alphabet_byte('Ġ'), Some(b' '));
        assert_eq!(alphabet_byte('Ċ'), Some(b'\n'));
    }

    #[test]
    fn sentencepiece_decoders_give_bytes() {
        let decoder = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
        let decoding = Decoding::parse(Some(&decoder)).unwrap();
        assert_eq!(decoding.leading_spaces, 1);
        assert_eq!(decoding.bytes("▁Hello"), b" Hello");
        assert_eq!(decoding.bytes("<0xE2>"), [0xe2]);
        assert_eq!(decoding.bytes("<0xE>"), b"<0xE>");
    }

    #[test]
    fn other_decoders_are_refused_by_name() {
        for (decoder, word) in [
            (json!(null), "no decoder"),
            (json!({"type": "WordPiece", "prefix": "##", "cleanup": true}), "WordPiece"),
            (json!({"type": "CTC"}), "CTC"),
            (json!({"type": "Replace", "pattern": {"Regex": "a"}, "content": ""}), "Replace"),
            (json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}), "Strip"),
            (
                json!({"type": "Sequence",
                    "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]}),
                "after Fuse",
            ),
        ] {
            let error = Decoding::parse(Some(&decoder)).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
