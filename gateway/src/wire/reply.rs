//! Replies of the two inference endpoints when they are sent whole.

use serde::Serialize;
use serde_json::Value;
use storage::queue::message::Finish;
use utoipa::ToSchema;

use crate::wire::logprobs::{ChatLogprobs, CompletionLogprobs};

/// `chat.completion`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    /// `chatcmpl-…`.
    pub id: String,
    /// Always `chat.completion`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: i64,
    /// The model as requested.
    pub model: String,
    /// In index order.
    pub choices: Vec<ChatChoice>,
    /// Token counts.
    pub usage: UsageReply,
    /// `default`, if a tier was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_tier: Option<&'static str>,
    /// Names weights, kernels and adapter version.
    pub system_fingerprint: String,
}

/// One answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    /// From 0.
    pub index: u32,
    /// The answer.
    pub message: AssistantMessage,
    /// Null unless asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
}

/// The model's message.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AssistantMessage {
    /// Always `assistant`.
    pub role: &'static str,
    /// Text.
    pub content: Option<String>,
    /// Always null.
    pub refusal: Option<String>,
    /// Always empty.
    #[schema(value_type = Vec<Object>)]
    pub annotations: Vec<Value>,
}

/// `text_completion`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Completion {
    /// `cmpl-…`.
    pub id: String,
    /// Always `text_completion`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: i64,
    /// The model as requested.
    pub model: String,
    /// Prompt-major.
    pub choices: Vec<CompletionChoice>,
    /// Token counts.
    pub usage: UsageReply,
    /// Names weights, kernels and adapter version.
    pub system_fingerprint: String,
}

/// One completion.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CompletionChoice {
    /// prompt · n + choice.
    pub index: u32,
    /// Text, after the prompt if echoed.
    pub text: String,
    /// Null unless asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`.
    pub finish_reason: &'static str,
}

/// Token counts of one reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct UsageReply {
    /// Of the prompts, special tokens included.
    pub prompt_tokens: u64,
    /// Sampled, over all choices, end tokens and matched stops included.
    pub completion_tokens: u64,
    /// Their sum.
    pub total_tokens: u64,
}

impl UsageReply {
    /// From its two parts.
    pub fn new(prompt_tokens: u64, completion_tokens: u64) -> UsageReply {
        let total_tokens = prompt_tokens + completion_tokens;
        UsageReply { prompt_tokens, completion_tokens, total_tokens }
    }
}

/// The word clients read.
pub fn finish_reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}
