//! Renderings and ids equal those of transformers.

use serde_json::{Map, Value};

use super::*;

fn string(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn message(value: &Value) -> Message {
    let calls = value["tool_calls"].as_array().into_iter().flatten().map(|call| ToolCall {
        id: string(&call["id"]).unwrap(),
        name: string(&call["function"]["name"]).unwrap(),
        arguments: call["function"]["arguments"].to_string(),
    });
    Message {
        role: Role::parse(value["role"].as_str().unwrap()).unwrap(),
        content: string(&value["content"]),
        name: string(&value["name"]),
        tool_calls: calls.collect(),
        tool_call_id: string(&value["tool_call_id"]),
        reasoning_content: string(&value["reasoning_content"]),
    }
}

#[test]
fn prompts_equal_transformers() {
    let golden = include_str!("../../../tests/fixtures/text/golden.jsonl");
    let mut refusals = 0;
    for (index, line) in golden.lines().enumerate() {
        let case: Value = serde_json::from_str(line).unwrap();
        let name = case["template"].as_str().unwrap();
        let config = case["config"].to_string();
        let tokenizer = tokenizer_source(case["tokenizer"].as_str().unwrap_or_default());
        let text = text(tokenizer, template_source(name), &config);
        let messages: Vec<Message> =
            case["messages"].as_array().unwrap().iter().map(message).collect();
        let kwargs: Map<String, Value> = case["kwargs"].as_object().unwrap().clone();
        let conversation = Conversation {
            messages: &messages,
            tools: case["tools"].as_array().unwrap(),
            template_kwargs: &kwargs,
            ending: if case["closed"] == true { Ending::Closed } else { Ending::Open },
            unix_time: case["unix_time"].as_i64().unwrap(),
        };
        let place = format!("line {}, {name}", index + 1);
        match (text.render(&conversation), string(&case["error"])) {
            (Ok(rendered), None) => {
                assert_eq!(rendered.text, case["text"].as_str().unwrap(), "{place}");
                let ids: Vec<Value> =
                    text.chat_prompt(&conversation).unwrap().into_iter().map(Value::from).collect();
                assert_eq!(&ids, case["ids"].as_array().unwrap(), "{place}");
            }
            (Err(TextError::Template(TemplateError::Refused(message))), Some(expected)) => {
                assert_eq!(message, expected, "{place}");
                refusals += 1;
            }
            (result, expected) => panic!("{place}: {result:?}, expected {expected:?}"),
        }
    }
    assert!(golden.lines().count() >= 20 && refusals >= 3);
}

#[test]
fn a_last_assistant_message_can_be_continued() {
    let text = family("qwen25");
    let kwargs = Map::new();
    let messages = [Message::new(Role::User, "Hi"), Message::new(Role::Assistant, " Well, ")];
    let conversation = Conversation { ending: Ending::Continue, ..open(&messages, &kwargs) };
    let rendered = text.render(&conversation).unwrap();
    assert!(rendered.text.ends_with("<|im_start|>assistant\n Well,"), "{}", rendered.text);
    let last = rendered.controls.last().unwrap();
    assert_eq!(&rendered.text[last.range.clone()], "<|im_start|>");
    // Nothing written yet: the turn is simply opened.
    let empty = [messages[0].clone(), Message::new(Role::Assistant, "")];
    let conversation = Conversation { messages: &empty, ..conversation };
    assert_eq!(
        text.render(&conversation).unwrap(),
        text.render(&open(&messages[..1], &kwargs)).unwrap()
    );
    let conversation = Conversation { messages: &messages[..1], ..conversation };
    assert!(matches!(
        text.render(&conversation),
        Err(TextError::Template(TemplateError::NothingToContinue))
    ));
}

#[test]
fn reserved_variables_are_refused() {
    let text = family("qwen25");
    for name in ["messages", "eos_token", "add_generation_prompt"] {
        let kwargs = Map::from_iter([(name.to_owned(), Value::Bool(false))]);
        let error = text.render(&open(&[Message::new(Role::User, "x")], &kwargs)).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn mistral_takes_long_call_ids() {
    let text = family("mistral");
    let kwargs = Map::new();
    let id = "call_Ab12Cd34Ef56Gh78";
    let mut asks = Message::new(Role::Assistant, "");
    asks.tool_calls = vec![ToolCall { id: id.into(), name: "f".into(), arguments: "{}".into() }];
    let mut answers = Message::new(Role::Tool, "4");
    answers.tool_call_id = Some(id.into());
    let rendered =
        text.render(&open(&[Message::new(Role::User, "x"), asks, answers], &kwargs)).unwrap();
    assert_eq!(rendered.text.matches("4Ef56Gh78").count(), 2, "{}", rendered.text);
}

#[test]
fn arguments_stay_text_where_a_template_adds_them_to_text() {
    let template = "{% for m in messages %}{% if m.tool_calls %}\
        {{ 'call ' + m.tool_calls[0].function.arguments }}{% else %}{{ m.content }}{% endif %}\
        {% endfor %}";
    let text = text(BYTE_LEVEL, template, "{}");
    let mut asks = Message::new(Role::Assistant, "");
    let arguments = "{\"a\":1}".to_owned();
    asks.tool_calls = vec![ToolCall { id: "c".into(), name: "f".into(), arguments }];
    let rendered = text.render(&open(&[asks], &Map::new())).unwrap();
    assert_eq!(rendered.text, "call {\"a\":1}");
}

#[test]
fn templates_are_bounded() {
    let kwargs = Map::new();
    let messages = [Message::new(Role::User, "x")];
    for source in [
        "{% for a in range(90000) %}{% for b in range(90000) %}x{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}\
         {% endfor %}{{ ns.s }}",
        "{{ 'x' * 99999999999 }}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    ] {
        let text = text(BYTE_LEVEL, source, "{}");
        let error = text.render(&open(&messages, &kwargs)).unwrap_err();
        assert!(!error.to_string().contains('\n'), "{error}");
    }
}

#[test]
fn template_faults_are_found_at_start_in_one_line() {
    let parse = |config: &str| ChatTemplate::parse(Some(config.as_bytes()), None);
    for (config, words) in [
        (r#"{"chat_template": "a\n{% if %}"}"#, "line 2"),
        (r#"{"chat_template": [{"name": "rag", "template": "x"}]}"#, "default"),
        (r#"{"chat_template": 7}"#, "neither"),
        ("{", "tokenizer_config.json"),
    ] {
        let error = parse(config).unwrap_err();
        assert!(!error.is_refusal() && error.to_string().contains(words), "{error}");
        assert!(!error.to_string().contains('\n'), "{error}");
    }
    assert!(parse(r#"{"bos_token": "<s>"}"#).unwrap().is_none());
}

#[test]
fn a_named_tool_template_serves_conversations_with_tools() {
    let config = r#"{"chat_template": [{"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools {{ tools | length }}"}]}"#;
    let template = ChatTemplate::parse(Some(config.as_bytes()), None).unwrap();
    let text = Text { tokenizer: Tokenizer::from_bytes(BYTE_LEVEL.as_bytes()).unwrap(), template };
    let (messages, kwargs) = ([Message::new(Role::User, "x")], Map::new());
    let plain = open(&messages, &kwargs);
    assert_eq!(text.render(&plain).unwrap().text, "plain");
    let tools = [serde_json::json!({"type": "function", "function": {"name": "f"}})];
    let with_tools = Conversation { tools: &tools, ..plain };
    assert_eq!(text.render(&with_tools).unwrap().text, "tools 1");
}

#[test]
fn a_folder_loads() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), BYTE_LEVEL).unwrap();
    assert!(Text::load(folder.path()).unwrap().template.is_none());
    std::fs::write(folder.path().join("chat_template.jinja"), template_source("qwen25")).unwrap();
    let config = r#"{"chat_template": "ignored", "eos_token": "<|im_end|>"}"#;
    std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    let text = Text::load(folder.path()).unwrap();
    let (messages, kwargs) = ([Message::new(Role::User, "x")], Map::new());
    assert!(text.render(&open(&messages, &kwargs)).unwrap().text.starts_with("<|im_start|>"));
    std::fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    assert!(Text::load(folder.path()).unwrap_err().to_string().contains("tokenizer.json"));
}
