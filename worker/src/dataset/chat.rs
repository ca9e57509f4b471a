//! Checks the conversation of one example. A fault is the text after `Example N`: what is wrong
//! with a message starts with `, message M: `.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::Chat;
use super::parse::{quoted, refuse_unknown_keys};
use crate::text::{Message, Role, ToolCall};

const CHAT_KEYS: [&str; 3] = ["messages", "tools", "parallel_tool_calls"];
const MESSAGE_KEYS: [&str; 6] = ["role", "content", "name", "tool_calls", "tool_call_id", "weight"];
const TOOLS_MAX: usize = 128;
const NAME_CHARS_MAX: usize = 64;
const CONTENT_FAULT: &str = "content must be a string or an array of text parts";

type Object = Map<String, Value>;

/// Takes a value out; null counts as not given.
fn take(object: &mut Object, key: &str) -> Option<Value> {
    object.remove(key).filter(|value| !value.is_null())
}

/// Reads the object that holds `messages`.
pub(super) fn chat(mut object: Object) -> Result<Chat, String> {
    refuse_unknown_keys(&object, &CHAT_KEYS)?;
    let list = match object.remove("messages") {
        Some(Value::Array(list)) if !list.is_empty() => list,
        Some(_) => return Err(": \"messages\" must be a non-empty array".into()),
        None => return Err(": missing key \"messages\"".into()),
    };
    let tools = tools(take(&mut object, "tools"))?;
    let parallel_tool_calls = match take(&mut object, "parallel_tool_calls") {
        None => None,
        Some(Value::Bool(parallel)) => Some(parallel),
        Some(_) => return Err(": \"parallel_tool_calls\" must be true or false".into()),
    };
    let mut chat = Chat { messages: Vec::new(), trained: Vec::new(), tools, parallel_tool_calls };
    let mut call_ids = HashSet::new();
    for (index, value) in list.into_iter().enumerate() {
        let (message, trained) = message(value, &chat.tools, &call_ids)
            .map_err(|fault| format!(", message {}: {fault}", index + 1))?;
        call_ids.extend(message.tool_calls.iter().map(|call| call.id.clone()));
        chat.messages.push(message);
        chat.trained.push(trained);
    }
    Ok(chat)
}

/// Reads one of the two answers of a preference example.
pub(super) fn completion_message(
    key: &str,
    value: Option<Value>,
    input: &Chat,
) -> Result<Message, String> {
    let one = || format!(": \"{key}\" must hold exactly one assistant message");
    let Some(Value::Array(list)) = value else { return Err(one()) };
    let [value] = <[Value; 1]>::try_from(list).map_err(|_| one())?;
    let (message, _) = message(value, &input.tools, &HashSet::new())
        .map_err(|fault| format!(", {key}: {fault}"))?;
    if message.role == Role::Assistant { Ok(message) } else { Err(one()) }
}

fn tools(value: Option<Value>) -> Result<Vec<Value>, String> {
    let list = match value {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= TOOLS_MAX => list,
        Some(_) => {
            return Err(format!(": \"tools\" must be an array of at most {TOOLS_MAX} tools"));
        }
    };
    for (index, tool) in list.iter().enumerate() {
        let function = &tool["function"];
        let fault = if tool["type"] != "function" {
            "type must be \"function\""
        } else if !function["name"].as_str().is_some_and(is_function_name) {
            "function.name must be 1 to 64 letters, digits, '_' or '-'"
        } else if !matches!(function["parameters"], Value::Null | Value::Object(_)) {
            "function.parameters must be an object"
        } else {
            continue;
        };
        return Err(format!(", tool {}: {fault}", index + 1));
    }
    Ok(list)
}

fn is_function_name(name: &str) -> bool {
    (1..=NAME_CHARS_MAX).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
}

/// One message and whether it is trained; a fault is the text after `message M: `.
fn message(
    value: Value,
    tools: &[Value],
    call_ids: &HashSet<String>,
) -> Result<(Message, bool), String> {
    let Value::Object(mut object) = value else {
        return Err("must be an object".into());
    };
    let role = role(&mut object)?;
    if let Some(key) = object.keys().find(|key| !MESSAGE_KEYS.contains(&key.as_str())) {
        return Err(format!("unknown key {}", quoted(key)));
    }
    let trained = weight(take(&mut object, "weight"), role)?;
    let name = match take(&mut object, "name") {
        None => None,
        Some(Value::String(name)) => Some(name),
        Some(_) => return Err("name must be a string".into()),
    };
    let tool_calls = tool_calls(take(&mut object, "tool_calls"), role, tools)?;
    let tool_call_id = tool_call_id(take(&mut object, "tool_call_id"), role, call_ids)?;
    let content = content(take(&mut object, "content"), role)?;
    match (&content, role) {
        (None, Role::Assistant) if tool_calls.is_empty() => {
            return Err("an assistant message must have content or tool_calls".into());
        }
        (None, Role::System | Role::User | Role::Tool) => {
            return Err("'content' is missing".into());
        }
        _ => {}
    }
    let message =
        Message { role, content, name, tool_calls, tool_call_id, reasoning_content: None };
    Ok((message, trained))
}

