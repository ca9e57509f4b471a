//! Requests to text to engine: renders, tokenises and admits them, in the order they came.

use super::adapters::Source;
use super::routes::{Added, Route};
use super::{Shared, lock};
use crate::engine::command::{
    Admission, Choice, Command, Fault, FaultKind, RequestKey, SamplingSpec, Target,
};
use crate::outlet;
use crate::text::{Conversation, Ending, Message, Role, TemplateError, TextError, TextStart};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use storage::queue::message::{
    ChatMessage, Input, Replay, Request, Target as WireTarget, ToolCall,
};
use tokio::time::timeout;

/// For the rows that a request needs; then it is refused.
const ROWS_WITHIN: Duration = Duration::from_secs(1);

/// Admits or refuses one request; false when the engine is gone. Tokenising runs on a blocking
/// thread; requests stay in order, so a cancel never overtakes what it cancels. Only one that has
/// to read rows first goes its own way: the others do not wait for the database.
pub async fn place(shared: &Arc<Shared>, request: Request) -> bool {
    let route = Route {
        request_id: request.request_id.clone(),
        attempt: request.attempt,
        gateway: request.gateway.clone(),
        open: open_choices(&request),
    };
    let added = lock(&shared.routes).add(route);
    let Added::New { key, replaced } = added else { return true };
    if let Some(old) = replaced
        && !shared.command(Command::Cancel(old)).await
    {
        return false;
    }
    let target = match known_target(shared, &request) {
        Ok(Some(target)) => Ok(target),
        Ok(None) => {
            tokio::spawn(place_late(shared.clone(), request, key));
            return true;
        }
        Err(fault) => Err(fault),
    };
    admit(shared, request, key, target).await
}

/// Admits or refuses a request on a job that does not train here.
async fn place_late(shared: Arc<Shared>, request: Request, key: RequestKey) {
    let target = match &request.target {
        WireTarget::Job { job_id } => saved_target(&shared, job_id).await,
        WireTarget::Base | WireTarget::Adapter { .. } => return,
    };
    if !is_open(&shared, key) {
        return;
    }
    admit(&shared, request, key, target).await;
    // A cancel that came meanwhile reached the engine too early.
    if !is_open(&shared, key) {
        shared.command(Command::Cancel(key)).await;
    }
}

/// Whether somebody still waits for a request.
fn is_open(shared: &Shared, key: RequestKey) -> bool {
    lock(&shared.routes).get(key).is_some()
}

async fn admit(
    shared: &Arc<Shared>,
    request: Request,
    key: RequestKey,
    target: Result<Target, Fault>,
) -> bool {
    let prepared = match target {
        Ok(target) => {
            let shared = shared.clone();
            let prepare = move || prepare(&shared, &request, key, target);
            tokio::task::spawn_blocking(prepare).await.unwrap_or_else(|error| {
                tracing::error!(%error, "preparing a request failed");
                Err(internal())
            })
        }
        Err(fault) => Err(fault),
    };
    match prepared {
        Ok(admission) => shared.command(Command::Admit(Box::new(admission))).await,
        Err(fault) => {
            outlet::refuse(shared, key, fault).await;
            true
        }
    }
}

fn open_choices(request: &Request) -> usize {
    let ended = request.replay.iter().filter(|replay| replay.finish.is_some()).count();
    (request.choices as usize).saturating_sub(ended)
}

/// Which weights the engine shall use, where that is known without a look at rows. Never the base
/// where something else was asked for.
fn known_target(shared: &Shared, request: &Request) -> Result<Option<Target>, Fault> {
    if request.base != shared.options.base_name {
        return Err(gone(&request.base));
    }
    Ok(match &request.target {
        WireTarget::Base => Some(Target::Base),
        WireTarget::Adapter { adapter_id, object, .. } => {
            let source = Source::Adapter { object: object.clone() };
            shared.adapters.remember(adapter_id, source);
            Some(Target::Adapter(adapter_id.clone()))
        }
        // A job that trains here answers with what it published last.
        WireTarget::Job { job_id } => {
            let live = lock(&shared.runs).get(job_id).is_some_and(|running| running.live);
            live.then(|| Target::LiveJob(job_id.clone()))
        }
    })
}

/// A paused or waiting job answers with its newest resume point.
async fn saved_target(shared: &Shared, job_id: &str) -> Result<Target, Fault> {
    let jobs = shared.storage.db.jobs();
    let unread = || Fault {
        kind: FaultKind::Unavailable,
        message: "the job's state cannot be read now; try again later".to_owned(),
        param: None,
    };
    let points = match timeout(ROWS_WITHIN, jobs.resume_points(job_id)).await {
        Ok(Ok(points)) => points,
        Ok(Err(error)) => {
            tracing::warn!(job.id = job_id, %error, "reading resume points failed");
            return Err(unread());
        }
        Err(_) => {
            tracing::warn!(job.id = job_id, "the database does not answer");
            return Err(unread());
        }
    };
    let Some(newest) = points.first() else {
        let message = "the job has no weights to answer with at this moment: it is starting, or \
                       has just ended; try again in a moment";
        return Err(overloaded(message));
    };
    let key = format!("{job_id}@{}", newest.step);
    shared.adapters.remember(&key, Source::ResumePoint(newest.key()));
    Ok(Target::Adapter(key))
}

