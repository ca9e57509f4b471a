//! Chat messages: what clients send, many shapes of it, becomes the queue's one shape.
//!
//! Any Unicode text passes, control characters and U+0000 included. Unknown keys inside a message
//! are ignored: clients replay whole assistant messages.

use serde_json::Value;
use storage::queue::message::{ChatMessage, ToolCall};

use crate::error::{ApiError, ApiResult};
use crate::wire::fields::{Fields, clip, empty_array, not_one_of, text};

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Parses the `messages` field.
pub fn parse_messages(fields: &mut Fields) -> ApiResult<Vec<ChatMessage>> {
    let items = fields.array("messages")?.ok_or_else(|| fields.missing("messages"))?;
    if items.is_empty() {
        return Err(empty_array("messages"));
    }
    let parse = |(i, item)| parse_message(item, &format!("messages[{i}]"));
    items.into_iter().enumerate().map(parse).collect()
}

fn parse_message(item: Value, path: &str) -> ApiResult<ChatMessage> {
    let mut fields = Fields::of(item, path)?;
    let role = fields.required_string("role")?;
    if role == "function" {
        let message = "The role 'function' is not supported; use tool messages.";
        return Err(ApiError::unsupported_value(fields.path("role"), message));
    }
    if !ROLES.contains(&role.as_str()) {
        return Err(not_one_of(&fields.path("role"), &role, &ROLES));
    }
    let content = parse_content(&mut fields, &role)?;
    let mut message = ChatMessage {
        content,
        name: fields.string("name")?,
        role: if role == "developer" { "system".to_owned() } else { role },
        ..ChatMessage::default()
    };
    match message.role.as_str() {
        "assistant" => {
            if fields.take("function_call").is_some() {
                let hint = "Use 'tool_calls'.";
                return Err(ApiError::unsupported_parameter(fields.path("function_call"), hint));
            }
            message.tool_calls = parse_tool_calls(&mut fields)?;
            message.reasoning_content = fields.string("reasoning_content")?;
        }
        "tool" => message.tool_call_id = Some(fields.required_string("tool_call_id")?),
        _ => {}
    }
    Ok(message)
}

/// Text of a message; only assistant messages may have none.
fn parse_content(fields: &mut Fields, role: &str) -> ApiResult<Option<String>> {
    let path = fields.path("content");
    let optional = role == "assistant";
    match fields.take_raw("content") {
        None if optional => Ok(None),
        None => Err(ApiError::missing(path)),
        Some(Value::Null) if optional => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Array(parts)) if parts.is_empty() && !optional => Err(empty_array(&path)),
        Some(Value::Array(parts)) => {
            let mut joined = String::new();
            for (j, part) in parts.into_iter().enumerate() {
                joined.push_str(&parse_part(part, &format!("{path}[{j}]"), optional)?);
            }
            Ok(Some(joined))
        }
        Some(other) => Err(ApiError::invalid_type(path, "a string or an array", &other)),
    }
}

/// Text of one content part.
fn parse_part(part: Value, path: &str, assistant: bool) -> ApiResult<String> {
    let mut fields = Fields::of(part, path)?;
    let kind = fields.required_string("type")?;
    match kind.as_str() {
        "text" => fields.required_string("text"),
        "refusal" if assistant => fields.required_string("refusal"),
        "image_url" | "input_audio" | "file" | "refusal" => {
            let message = format!("Content parts of type '{kind}' are not supported here.");
            Err(ApiError::unsupported_value(path, message))
        }
        _ => {
            let message =
                format!("Invalid value: '{}'. Supported values are: 'text'.", clip(&kind));
            Err(ApiError::invalid_value(fields.path("type"), message))
        }
    }
}

