//! `POST /v1/completions`: the request body. No template is applied to these prompts.

use serde_json::Value;
use storage::queue::message::Input;

use crate::error::{ApiError, ApiResult};
use crate::wire::fields::{self, Fields, empty_array, text};
use crate::wire::generation::{
    Bounds, Delivery, Generation, check_min_tokens, parse_delivery, parse_generation, token_id,
    token_limit,
};

/// A checked completion request, all but its model.
#[derive(Debug)]
pub struct CompletionRequest {
    /// One or more prompts.
    pub prompts: Vec<Input>,
    /// Sampling and limits; `choices` is the number drawn per prompt (`best_of`).
    pub generation: Generation,
    /// Choices returned per prompt, the best of those drawn.
    pub returned: u32,
    /// Log-probabilities are returned with so many alternatives.
    pub logprobs: Option<u8>,
    /// The prompt's text is returned before the completion.
    pub echo: bool,
    /// Streaming.
    pub delivery: Delivery,
}

impl CompletionRequest {
    /// Parses the body from which `model` was taken already.
    pub fn parse(mut fields: Fields, bounds: Bounds) -> ApiResult<CompletionRequest> {
        let prompts = parse_prompts(&mut fields, bounds)?;
        let mut generation = parse_generation(&mut fields, bounds)?;
        let limit = token_limit(&mut fields, "max_tokens", 0)?;
        generation.limits.max_tokens = Some(limit.unwrap_or(16));
        check_min_tokens(&generation.limits)?;
        let logprobs = fields.integer("logprobs", 0, 5)?.map(|n| n as u8);
        generation.sampling.logprobs = logprobs;
        let delivery = parse_delivery(&mut fields)?;
        let returned = generation.choices;
        parse_best_of(&mut fields, &mut generation, delivery)?;
        let echo = parse_echo(&mut fields, &prompts, &generation)?;
        if fields.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::unsupported_parameter("suffix", ""));
        }
        fields.string("user")?;
        fields.finish()?;
        let drawn = generation.choices as usize * prompts.len();
        if drawn > bounds.choices as usize {
            let message = format!(
                "Prompts times choices come to {drawn}; the limit of one request is {}.",
                bounds.choices
            );
            return Err(ApiError::bad("invalid_parameter_combination", "n", message));
        }
        Ok(CompletionRequest { prompts, generation, returned, logprobs, echo, delivery })
    }
}

/// `best_of` draws more choices than are returned and ranks them by mean log-probability.
fn parse_best_of(
    fields: &mut Fields,
    generation: &mut Generation,
    delivery: Delivery,
) -> ApiResult<()> {
    let Some(best_of) = fields.integer("best_of", 1, 20)? else { return Ok(()) };
    let best_of = best_of as u32;
    let refuse =
        |message: &str| Err(ApiError::bad("invalid_parameter_combination", "best_of", message));
    if best_of < generation.choices {
        return refuse("'best_of' must be at least 'n'.");
    }
    if delivery.stream && best_of > 1 {
        return refuse("'best_of' is not allowed with 'stream'.");
    }
    if best_of > generation.choices {
        generation.choices = best_of;
        generation.sampling.logprobs.get_or_insert(0);
    }
    Ok(())
}

/// `echo` returns text the gateway knows: prompts given as text, without scores.
fn parse_echo(fields: &mut Fields, prompts: &[Input], generation: &Generation) -> ApiResult<bool> {
    if !fields.boolean("echo")?.unwrap_or(false) {
        return Ok(false);
    }
    if generation.sampling.logprobs.is_some() {
        let message = "'echo' with 'logprobs' is not supported.";
        return Err(ApiError::unsupported_value("echo", message));
    }
    if prompts.iter().any(|prompt| matches!(prompt, Input::Tokens(_))) {
        let message = "'echo' of token prompts is not supported.";
        return Err(ApiError::unsupported_value("echo", message));
    }
    Ok(true)
}

fn parse_prompts(fields: &mut Fields, bounds: Bounds) -> ApiResult<Vec<Input>> {
    match fields.take("prompt").ok_or_else(|| fields.missing("prompt"))? {
        Value::String(text) => Ok(vec![Input::Text(text)]),
        Value::Array(items) if items.is_empty() => Err(empty_array("prompt")),
        Value::Array(items) if items[0].is_number() => {
            Ok(vec![Input::Tokens(token_ids(&items, "prompt")?)])
        }
        Value::Array(items) => {
            fields::max_items(items.len(), "prompt", bounds.choices as usize)?;
            items.into_iter().enumerate().map(parse_prompt).collect()
        }
        other => Err(ApiError::invalid_type("prompt", "a string or an array", &other)),
    }
}

fn parse_prompt((i, item): (usize, Value)) -> ApiResult<Input> {
    let path = format!("prompt[{i}]");
    match item {
        Value::Array(ids) if ids.is_empty() => Err(empty_array(&path)),
        Value::Array(ids) => Ok(Input::Tokens(token_ids(&ids, &path)?)),
        other => text(other, &path).map(Input::Text),
    }
}

fn token_ids(items: &[Value], path: &str) -> ApiResult<Vec<u32>> {
    let one = |(i, item)| token_id(item, &format!("{path}[{i}]"));
    items.iter().enumerate().map(one).collect()
}
