//! `POST /v1/chat/completions`: the request body.

use serde_json::{Map, Value};
use storage::queue::message::{ChatMessage, Input};

use crate::error::{ApiError, ApiResult};
use crate::wire::fields::{self, Fields, not_one_of};
use crate::wire::generation::{
    Bounds, Delivery, Generation, check_min_tokens, parse_delivery, parse_generation, token_limit,
};
use crate::wire::message::{parse_messages, parse_tool_choice, parse_tools, strings};

/// A checked chat request, all but its model.
#[derive(Debug)]
pub struct ChatRequest {
    /// The conversation.
    pub messages: Vec<ChatMessage>,
    /// Variables for the chat template.
    pub template_kwargs: Map<String, Value>,
    /// Sampling and limits.
    pub generation: Generation,
    /// Streaming.
    pub delivery: Delivery,
    /// The reply says `service_tier: default`.
    pub report_tier: bool,
}

impl ChatRequest {
    /// Parses the body from which `model` was taken already.
    pub fn parse(mut fields: Fields, bounds: Bounds) -> ApiResult<ChatRequest> {
        let messages = parse_messages(&mut fields)?;
        let mut generation = parse_generation(&mut fields, bounds)?;
        generation.limits.max_tokens = parse_max_tokens(&mut fields)?;
        check_min_tokens(&generation.limits)?;
        generation.sampling.logprobs = parse_logprobs(&mut fields)?;
        let delivery = parse_delivery(&mut fields)?;
        refuse_what_is_missing(&mut fields)?;
        let report_tier = check_ignored(&mut fields)?;
        let template_kwargs =
            fields.object("chat_template_kwargs")?.map(Fields::rest).unwrap_or_default();
        fields.finish()?;
        Ok(ChatRequest { messages, template_kwargs, generation, delivery, report_tier })
    }

    /// The prompt as the queue carries it.
    pub fn input(messages: Vec<ChatMessage>, template_kwargs: Map<String, Value>) -> Input {
        Input::Chat { messages, tools: Vec::new(), template_kwargs }
    }
}

fn parse_max_tokens(fields: &mut Fields) -> ApiResult<Option<u32>> {
    let old = token_limit(fields, "max_tokens", 1)?;
    let new = token_limit(fields, "max_completion_tokens", 1)?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => Err(ApiError::bad(
            "invalid_parameter_combination",
            "max_tokens",
            "'max_tokens' and 'max_completion_tokens' differ; give only one of them.",
        )),
        (old, new) => Ok(new.or(old)),
    }
}

fn parse_logprobs(fields: &mut Fields) -> ApiResult<Option<u8>> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0, 20)?;
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0) as u8)),
        (false, None) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid_value(
            "top_logprobs",
            "Invalid value for 'top_logprobs': it is only allowed when 'logprobs' is true.",
        )),
    }
}

/// Fields that would change the shape of the answer in ways this service does not offer.
fn refuse_what_is_missing(fields: &mut Fields) -> ApiResult<()> {
    for key in ["audio", "web_search_options", "moderation"] {
        if fields.take(key).is_some() {
            return Err(ApiError::unsupported_parameter(key, ""));
        }
    }
    refuse_functions(fields)?;
    let tools = parse_tools(fields)?;
    let may_call = parse_tool_choice(fields, &tools)?;
    fields.boolean("parallel_tool_calls")?;
    if may_call {
        let hint = "Set 'tool_choice' to 'none' to go on without calls.";
        return Err(ApiError::unsupported_parameter("tools", hint));
    }
    if let Some(mut format) = fields.object("response_format")? {
        match format.required_string("type")?.as_str() {
            "text" => {}
            kind @ ("json_object" | "json_schema") => {
                let message = format!("'response_format' of type '{kind}' is not supported.");
                return Err(ApiError::unsupported_value("response_format", message));
            }
            other => {
                let allowed = ["text", "json_object", "json_schema"];
                return Err(not_one_of("response_format.type", other, &allowed));
            }
        }
    }
    if let Some(items) = fields.array("modalities")? {
        for (i, word) in strings(items, "modalities")?.iter().enumerate() {
            match word.as_str() {
                "text" => {}
                "audio" => {
                    let message = "Audio output is not supported.";
                    return Err(ApiError::unsupported_value("modalities", message));
                }
                other => {
                    return Err(not_one_of(&format!("modalities[{i}]"), other, &["text"]));
                }
            }
        }
    }
    Ok(())
}

/// The predecessors of tools: empty forms pass.
fn refuse_functions(fields: &mut Fields) -> ApiResult<()> {
    match fields.take("functions") {
        None => {}
        Some(Value::Array(items)) if items.is_empty() => {}
        Some(_) => return Err(ApiError::unsupported_parameter("functions", "Use 'tools'.")),
    }
    match fields.take("function_call") {
        None => Ok(()),
        Some(Value::String(word)) if word == "none" => Ok(()),
        Some(_) => Err(ApiError::unsupported_parameter("function_call", "Use 'tool_choice'.")),
    }
}

/// Fields that are accepted without effect, still type-checked. Returns whether a service tier
/// was sent.
fn check_ignored(fields: &mut Fields) -> ApiResult<bool> {
    const TIERS: [&str; 6] = ["auto", "default", "flex", "scale", "priority", "fast"];
    fields::metadata(fields)?;
    for key in [
        "user",
        "safety_identifier",
        "reasoning_effort",
        "verbosity",
        "prompt_cache_key",
        "prompt_cache_retention",
    ] {
        fields.string(key)?;
    }
    fields.boolean("store")?;
    fields.object("prediction")?;
    fields.object("prompt_cache_options")?;
    Ok(fields.choice("service_tier", &TIERS)?.is_some())
}
