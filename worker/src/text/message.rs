//! Chat messages as templates see them, for serving and for training alike. Plain values: this
//! module knows nothing of HTTP, of rows, or of the engine.

use serde_json::{Map, Value};

/// Who speaks. The `developer` role of the HTTP interface is [`Role::System`] here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Instructions.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    /// The role of that name on the wire, or none when it is unknown.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "system" | "developer" => Some(Self::System),
            "user" => Some(Self::User),
            "assistant" => Some(Self::Assistant),
            "tool" => Some(Self::Tool),
            _ => None,
        }
    }

    /// The name templates know.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// One function call of an assistant message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// `call_…`, as the client or the engine gave it.
    pub id: String,
    /// Function name.
    pub name: String,
    /// The arguments as JSON text; it may not parse, models write it.
    pub arguments: String,
}

/// One chat message; content parts are joined already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// The text; absent only on assistant messages.
    pub content: Option<String>,
    /// Name of the speaker or of the tool.
    pub name: Option<String>,
    /// Calls of an assistant message.
    pub tool_calls: Vec<ToolCall>,
    /// The call a tool message answers.
    pub tool_call_id: Option<String>,
    /// Reasoning text that clients replay.
    pub reasoning_content: Option<String>,
}

impl Message {
    /// A message of `role` that holds `content` and nothing else.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: Some(content.into()),
            name: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
            reasoning_content: None,
        }
    }
}

/// How the rendered conversation ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// After the last message; nobody is asked to speak.
    Closed,
    /// With the opening of an assistant turn: what serving sends to the model.
    Open,
    /// Inside the last message, which must be the assistant's: the model goes on with its text.
    Continue,
}

/// All that a chat template may see of one request or example.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// At least one message.
    pub messages: &'a [Message],
    /// Tool definitions as the client sent them; empty means none.
    pub tools: &'a [Value],
    /// Extra template variables (`chat_template_kwargs`).
    pub template_kwargs: &'a Map<String, Value>,
    /// How the text ends.
    pub ending: Ending,
    /// Unix seconds (UTC) for templates that write the date. Serving passes the present; a
    /// training job passes its creation, so that a resumed job reads the same tokens.
    pub unix_time: i64,
}