fn role(object: &mut Object) -> Result<Role, String> {
    match take(object, "role") {
        None => Err("'role' is missing".into()),
        Some(Value::String(name)) => {
            Role::parse(&name).ok_or_else(|| format!("unknown role {}", quoted(&name)))
        }
        Some(_) => Err("role must be a string".into()),
    }
}

fn weight(value: Option<Value>, role: Role) -> Result<bool, String> {
    match value {
        None => Ok(role == Role::Assistant),
        Some(_) if role != Role::Assistant => {
            Err("weight is allowed on assistant messages only".into())
        }
        Some(value) => match value.as_u64() {
            Some(0) => Ok(false),
            Some(1) => Ok(true),
            _ => Err("weight must be 0 or 1".into()),
        },
    }
}

fn content(value: Option<Value>, role: Role) -> Result<Option<String>, String> {
    let parts = match value {
        None => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(text)),
        Some(Value::Array(parts)) if !parts.is_empty() => parts,
        Some(_) => return Err(CONTENT_FAULT.into()),
    };
    let mut joined = String::new();
    for part in &parts {
        let text = match part["type"].as_str() {
            Some("text") => part["text"].as_str(),
            Some("refusal") if role == Role::Assistant => part["refusal"].as_str(),
            _ => None,
        };
        joined.push_str(text.ok_or(CONTENT_FAULT)?);
    }
    Ok(Some(joined))
}

fn tool_calls(value: Option<Value>, role: Role, tools: &[Value]) -> Result<Vec<ToolCall>, String> {
    let list = match value {
        None => return Ok(Vec::new()),
        Some(_) if role != Role::Assistant => {
            return Err("tool_calls are allowed on assistant messages only".into());
        }
        Some(Value::Array(list)) => list,
        Some(_) => return Err("tool_calls must be an array".into()),
    };
    let numbered = list.iter().enumerate();
    numbered
        .map(|(index, call)| {
            tool_call(call, tools).map_err(|fault| format!("tool_calls[{index}]{fault}"))
        })
        .collect()
}

fn tool_call(call: &Value, tools: &[Value]) -> Result<ToolCall, String> {
    let text = |value: &Value, place: &str| {
        let text = value.as_str().filter(|text| !text.is_empty());
        text.map(str::to_owned).ok_or_else(|| format!("{place} must be a non-empty string"))
    };
    if call["type"] != "function" {
        return Err(".type must be \"function\"".into());
    }
    let function = &call["function"];
    let id = text(&call["id"], ".id")?;
    let name = text(&function["name"], ".function.name")?;
    if !tools.iter().any(|tool| tool["function"]["name"] == *name) {
        return Err(format!(": function {} is not declared in tools", quoted(&name)));
    }
    let Some(arguments) = function["arguments"].as_str() else {
        return Err(".function.arguments must be a string".into());
    };
    if serde_json::from_str::<Value>(arguments).is_err() {
        return Err(".function.arguments must hold valid JSON".into());
    }
    Ok(ToolCall { id, name, arguments: arguments.to_owned() })
}

fn tool_call_id(
    value: Option<Value>,
    role: Role,
    call_ids: &HashSet<String>,
) -> Result<Option<String>, String> {
    match (value, role) {
        (None, Role::Tool) => Err("'tool_call_id' is missing".into()),
        (None, _) => Ok(None),
        (Some(Value::String(id)), Role::Tool) if call_ids.contains(&id) => Ok(Some(id)),
        (Some(Value::String(id)), Role::Tool) => {
            Err(format!("tool_call_id {} has no matching tool call", quoted(&id)))
        }
        (Some(_), Role::Tool) => Err("tool_call_id must be a string".into()),
        (Some(_), _) => Err("tool_call_id is allowed on tool messages only".into()),
    }
}
