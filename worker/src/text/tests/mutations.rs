//! Damaged files give an error, never a panic.

use rand_bytes::Mutator;
use serde_json::Map;

use super::*;

/// A small deterministic source of changes to a file.
mod rand_bytes {
    pub struct Mutator(pub u64);

    impl Mutator {
        fn next(&mut self, below: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.0 >> 33) as usize % below.max(1)
        }

        /// The file with one or two bytes or stretches changed.
        pub fn mutate(&mut self, file: &[u8]) -> Vec<u8> {
            let mut bytes = file.to_vec();
            for _ in 0..=self.next(2) {
                let at = self.next(bytes.len());
                let end = (at + self.next(12)).min(bytes.len());
                match self.next(5) {
                    0 => bytes[at] = self.next(256) as u8,
                    1 => drop(bytes.drain(at..end)),
                    2 => {
                        bytes.splice(at..at, b"0123456789,\"}]{[%-".iter().copied()).for_each(drop)
                    }
                    3 => bytes[at] ^= 1 << self.next(8),
                    _ => {
                        let copy = bytes[at..end].to_vec();
                        let to = self.next(bytes.len());
                        bytes.splice(to..to, copy).for_each(drop);
                    }
                }
                if bytes.is_empty() {
                    break;
                }
            }
            bytes
        }
    }
}

#[test]
fn tokenizer_files() {
    let mut mutator = Mutator(7);
    let mut loaded = 0;
    for round in 0..crate::soak(1500) as usize {
        let source = [BYTE_LEVEL, LLAMA2, MISTRAL][round % 3];
        match Tokenizer::from_bytes(&mutator.mutate(source.as_bytes())) {
            Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
            Ok(tokenizer) => {
                loaded += 1;
                if let Ok(ids) = tokenizer.encode_plain("Hi <s> <|eot_id|> 🦀", true) {
                    tokenizer.decode(&ids, TextStart::Fresh);
                }
            }
        }
    }
    assert!((20..1480).contains(&loaded), "{loaded} of 1500 loaded");
}

#[test]
fn template_files() {
    let tokenizer = Tokenizer::from_bytes(BYTE_LEVEL.as_bytes()).unwrap();
    let mut mutator = Mutator(11);
    let mut rendered = 0;
    for round in 0..crate::soak(1000) as usize {
        let name = ["llama3", "qwen3", "mistral", "python_forms"][round % 4];
        let source = mutator.mutate(template_source(name).as_bytes());
        let Ok(Some(template)) = ChatTemplate::parse(None, Some(&source)) else { continue };
        let (messages, kwargs) = ([Message::new(Role::User, "x")], Map::new());
        let conversation = open(&messages, &kwargs);
        rendered += usize::from(template.render(&conversation, tokenizer.spellings()).is_ok());
    }
    assert!(rendered > 50, "{rendered} of 1000 rendered");
}

#[test]
fn config_files() {
    let config = serde_json::json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>",
        "chat_template": [{"name": "default", "template": template_source("llama2")}]});
    let mut mutator = Mutator(13);
    let mut refused = 0;
    for _ in 0..crate::soak(1500) as usize {
        let bytes = mutator.mutate(config.to_string().as_bytes());
        refused += usize::from(ChatTemplate::parse(Some(&bytes), None).is_err());
    }
    assert!((100..1400).contains(&refused), "{refused} of 1500 refused");
}
