//! What is trained is what serving would have to generate after the prompt serving renders.

use serde_json::{Map, Value, json};

use crate::dataset::*;
use crate::text::tests::{family, text};
use crate::text::{Conversation, Ending, Message, Text, TextStart, Tokenizer};

fn chat(example: Value) -> Chat {
    let lines = vec![example.to_string(); 10].join("\n");
    let mut examples = read(lines.as_bytes(), Purpose::Training).unwrap().examples;
    match examples.pop() {
        Some(Example::Chat(chat)) => chat,
        other => panic!("{other:?}"),
    }
}

struct Setup {
    text: Text,
    end_tokens: Vec<u32>,
    kwargs: Map<String, Value>,
}

impl Setup {
    fn new(name: &str, end: &str) -> Self {
        Self::of(family(name), end)
    }

    fn of(text: Text, end: &str) -> Self {
        let end_tokens = vec![text.tokenizer.token_id(end).unwrap()];
        Self { text, end_tokens, kwargs: Map::new() }
    }

    fn encoder(&self, max_tokens: usize) -> Encoder<'_> {
        Encoder {
            text: &self.text,
            end_tokens: &self.end_tokens,
            max_tokens,
            template_kwargs: &self.kwargs,
            unix_time: 1_772_713_800,
        }
    }

    fn encode(&self, chat: &Chat) -> Vec<Sequence> {
        self.encoder(4096).encode(&Example::Chat(chat.clone())).unwrap().sequences
    }

    /// What serving sends to the model for these messages.
    fn prompt(&self, chat: &Chat, messages: &[Message]) -> Vec<u32> {
        let conversation = Conversation {
            messages,
            tools: &chat.tools,
            template_kwargs: &self.kwargs,
            ending: Ending::Open,
            unix_time: 1_772_713_800,
        };
        self.text.chat_prompt(&conversation).unwrap()
    }

    /// Checks that each trained message's prompt is serving's, and returns the trained texts.
    fn check(&self, chat: &Chat) -> Vec<String> {
        let mut trained = Vec::new();
        let prompts: Vec<Vec<u32>> = (0..chat.messages.len())
            .filter(|index| chat.trained[*index])
            .map(|index| self.prompt(chat, &chat.messages[..index]))
            .collect();
        let mut left = prompts.iter();
        for sequence in self.encode(chat) {
            assert_eq!(sequence.tokens.len(), sequence.trained.len());
            for (start, end) in runs(&sequence.trained) {
                let prompt = left.next().expect("as many answers as prompts");
                assert_eq!(&sequence.tokens[..start], &prompt[..]);
                trained.push(show(&self.text.tokenizer, &sequence.tokens[start..end]));
            }
        }
        assert!(left.next().is_none());
        trained
    }
}

fn runs(trained: &[bool]) -> Vec<(usize, usize)> {
    let mut runs = Vec::new();
    let mut start = None;
    for (index, &on) in trained.iter().chain([&false]).enumerate() {
        match (on, start) {
            (true, None) => start = Some(index),
            (false, Some(first)) => {
                runs.push((first, index));
                start = None;
            }
            _ => {}
        }
    }
    runs
}

/// Text of tokens with control tokens spelled.
fn show(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut text = String::new();
    let mut plain = Vec::new();
    for id in ids {
        if tokenizer.is_control(*id) {
            text.push_str(&tokenizer.decode(&plain, TextStart::Continued));
            plain.clear();
            text.push_str(&tokenizer.display(*id));
        } else {
            plain.push(*id);
        }
    }
    text + &tokenizer.decode(&plain, TextStart::Continued)
}

fn talk() -> Chat {
    chat(json!({"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi there 🦀"},
        {"role": "user", "content": "And <|im_end|> </s>?"},
        {"role": "assistant", "content": "No <|eot_id|>.", "weight": 0},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye <|im_end|>\nyou"}]}))
}

#[test]
fn answers_and_their_end_tokens_are_trained_in_one_sequence() {
    for (name, end, space) in [
        ("llama3", "<|eot_id|>", ""),
        ("qwen25", "<|im_end|>", ""),
        ("llama2", "</s>", " "),
        ("mistral", "</s>", " "),
    ] {
        let setup = Setup::new(name, end);
        // Llama 2 puts a space before the end token, too.
        let after = if name == "llama2" { " " } else { "" };
        // Mistral shows the system message with the last user message only, so that earlier
        // prompts differ from the text that later ones start with.
        let sequences = if name == "mistral" { 2 } else { 1 };
        assert_eq!(setup.encode(&talk()).len(), sequences, "{name}");
        assert_eq!(
            setup.check(&talk()),
            [
                format!("{space}Hi there 🦀{after}{end}"),
                format!("{space}Bye <|im_end|>\nyou{after}{end}")
            ],
            "{name}"
        );
    }
}

#[test]
fn tool_calls_are_trained() {
    let tools = json!([{"type": "function", "function": {"name": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}]);
    let example = chat(json!({"tools": tools, "messages": [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "tool_calls": [
            {"id": "call00001", "type": "function",
                "function": {"name": "f", "arguments": "{\"a\":1}"}}]},
        {"role": "tool", "content": "4", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "Four"}]}));
    let setup = Setup::new("llama3", "<|eot_id|>");
    assert_eq!(
        setup.check(&example),
        ["{\"name\": \"f\", \"parameters\": {\"a\": 1}}<|eot_id|>", "Four<|eot_id|>"]
    );
    let setup = Setup::new("mistral", "</s>");
    assert_eq!(
        setup.check(&example),
        [
            "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": 1}, \
             \"id\": \"call00001\"}]</s>",
            " Four</s>"
        ]
    );
    let setup = Setup::new("qwen25", "<|im_end|>");
    let call =
        "\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call><|im_end|>";
    // The generation prompt ends with a line break that the call's text starts with.
    assert_eq!(setup.check(&example), [&call[1..], "Four<|im_end|>"]);
}

#[test]
fn reasoning_that_later_turns_drop_splits_the_example() {
    let example = chat(json!({"messages": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "No"}]}));
    let setup = Setup::new("qwen3", "<|im_end|>");
    assert_eq!(setup.encode(&example).len(), 2);
    assert_eq!(
        setup.check(&example),
        ["<think>\nhm\n</think>\n\nYes<|im_end|>", "<think>\n\n</think>\n\nNo<|im_end|>"]
    );
    let mut setup = Setup::new("qwen3", "<|im_end|>");
    setup.kwargs.insert("enable_thinking".into(), json!(false));
    let plain = chat(json!({"messages": [
        {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "No"}]}));
    assert_eq!(setup.check(&plain), ["No<|im_end|>"]);
}

