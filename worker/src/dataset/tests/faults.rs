//! Every fault a training file can have, and files that have none.

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::dataset::*;
use crate::text::Role;

const PREFIX: &str = "The job failed due to an invalid training file. Invalid file format. ";

fn good() -> Value {
    json!({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]})
}

fn fault(text: &str) -> FileFault {
    match read(text.as_bytes(), Purpose::Training) {
        Err(ReadError::Fault(fault)) => fault,
        result => panic!("{result:?}"),
    }
}

/// A file of ten good lines, one of them replaced.
fn file_with(number: usize, line: &str) -> String {
    let mut lines = vec![good().to_string(); 10];
    lines[number - 1] = line.to_owned();
    lines.join("\n")
}

/// The faults of a file whose third example is `example`.
fn faults_of(example: &Value) -> String {
    let fault = fault(&file_with(3, &example.to_string()));
    assert_eq!((fault.code, fault.param), ("invalid_training_file", "training_file"));
    fault.message.strip_prefix(PREFIX).unwrap().to_owned()
}

/// The fault of a conversation whose first message is `message`.
fn message_fault(message: Value) -> String {
    let text = faults_of(&json!({"messages": [message, {"role": "assistant", "content": "x"}]}));
    text.strip_prefix("Example 3, message 1: ").unwrap_or(&text).to_owned()
}

#[test]
fn too_few_examples() {
    let seven = fault(&vec![good().to_string(); 7].join("\n"));
    assert_eq!(seven.code, "invalid_n_examples");
    assert_eq!(seven.message, "Training file has 7 example(s), but must have at least 10 examples");
    assert_eq!(fault("\n \r\n").code, "invalid_n_examples");
    let Err(ReadError::Fault(empty)) = read(&b""[..], Purpose::Validation) else { panic!() };
    assert_eq!(empty.param, "validation_file");
    assert_eq!(empty.message, "Validation file has 0 example(s), but must have at least 1 example");
    assert!(read(good().to_string().as_bytes(), Purpose::Validation).is_ok());
}

#[test]
fn validation_files_have_their_own_code() {
    let Err(ReadError::Fault(fault)) = read(&b"{"[..], Purpose::Validation) else { panic!() };
    assert_eq!((fault.code, fault.param), ("invalid_validation_file", "validation_file"));
    assert_eq!(
        fault.message,
        "The job failed due to an invalid validation file. Invalid file format. \
         Line 1 is not a valid JSON object"
    );
}

#[test]
fn lines_that_are_not_objects() {
    for line in
        ["{", "[]", "7", "\"x\"", "{\"a\": NaN}", "{} {}", "{\"a\": 1e999}", "{\"a\": \"\\ud800\"}"]
    {
        let text = format!("\n\r\n{}", file_with(1, line));
        assert_eq!(fault(&text).message, format!("{PREFIX}Line 3 is not a valid JSON object"));
    }
    let mut bytes = good().to_string().into_bytes();
    bytes[20] = 0xff;
    assert!(read(&bytes[..], Purpose::Training).is_err());
    let deep = "[".repeat(100_000);
    assert!(fault(&format!("{{\"messages\": {deep}")).message.contains("Line 1 is not"));
}

#[test]
fn example_faults() {
    let user = json!({"role": "user", "content": "x"});
    let answer = json!({"role": "assistant", "content": "y"});
    for (example, expected) in [
        (json!({"tools": []}), "Example 3: missing key \"messages\""),
        (json!({"messages": []}), "Example 3: \"messages\" must be a non-empty array"),
        (json!({"messages": "x"}), "Example 3: \"messages\" must be a non-empty array"),
        (json!({"messages": [answer], "extra": 1}), "Example 3: unknown key \"extra\""),
        (json!({"messages": [user]}), "Example 3: last message must be from the assistant"),
        (
            json!({"messages": [user, {"role": "assistant", "content": "x", "weight": 0}]}),
            "Example 3: no assistant message to train on",
        ),
        (json!({"messages": [7, answer]}), "Example 3, message 1: must be an object"),
        (
            json!({"messages": [answer], "parallel_tool_calls": 1}),
            "Example 3: \"parallel_tool_calls\" must be true or false",
        ),
        (
            json!({"messages": [answer], "tools": {}}),
            "Example 3: \"tools\" must be an array of at most 128 tools",
        ),
        (
            json!({"messages": [answer], "tools": [{"type": "custom"}]}),
            "Example 3, tool 1: type must be \"function\"",
        ),
        (
            json!({"messages": [answer],
                "tools": [{"type": "function", "function": {"name": "a b"}}]}),
            "Example 3, tool 1: function.name must be 1 to 64 letters, digits, '_' or '-'",
        ),
        (
            json!({"messages": [answer], "tools": [{"type": "function",
                "function": {"name": "f", "parameters": 1}}]}),
            "Example 3, tool 1: function.parameters must be an object",
        ),
        (
            json!({"prompt": "a", "completion": "b"}),
            "Example 3: is in the fine-tune-completion format, but the file is in the \
             fine-tune-chat format",
        ),
    ] {
        assert_eq!(faults_of(&example), expected);
    }
}