fn prepare(
    shared: &Shared,
    request: &Request,
    key: u64,
    target: Target,
) -> Result<Admission, Fault> {
    let (prompt, start) = match &request.input {
        Input::Chat { messages, tools, template_kwargs } => {
            let messages = messages.iter().map(message).collect::<Result<Vec<_>, _>>()?;
            let conversation = Conversation {
                messages: &messages,
                tools,
                template_kwargs,
                ending: Ending::Open,
                unix_time: unix_time(),
            };
            (shared.text.chat_prompt(&conversation).map_err(refused)?, TextStart::Fresh)
        }
        Input::Text(text) => {
            let ids = shared.text.tokenizer.encode_plain(text, true);
            (ids.map_err(|error| refused(error.into()))?, TextStart::Continued)
        }
        Input::Tokens(ids) => (ids.clone(), TextStart::Continued),
    };
    let mut end_tokens = request.limits.stop_token_ids.clone();
    if !request.limits.ignore_eos {
        end_tokens.extend(&shared.config.end_tokens);
    }
    let choice = |index: u32| {
        let nothing = Replay::default();
        let replay = request.replay.get(index as usize).unwrap_or(&nothing);
        let mut detokenizer = shared.text.tokenizer.detokenizer(&request.limits.stop, start);
        for (at, id) in replay.tokens.iter().enumerate() {
            detokenizer.arm_stops(at >= request.limits.min_tokens as usize);
            detokenizer.push(*id);
        }
        Choice { replay: replay.tokens.clone(), finished: replay.finish.is_some(), detokenizer }
    };
    let choices = (0..request.choices).map(choice).collect();
    Ok(Admission {
        key,
        prompt,
        target,
        sampling: sampling(request),
        max_tokens: request.limits.max_tokens,
        min_tokens: request.limits.min_tokens,
        end_tokens,
        choices,
    })
}

fn sampling(request: &Request) -> SamplingSpec {
    let wire = &request.sampling;
    SamplingSpec {
        temperature: wire.temperature,
        top_p: wire.top_p,
        top_k: wire.top_k,
        min_p: wire.min_p,
        presence_penalty: wire.presence_penalty,
        frequency_penalty: wire.frequency_penalty,
        repetition_penalty: wire.repetition_penalty,
        logit_bias: wire.logit_bias.clone(),
        seed: wire.seed,
        logprobs: wire.logprobs,
    }
}

fn message(wire: &ChatMessage) -> Result<Message, Fault> {
    let Some(role) = Role::parse(&wire.role) else {
        return Err(invalid(format!("unknown role '{}'", wire.role)));
    };
    let call = |call: &ToolCall| crate::text::ToolCall {
        id: call.id.clone(),
        name: call.name.clone(),
        arguments: call.arguments.clone(),
    };
    Ok(Message {
        role,
        content: wire.content.clone(),
        name: wire.name.clone(),
        tool_calls: wire.tool_calls.iter().map(call).collect(),
        tool_call_id: wire.tool_call_id.clone(),
        reasoning_content: wire.reasoning_content.clone(),
    })
}

/// What the template or the tokenizer said, as the client shall hear it.
fn refused(error: TextError) -> Fault {
    match error {
        TextError::Template(TemplateError::Missing) => {
            invalid("this model has no chat template; use /v1/completions".to_owned())
        }
        TextError::Template(error) if error.is_refusal() => invalid(error.to_string()),
        error => {
            tracing::error!(%error, "a prompt could not be made");
            internal()
        }
    }
}

fn invalid(message: String) -> Fault {
    Fault { kind: FaultKind::Invalid, message, param: Some("messages".to_owned()) }
}

fn overloaded(message: &str) -> Fault {
    Fault { kind: FaultKind::Overloaded, message: message.to_owned(), param: None }
}

fn internal() -> Fault {
    let message = "The server had an error while processing your request.".to_owned();
    Fault { kind: FaultKind::Internal, message, param: None }
}

fn gone(model: &str) -> Fault {
    let message = format!("The model `{model}` does not exist or you do not have access to it.");
    Fault { kind: FaultKind::ModelNotFound, message, param: Some("model".to_owned()) }
}

/// Seconds since 1970; only for texts that show a date.
pub fn unix_time() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}
