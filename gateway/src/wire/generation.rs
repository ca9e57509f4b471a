//! The fields that chat and text completions share: sampling, limits, streaming. A field that
//! changes the shape of the answer is honoured or refused, never ignored.

use serde_json::Value;
use storage::queue::message::{Limits, Sampling};

use crate::error::{ApiError, ApiResult};
use crate::wire::fields::{self, Fields};
use crate::wire::message::strings;

/// Bounds a request must keep, from the gateway's configuration.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Choices of one request, over all its prompts.
    pub choices: u32,
}

/// Sampling and limits; the seed is drawn where none was given.
#[derive(Clone, Debug)]
pub struct Generation {
    /// How tokens are drawn; `logprobs` is set by the caller.
    pub sampling: Sampling,
    /// When a choice ends; `max_tokens` is set by the caller.
    pub limits: Limits,
    /// Choices per prompt.
    pub choices: u32,
}

/// How the answer is delivered.
#[derive(Clone, Copy, Debug, Default)]
pub struct Delivery {
    /// As server-sent events.
    pub stream: bool,
    /// With a usage chunk at the end.
    pub include_usage: bool,
}

/// Parses what both endpoints share.
pub fn parse_generation(fields: &mut Fields, bounds: Bounds) -> ApiResult<Generation> {
    let sampling = Sampling {
        temperature: fields.number("temperature", 0.0, 2.0)?.unwrap_or(1.0) as f32,
        top_p: fields.number("top_p", 0.0, 1.0)?.unwrap_or(1.0) as f32,
        // −1 is a common spelling of "off".
        top_k: fields.integer("top_k", -1, i64::from(u32::MAX))?.unwrap_or(0).max(0) as u32,
        min_p: fields.number("min_p", 0.0, 1.0)?.unwrap_or(0.0) as f32,
        presence_penalty: fields.number("presence_penalty", -2.0, 2.0)?.unwrap_or(0.0) as f32,
        frequency_penalty: fields.number("frequency_penalty", -2.0, 2.0)?.unwrap_or(0.0) as f32,
        repetition_penalty: fields.number("repetition_penalty", 0.01, 10.0)?.unwrap_or(1.0) as f32,
        logit_bias: parse_logit_bias(fields)?,
        seed: match fields.integer("seed", i64::MIN, i64::MAX)? {
            Some(seed) => seed,
            None => rand::random_range(0..i64::MAX),
        },
        logprobs: None,
    };
    let limits = Limits {
        max_tokens: None,
        min_tokens: fields.integer("min_tokens", 0, i64::from(u32::MAX))?.unwrap_or(0) as u32,
        stop: parse_stop(fields)?,
        stop_token_ids: parse_stop_token_ids(fields)?,
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
    };
    let most = bounds.choices.min(128);
    let choices = fields.integer("n", 1, i64::from(most))?.unwrap_or(1) as u32;
    Ok(Generation { sampling, limits, choices })
}

/// `min_tokens` may not exceed the token limit.
pub fn check_min_tokens(limits: &Limits) -> ApiResult<()> {
    match limits.max_tokens {
        Some(max) if limits.min_tokens > max => Err(ApiError::bad(
            "invalid_parameter_combination",
            "min_tokens",
            format!("'min_tokens' ({}) exceeds the token limit ({max}).", limits.min_tokens),
        )),
        _ => Ok(()),
    }
}

/// An upper bound of generated tokens; values beyond 32 bits mean "as many as fit".
pub fn token_limit(fields: &mut Fields, key: &str, min: i64) -> ApiResult<Option<u32>> {
    let limit = fields.integer(key, min, i64::MAX)?;
    Ok(limit.map(|n| u32::try_from(n).unwrap_or(u32::MAX)))
}

fn parse_stop(fields: &mut Fields) -> ApiResult<Vec<String>> {
    const STOPS_MAX: usize = 4;
    const STOP_CHARS_MAX: usize = 1024;
    let stops = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::String(text)) => vec![text],
        Some(Value::Array(items)) => {
            fields::max_items(items.len(), "stop", STOPS_MAX)?;
            strings(items, "stop")?
        }
        Some(other) => {
            return Err(ApiError::invalid_type("stop", "a string or an array", &other));
        }
    };
    for text in &stops {
        if text.is_empty() {
            let message = "Invalid 'stop': empty string. Expected a string with minimum length 1.";
            return Err(ApiError::bad("string_below_min_length", "stop", message));
        }
        fields::max_chars(text, "stop", STOP_CHARS_MAX)?;
    }
    Ok(stops)
}

fn parse_stop_token_ids(fields: &mut Fields) -> ApiResult<Vec<u32>> {
    const IDS_MAX: usize = 128;
    let items = fields.array("stop_token_ids")?.unwrap_or_default();
    fields::max_items(items.len(), "stop_token_ids", IDS_MAX)?;
    let one = |(i, item): (usize, &Value)| token_id(item, &format!("stop_token_ids[{i}]"));
    items.iter().enumerate().map(one).collect()
}

/// A token id; whether the vocabulary has it is for the worker to say.
pub fn token_id(value: &Value, path: &str) -> ApiResult<u32> {
    fields::integer(value, path, 0, i64::from(u32::MAX)).map(|id| id as u32)
}

fn parse_logit_bias(fields: &mut Fields) -> ApiResult<Vec<(u32, f32)>> {
    const BIASES_MAX: usize = 4096;
    let Some(object) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let map = object.rest();
    if map.len() > BIASES_MAX {
        let message = format!("Invalid 'logit_bias': at most {BIASES_MAX} entries are allowed.");
        return Err(ApiError::invalid_value("logit_bias", message));
    }
    let one = |(key, value): (&String, &Value)| {
        let path = format!("logit_bias.{}", fields::clip(key));
        let digits = !key.is_empty() && key.bytes().all(|b| b.is_ascii_digit());
        let Some(id) = key.parse::<u32>().ok().filter(|_| digits) else {
            let message = "Invalid key in 'logit_bias': expected token ids as decimal strings.";
            return Err(ApiError::invalid_value("logit_bias", message));
        };
        Ok((id, fields::number(value, &path, -100.0, 100.0)? as f32))
    };
    map.iter().map(one).collect()
}

/// `stream` and `stream_options`.
pub fn parse_delivery(fields: &mut Fields) -> ApiResult<Delivery> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let mut delivery = Delivery { stream, include_usage: false };
    if let Some(mut options) = fields.object("stream_options")? {
        if !stream {
            let message = "The 'stream_options' parameter is only allowed when 'stream' is true.";
            return Err(ApiError::invalid_value("stream_options", message));
        }
        delivery.include_usage = options.boolean("include_usage")?.unwrap_or(false);
        options.boolean("include_obfuscation")?;
        options.finish()?;
    }
    Ok(delivery)
}