#[test]
fn message_faults() {
    let text_fault = "content must be a string or an array of text parts";
    for (message, expected) in [
        (json!({"content": "x"}), "'role' is missing"),
        (json!({"role": null, "content": "x"}), "'role' is missing"),
        (json!({"role": "bot", "content": "x"}), "unknown role \"bot\""),
        (json!({"role": "function", "content": "x"}), "unknown role \"function\""),
        (json!({"role": 7, "content": "x"}), "role must be a string"),
        (json!({"role": "user"}), "'content' is missing"),
        (json!({"role": "system", "content": null}), "'content' is missing"),
        (json!({"role": "user", "content": 7}), text_fault),
        (json!({"role": "user", "content": []}), text_fault),
        (json!({"role": "user", "content": [{"type": "image_url"}]}), text_fault),
        (json!({"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}), text_fault),
        (json!({"role": "user", "content": "x", "wieght": 1}), "unknown key \"wieght\""),
        (json!({"role": "user", "content": "x", "name": 1}), "name must be a string"),
        (
            json!({"role": "user", "content": "x", "weight": 1}),
            "weight is allowed on assistant messages only",
        ),
        (json!({"role": "assistant", "content": "x", "weight": 2}), "weight must be 0 or 1"),
        (json!({"role": "assistant", "content": "x", "weight": 1.0}), "weight must be 0 or 1"),
        (json!({"role": "assistant", "content": "x", "weight": true}), "weight must be 0 or 1"),
        (
            json!({"role": "assistant", "content": null, "tool_calls": []}),
            "an assistant message must have content or tool_calls",
        ),
        (
            json!({"role": "user", "content": "x", "tool_calls": []}),
            "tool_calls are allowed on assistant messages only",
        ),
        (json!({"role": "assistant", "tool_calls": {}}), "tool_calls must be an array"),
        (json!({"role": "tool", "content": "x"}), "'tool_call_id' is missing"),
        (
            json!({"role": "tool", "content": "x", "tool_call_id": "call_9"}),
            "tool_call_id \"call_9\" has no matching tool call",
        ),
        (
            json!({"role": "tool", "content": "x", "tool_call_id": 9}),
            "tool_call_id must be a string",
        ),
        (
            json!({"role": "user", "content": "x", "tool_call_id": "c"}),
            "tool_call_id is allowed on tool messages only",
        ),
    ] {
        assert_eq!(message_fault(message), expected);
    }
}

#[test]
fn tool_call_faults() {
    let with_call = |call: Value| {
        let text = faults_of(&json!({
            "messages": [{"role": "assistant", "tool_calls": [call]}],
            "tools": [{"type": "function", "function": {"name": "f"}}]}));
        text.strip_prefix("Example 3, message 1: tool_calls[0]").unwrap().to_owned()
    };
    let call = |id: Value, name: &str, arguments: Value| {
        let function = json!({"name": name, "arguments": arguments});
        json!({"id": id, "type": "function", "function": function})
    };
    for (value, expected) in [
        (json!({"id": "c", "function": {}}), ".type must be \"function\""),
        (call(json!(7), "f", json!("{}")), ".id must be a non-empty string"),
        (call(json!("c"), "", json!("{}")), ".function.name must be a non-empty string"),
        (call(json!("c"), "g", json!("{}")), ": function \"g\" is not declared in tools"),
        (call(json!("c"), "f", json!({})), ".function.arguments must be a string"),
        (call(json!("c"), "f", json!("{")), ".function.arguments must hold valid JSON"),
    ] {
        assert_eq!(with_call(value), expected);
    }
}

#[test]
fn completion_and_preference_faults() {
    let fault_of = |example: Value| {
        let message = fault(&vec![example.to_string(); 10].join("\n")).message;
        let first = message.strip_prefix(PREFIX).unwrap().split("; ").next().unwrap();
        first.strip_prefix("Example 1").unwrap().to_owned()
    };
    let user = json!({"messages": [{"role": "user", "content": "x"}]});
    let answer = json!([{"role": "assistant", "content": "x"}]);
    let pair = |input: &Value, preferred: &Value| {
        json!({"input": input, "preferred_completion": preferred,
            "non_preferred_completion": answer})
    };
    let one = ": \"preferred_completion\" must hold exactly one assistant message";
    for (example, expected) in [
        (json!({"prompt": "x"}), ": missing key \"completion\""),
        (json!({"prompt": "x", "completion": 1}), ": \"completion\" must be a string"),
        (json!({"prompt": "x", "completion": "y", "z": 1}), ": unknown key \"z\""),
        (json!({"input": user}), ": missing key \"preferred_completion\""),
        (pair(&json!([]), &answer), ": \"input\" must be an object"),
        (
            pair(&json!({"messages": answer}), &answer),
            ": input must end with a user or tool message",
        ),
        (pair(&json!({"messages": []}), &answer), ": \"messages\" must be a non-empty array"),
        (pair(&user, &json!([])), one),
        (pair(&user, &json!([{"role": "user", "content": "x"}])), one),
        (
            pair(&user, &json!([{"role": "assistant"}])),
            ", preferred_completion: an assistant message must have content or tool_calls",
        ),
    ] {
        assert_eq!(fault_of(example), expected);
    }
}

#[test]
fn unknown_formats() {
    let text = [r#"{"text": "x"}"#; 12].join("\n");
    let expected =
        "Unexpected file format, expected either prompt/completion pairs or chat messages";
    assert_eq!(fault(&text).message, format!("{PREFIX}{expected}"));
    // Once a line shows the format, lines before it miss their key.
    assert_eq!(
        fault(&file_with(1, r#"{"mesages": []}"#)).message,
        format!("{PREFIX}Example 1: missing key \"messages\"")
    );
}

#[test]
fn the_jobs_method_must_fit() {
    let fault = FileFault::wrong_format(Purpose::Training, "file-x", Format::Chat, "dpo");
    assert_eq!(
        fault.message,
        format!(
            "{PREFIX}Input file file-x is in the fine-tune-chat format, but the job uses method=dpo"
        )
    );
}

#[test]
fn ten_faults_are_collected() {
    let bad = json!({"messages": [{"role": "user"}]}).to_string();
    let message = fault(&vec![bad; 100].join("\n")).message;
    let faults: Vec<&str> = message.strip_prefix(PREFIX).unwrap().split("; ").collect();
    assert_eq!(faults.len(), 10);
    assert_eq!(faults[9], "Example 10, message 1: 'content' is missing");
}

#[test]
fn lines_are_bounded() {
    let long = format!("{{\"prompt\": \"{}\"}}", "x".repeat(17 << 20));
    assert!(fault(&long).message.contains("Line 1 is longer than"));
}

#[test]
fn good_files() {
    let tools = json!([{"type": "function", "function": {"name": "f", "strict": true}}]);
    let rich = json!({"messages": [
        {"role": "developer",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "", "name": "Ann"},
        {"role": "assistant", "content": null, "weight": 0, "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "4", "tool_call_id": "c"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "weight": null},
    ], "tools": tools, "parallel_tool_calls": false});
    let text = format!("\u{feff}{rich}\r\n\r\n{}", file_with(2, &rich.to_string()));
    let dataset = read(text.as_bytes(), Purpose::Training).unwrap();
    assert_eq!((dataset.format, dataset.examples.len()), (Format::Chat, 11));
    let Example::Chat(chat) = &dataset.examples[0] else { panic!() };
    assert_eq!(chat.trained, [false, false, false, false, true]);
    assert_eq!(chat.messages[0].content.as_deref(), Some("ab"));
    assert_eq!((chat.messages[0].role, chat.parallel_tool_calls), (Role::System, Some(false)));
    assert_eq!(chat.messages[2].tool_calls[0].arguments, "{}");

    let pair = json!({"input": {"messages": [{"role": "user", "content": "x"}]},
        "preferred_completion": [{"role": "assistant", "content": "a"}],
        "non_preferred_completion": [{"role": "assistant", "content": "b"}]});
    let dataset = read(vec![pair.to_string(); 10].join("\n").as_bytes(), Purpose::Training);
    assert_eq!(dataset.unwrap().format, Format::Preference);
    let line = json!({"prompt": "a", "completion": ""}).to_string();
    let dataset = read(vec![line; 10].join("\n").as_bytes(), Purpose::Training).unwrap();
    assert_eq!(dataset.format, Format::Completion);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(crate::soak(2000)))]

    #[test]
    fn no_file_panics(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 1..6),
    ) {
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let rich = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "é"}]},
            {"role": "assistant", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "4", "tool_call_id": "c"},
            {"role": "assistant", "content": "x", "weight": 1}], "tools": tools});
        let mut bytes = file_with(2, &rich.to_string()).into_bytes();
        for (at, byte, kind) in edits {
            let at = at.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                2 => drop(bytes.remove(at)),
                _ => bytes[at] = b"{}[],:\"\n"[byte as usize % 8],
            }
        }
        if let Err(ReadError::Fault(fault)) = read(&bytes[..], Purpose::Training) {
            prop_assert!(!fault.message.contains('\n'));
            prop_assert!(fault.message.len() < 4000);
        }
    }
}