fn parse_tool_calls(fields: &mut Fields) -> ApiResult<Vec<ToolCall>> {
    let path = fields.path("tool_calls");
    let calls = fields.array("tool_calls")?.unwrap_or_default();
    let parse = |(i, call): (usize, Value)| {
        let mut call = Fields::of(call, format!("{path}[{i}]"))?;
        let kind = call.string("type")?.unwrap_or_else(|| "function".to_owned());
        if kind != "function" {
            let message = "Only tool calls of type 'function' are supported.";
            return Err(ApiError::unsupported_value(call.path("type"), message));
        }
        let id = call.required_string("id")?;
        let mut function = call.object("function")?.ok_or_else(|| call.missing("function"))?;
        Ok(ToolCall {
            id,
            name: function.required_string("name")?,
            arguments: function.required_string("arguments")?,
        })
    };
    calls.into_iter().enumerate().map(parse).collect()
}

/// Checks `tools`, at most 128 functions with well-formed unique names; `[]` is none.
/// Returns their names.
pub fn parse_tools(fields: &mut Fields) -> ApiResult<Vec<String>> {
    let tools = fields.array("tools")?.unwrap_or_default();
    crate::wire::fields::max_items(tools.len(), "tools", 128)?;
    let mut names = Vec::with_capacity(tools.len());
    for (i, tool) in tools.into_iter().enumerate() {
        let mut tool = Fields::of(tool, format!("tools[{i}]"))?;
        let kind = tool.required_string("type")?;
        if kind != "function" {
            let message = format!("Tools of type '{}' are not supported.", clip(&kind));
            return Err(ApiError::unsupported_value(tool.path("type"), message));
        }
        let mut function = tool.object("function")?.ok_or_else(|| tool.missing("function"))?;
        let name = function.required_string("name")?;
        check_name(&name, &function.path("name"))?;
        function.object("parameters")?;
        function.string("description")?;
        names.push(name);
    }
    Ok(names)
}

/// Function names: 1 to 64 of `[A-Za-z0-9_-]`.
fn check_name(name: &str, path: &str) -> ApiResult<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
        let message =
            format!("Invalid '{path}': expected 1 to 64 letters, digits, underscores or hyphens.");
        return Err(ApiError::invalid_value(path, message));
    }
    Ok(())
}

/// Checks `tool_choice` against the tools given. Returns whether a call may be made.
pub fn parse_tool_choice(fields: &mut Fields, names: &[String]) -> ApiResult<bool> {
    let Some(choice) = fields.take("tool_choice") else { return Ok(!names.is_empty()) };
    let may_call = match choice {
        Value::String(word) => {
            const WORDS: [&str; 3] = ["none", "auto", "required"];
            if !WORDS.contains(&word.as_str()) {
                return Err(not_one_of("tool_choice", &word, &WORDS));
            }
            word != "none"
        }
        Value::Object(_) => {
            check_named_choice(Fields::of(choice, "tool_choice")?, names)?;
            true
        }
        other => {
            return Err(ApiError::invalid_type("tool_choice", "a string or an object", &other));
        }
    };
    if may_call && names.is_empty() {
        let message = "Invalid value for 'tool_choice': 'tool_choice' is only allowed when \
                       'tools' are specified.";
        return Err(ApiError::invalid_value("tool_choice", message));
    }
    Ok(may_call)
}

fn check_named_choice(mut choice: Fields, names: &[String]) -> ApiResult<()> {
    let kind = choice.required_string("type")?;
    match kind.as_str() {
        "function" => {
            let mut function =
                choice.object("function")?.ok_or_else(|| choice.missing("function"))?;
            let name = function.required_string("name")?;
            if !names.is_empty() && !names.contains(&name) {
                let message = format!("Tool choice '{}' is not among 'tools'.", clip(&name));
                return Err(ApiError::invalid_value(function.path("name"), message));
            }
            Ok(())
        }
        "allowed_tools" => {
            choice.object("allowed_tools")?.ok_or_else(|| choice.missing("allowed_tools"))?;
            Ok(())
        }
        _ => Err(not_one_of("tool_choice.type", &kind, &["function", "allowed_tools"])),
    }
}

/// A list of strings at `path`.
pub fn strings(items: Vec<Value>, path: &str) -> ApiResult<Vec<String>> {
    let one = |(i, item)| text(item, &format!("{path}[{i}]"));
    items.into_iter().enumerate().map(one).collect()
}
