//! Tests of prompts and their tokens over the fixtures of `worker/tests/fixtures/text`, which
//! `make.py` there makes with transformers and the Python tokenizers package.

mod detokenizer;
mod golden;
mod mutations;
mod safety;

use std::sync::LazyLock;

use serde_json::{Map, Value};

use super::*;

pub(super) const BYTE_LEVEL: &str = include_str!("../../../tests/fixtures/text/byte_level.json");
pub(super) const LLAMA2: &str = include_str!("../../../tests/fixtures/text/llama2.json");
pub(super) const MISTRAL: &str = include_str!("../../../tests/fixtures/text/mistral.json");

/// The source of a fixture template.
pub(crate) fn template_source(name: &str) -> &'static str {
    match name {
        "llama2" => include_str!("../../../tests/fixtures/text/templates/llama2.jinja"),
        "llama3" => include_str!("../../../tests/fixtures/text/templates/llama3.jinja"),
        "mistral" => include_str!("../../../tests/fixtures/text/templates/mistral.jinja"),
        "qwen25" => include_str!("../../../tests/fixtures/text/templates/qwen25.jinja"),
        "qwen3" => include_str!("../../../tests/fixtures/text/templates/qwen3.jinja"),
        _ => include_str!("../../../tests/fixtures/text/templates/python_forms.jinja"),
    }
}

/// The source of a fixture tokenizer.
pub(crate) fn tokenizer_source(name: &str) -> &'static str {
    match name {
        "llama2" => LLAMA2,
        "mistral" => MISTRAL,
        _ => BYTE_LEVEL,
    }
}

/// A fixture tokenizer, loaded here and by the library itself.
pub(super) struct Loaded {
    pub source: &'static str,
    pub ours: Tokenizer,
    pub library: tokenizers::Tokenizer,
}

/// The three fixture tokenizers: byte-level, Llama 2's and Mistral's form.
pub(super) static LOADED: LazyLock<[Loaded; 3]> = LazyLock::new(|| {
    [BYTE_LEVEL, LLAMA2, MISTRAL].map(|source| Loaded {
        source,
        ours: Tokenizer::from_bytes(source.as_bytes()).unwrap(),
        library: source.parse().unwrap(),
    })
});

/// Tokenizer and template of a family, with the named tokens that go with them.
pub(crate) fn family(name: &str) -> Text {
    let (bos, eos) = match name {
        "llama2" | "mistral" => ("<s>", "</s>"),
        "llama3" => ("<|begin_of_text|>", "<|eot_id|>"),
        _ => ("", "<|im_end|>"),
    };
    let config = serde_json::json!({"bos_token": {"content": bos}, "eos_token": eos}).to_string();
    text(tokenizer_source(name), template_source(name), &config)
}

pub(crate) fn text(tokenizer: &str, template: &str, config: &str) -> Text {
    Text {
        tokenizer: Tokenizer::from_bytes(tokenizer.as_bytes()).unwrap(),
        template: ChatTemplate::parse(Some(config.as_bytes()), Some(template.as_bytes())).unwrap(),
    }
}

/// A conversation whose next message is the model's.
pub(super) fn open<'a>(
    messages: &'a [Message],
    kwargs: &'a Map<String, Value>,
) -> Conversation<'a> {
    Conversation {
        messages,
        tools: &[],
        template_kwargs: kwargs,
        ending: Ending::Open,
        unix_time: 0,
    }
}