fn custom(template: &str) -> Setup {
    let source = crate::text::tests::tokenizer_source("byte_level");
    Setup::of(text(source, template, r#"{"eos_token": "<|im_end|>"}"#), "<|im_end|>")
}

#[test]
fn generation_prompts_that_open_a_think_block_align() {
    let setup = custom(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
         {% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    );
    let example = chat(json!({"messages": [
        {"role": "user", "content": "x"}, {"role": "assistant", "content": "<thin ice"}]}));
    assert_eq!(setup.check(&example), ["<thin ice<|im_end|>"]);
}

#[test]
fn content_that_merges_with_the_prompt_keeps_the_prompts_tokens() {
    let setup = custom(
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n\n' }}{{ m.content }}<|im_end|>\
         {{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n\n' }}\
         {% endif %}",
    );
    let example = chat(json!({"messages": [
        {"role": "user", "content": "x"}, {"role": "assistant", "content": "\n\n  y"},
        {"role": "user", "content": "x"}, {"role": "assistant", "content": "z"}]}));
    assert_eq!(setup.check(&example), ["\n\n  y<|im_end|>", "z<|im_end|>"]);
}

#[test]
fn templates_without_an_end_token_get_one() {
    let setup = custom(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\n' }}{% endfor %}\
         {% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    );
    assert_eq!(
        setup.check(&talk()),
        ["Hi there 🦀\n<|im_end|>", "Bye <|im_end|>\nyou\n<|im_end|>"]
    );
    let encoder = Encoder { end_tokens: &[], ..setup.encoder(99) };
    assert!(matches!(encoder.encode(&Example::Chat(talk())), Err(EncodeError::NoEndToken)));
}

#[test]
fn templates_that_cannot_be_aligned_are_an_error() {
    let setup =
        custom("{% for m in messages[::-1] %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}");
    let error = setup.encoder(99).encode(&Example::Chat(talk())).unwrap_err();
    assert!(matches!(error, EncodeError::Unaligned(3)), "{error}");
    let setup = Setup::new("llama2", "</s>");
    let example = chat(json!({"messages": [{"role": "user", "content": "a"},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}));
    let error = setup.encoder(99).encode(&Example::Chat(example)).unwrap_err();
    assert!(error.to_string().contains("must alternate"), "{error}");
}

#[test]
fn long_examples_are_cut_or_dropped() {
    let setup = Setup::new("qwen25", "<|im_end|>");
    let whole = setup.encode(&talk()).remove(0);
    let first = whole.trained.iter().position(|trained| *trained).unwrap();
    let example = Example::Chat(talk());
    let all = setup.encoder(whole.tokens.len()).encode(&example).unwrap();
    assert_eq!((all.truncated, all.sequences), (false, vec![whole.clone()]));
    let cut = setup.encoder(first + 2).encode(&example).unwrap();
    assert!(cut.truncated);
    assert_eq!(cut.sequences[0].tokens, whole.tokens[..first + 2]);
    assert_eq!(cut.sequences[0].trained, whole.trained[..first + 2]);
    let none = setup.encoder(first).encode(&example).unwrap();
    assert_eq!((none.truncated, none.sequences.len()), (true, 0));
}

#[test]
fn completions_are_trained_after_plain_prompts() {
    for (name, end) in [("llama2", "</s>"), ("mistral", "</s>"), ("qwen25", "<|im_end|>")] {
        let setup = Setup::new(name, end);
        for (prompt, completion) in
            [("What is", " it?"), ("The cap", "ital </s>"), ("x\n", "\ny"), ("", "z"), ("a", "")]
        {
            let (prompt, completion) = (prompt.to_owned(), completion.to_owned());
            let example =
                Example::Completion { prompt: prompt.clone(), completion: completion.clone() };
            let encoded = setup.encoder(99).encode(&example).unwrap();
            let sequence = &encoded.sequences[0];
            let served = setup.text.tokenizer.encode_plain(&prompt, true).unwrap();
            assert_eq!(sequence.tokens[..served.len()], served, "{name} {prompt:?}");
            let answer = &sequence.tokens[served.len()..];
            let shown = show(&setup.text.tokenizer, answer);
            let space = if prompt.is_empty() && name != "qwen25" { " " } else { "" };
            assert_eq!(shown, format!("{space}{completion}{end}"), "{name} {prompt:?}");
            let trained = sequence.trained.iter().filter(|trained| **trained).count();
            assert_eq!(trained, answer.len(), "{name} {prompt:?}");
        }
    }
    let answer = talk().messages[2].clone();
    let pair = Preference { input: talk(), preferred: answer.clone(), non_preferred: answer };
    let pair = Example::Preference(Box::new(pair));
    let setup = Setup::new("qwen25", "<|im_end|>");
    assert!(matches!(setup.encoder(99).encode(&pair), Err(EncodeError::Preference)));
}
