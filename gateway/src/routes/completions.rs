//! `POST /v1/completions`.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use storage::db::Caller;
use storage::ids::{IdKind, new_id};
use storage::queue::message::{Finish, Input, Refusal};
use tokio::sync::OwnedSemaphorePermit;

use super::chunks::{Chunks, Shape};
use super::infer::{Model, Pieces, Whole, collect, limited, take_room};
use crate::auth::Authenticated;
use crate::body::read_json;
use crate::error::{ApiError, ApiResult, ErrorReply};
use crate::gateway::Gateway;
use crate::ledger::unix_now;
use crate::sse::{Frames, Head};
use crate::wire::completion::CompletionRequest;
use crate::wire::logprobs;
use crate::wire::reply::{Completion, CompletionChoice, UsageReply, finish_reason};
use crate::wire::request::TextCompletionRequest;

/// Complete prompts as they are, without a chat template.
#[utoipa::path(
    post,
    path = "/v1/completions",
    tag = "Inference",
    request_body = TextCompletionRequest,
    responses(
        (status = 200, description = "Whole, or in chunks with `stream`", body = Completion),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn create_completion(
    State(gateway): State<Arc<Gateway>>,
    Authenticated(caller): Authenticated,
    request: Request,
) -> Response {
    limited(&gateway, &caller, answer(&gateway, &caller, request)).await
}

async fn answer(gateway: &Arc<Gateway>, caller: &Caller, request: Request) -> ApiResult<Response> {
    let arrived = Instant::now();
    let room = take_room(gateway)?;
    let mut body = read_json(gateway, request).await?;
    let model = Model::take(gateway, caller, &mut body).await?;
    let completion = CompletionRequest::parse(body, gateway.bounds())?;
    let drawn = completion.generation.choices;
    let reply = Reply {
        id: new_id(IdKind::Completion),
        created: unix_now(),
        drawn,
        returned: completion.returned,
        logprobs: completion.logprobs.is_some(),
        echo: if completion.echo { texts(&completion.prompts) } else { Vec::new() },
    };
    let choices = drawn as usize * completion.prompts.len();
    // One request per prompt; the first carries the id of the reply.
    let ids = std::iter::once(reply.id.clone())
        .chain(std::iter::repeat_with(|| new_id(IdKind::Completion)));
    let prompts = ids.zip(completion.prompts).collect();
    let refuse =
        |refusal| ApiError::from_refusal(&refusal, &model.name, Shape::Completion.prompt_param());
    let feed = model.run(gateway, caller, &completion.generation, prompts).await.map_err(refuse)?;
    let model = Arc::new(model);
    let pieces = Pieces::new(feed, choices, Arc::clone(&model), arrived);
    if completion.delivery.stream {
        let usage = completion.delivery.include_usage;
        return Ok(reply.stream(gateway, &model, pieces, usage, room));
    }
    let refuse =
        |refusal| ApiError::from_refusal(&refusal, &model.name, Shape::Completion.prompt_param());
    let whole = reply.whole(&model, pieces, choices).await.map_err(refuse)?;
    Ok(Json(whole).into_response())
}

fn texts(prompts: &[Input]) -> Vec<String> {
    let text = |prompt: &Input| match prompt {
        Input::Text(text) => text.clone(),
        Input::Chat { .. } | Input::Tokens(_) => String::new(),
    };
    prompts.iter().map(text).collect()
}

/// What all parts of one reply agree on.
struct Reply {
    id: String,
    created: i64,
    /// Choices per prompt that were drawn, and that are returned.
    drawn: u32,
    returned: u32,
    logprobs: bool,
    /// Text before each prompt's completions; empty: none.
    echo: Vec<String>,
}

impl Reply {
    async fn whole(
        self,
        model: &Model,
        pieces: Pieces,
        choices: usize,
    ) -> Result<Completion, Refusal> {
        let prompt_tokens = pieces.feed.prompt_tokens;
        let system_fingerprint = pieces.feed.fingerprint.clone();
        let (wholes, completion_tokens) = collect(pieces, choices).await?;
        let mut picked = Vec::with_capacity(choices);
        let mut wholes = wholes.into_iter().peekable();
        let mut prompt = 0;
        while wholes.peek().is_some() {
            let drawn: Vec<Whole> = wholes.by_ref().take(self.drawn as usize).collect();
            let before = self.echo.get(prompt).map_or("", String::as_str);
            for whole in best(drawn, self.returned as usize) {
                picked.push(self.choice(picked.len() as u32, before, whole));
            }
            prompt += 1;
        }
        Ok(Completion {
            id: self.id,
            object: "text_completion",
            created: self.created,
            model: model.name.clone(),
            choices: picked,
            usage: UsageReply::new(prompt_tokens, completion_tokens),
            system_fingerprint,
        })
    }

    fn choice(&self, index: u32, before: &str, whole: Whole) -> CompletionChoice {
        let before_chars = before.chars().count() as u32;
        CompletionChoice {
            index,
            text: format!("{before}{}", whole.text),
            logprobs: self.logprobs.then(|| logprobs::completion(whole.logprobs, before_chars)),
            finish_reason: finish_reason(whole.finish.unwrap_or(Finish::Stop)),
        }
    }

    fn stream(
        self,
        gateway: &Gateway,
        model: &Arc<Model>,
        pieces: Pieces,
        usage: bool,
        room: OwnedSemaphorePermit,
    ) -> Response {
        let frames = Frames::new(&Head {
            id: &self.id,
            object: "text_completion",
            created: self.created,
            model: &model.name,
            fingerprint: &pieces.feed.fingerprint,
            tier: false,
            usage,
        });
        let echo = (0..).zip(&self.echo).flat_map(|(prompt, text)| {
            let first = prompt * self.drawn;
            (first..first + self.drawn).map(move |index| (index, text))
        });
        let ready = echo.map(|(index, text)| frames.completion(index, text, None, None)).collect();
        let chunks = Chunks {
            shape: Shape::Completion,
            pieces,
            frames,
            ready,
            logprobs: self.logprobs,
            usage,
            model: Arc::clone(model),
            _room: room,
        };
        chunks.into_response(gateway)
    }
}

/// The `count` choices with the highest mean log-probability, best first; all of them, in their
/// order, where all are wanted.
fn best(mut drawn: Vec<Whole>, count: usize) -> Vec<Whole> {
    if count < drawn.len() {
        let mean = |whole: &Whole| {
            let sum: f32 = whole.logprobs.iter().map(|placed| placed.entry.logprob).sum();
            sum / whole.logprobs.len().max(1) as f32
        };
        drawn.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        drawn.truncate(count);
    }
    drawn
}
