//! Tests of base files against what transformers wrote and computed, and of what is refused.

mod config;
mod damage;
mod files;
mod rope;
mod weights;

use std::path::PathBuf;

use super::safetensor::{read_entries, to_f32};

/// Bases of `tests/golden`.
pub(crate) const BASES: [&str; 7] =
    ["llama2", "llama3", "mistral", "qwen2", "qwen3", "odd", "sharded"];

/// A file or folder of `tests/golden`.
pub(crate) fn golden(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden")).join(path)
}

/// Its bytes.
pub(crate) fn golden_bytes(path: &str) -> Vec<u8> {
    std::fs::read(golden(path)).expect(path)
}

/// A float tensor of a golden safetensors file.
pub(crate) fn golden_floats(path: &str, tensor: &str) -> Vec<f32> {
    let file = golden_bytes(path);
    let entries = read_entries(&file).unwrap();
    let entry = &entries[tensor];
    to_f32(&file[entry.bytes.clone()], entry.stored.clone().unwrap()).into_owned()
}

/// One line, bounded: fit for a log and for an API error.
pub(crate) fn assert_clear(error: impl std::fmt::Display) {
    let message = error.to_string();
    assert!(!message.is_empty() && message.chars().count() < 900, "{message}");
    assert!(!message.contains(|c: char| c.is_control()), "{message:?}");
}

/// A stream of random numbers for mutations.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5DEE_CE66)
    }

    /// Below `limit`.
    pub(crate) fn roll(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % limit.max(1)
    }
}

/// Values that have broken parsers before.
const HOSTILE: [&str; 16] = [
    "null",
    "-1",
    "0",
    "1",
    "2",
    "1e400",
    "-0.5",
    "18446744073709551615",
    "9223372036854775808",
    "4294967296",
    "[]",
    "{}",
    "\"\\u0000\\n\"",
    "[[[[[[[[]]]]]]]]",
    "1e-320",
    "true",
];

/// `text` with one to three hurts; the first `within` bytes are hit most.
pub(crate) fn mutate(text: &[u8], within: usize, dice: &mut Dice) -> Vec<u8> {
    let mut text = text.to_vec();
    for _ in 0..=dice.roll(3) {
        if text.is_empty() {
            break;
        }
        let reach = if dice.roll(4) == 0 { text.len() } else { within.min(text.len()) };
        let at = dice.roll(reach);
        match dice.roll(6) {
            0 => text[at] ^= 1 << dice.roll(8),
            1 => text[at] = [b'"', b'{', b'}', b'[', b',', b':', 0, 0xFF][dice.roll(8)],
            2 => text.truncate(at),
            3 => drop(text.drain(at..(at + 1 + dice.roll(40)).min(text.len()))),
            4 => {
                let piece = text[at..(at + 1 + dice.roll(40)).min(text.len())].to_vec();
                text.splice(at..at, piece);
            }
            _ => replace_value(&mut text, at, HOSTILE[dice.roll(HOSTILE.len())]),
        }
    }
    text
}

/// Puts `value` in place of what follows the next colon.
fn replace_value(text: &mut Vec<u8>, at: usize, value: &str) {
    let Some(colon) = text[at..].iter().position(|byte| *byte == b':') else { return };
    let start = at + colon + 1;
    let rest = &text[start..];
    let end = rest.iter().position(|byte| b",}\n".contains(byte)).unwrap_or(rest.len());
    text.splice(start..start + end, value.bytes());
}
