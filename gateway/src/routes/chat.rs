//! `POST /v1/chat/completions`.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use storage::db::Caller;
use storage::ids::{IdKind, new_id};
use storage::queue::message::Finish;
use tokio::sync::OwnedSemaphorePermit;

use super::chunks::{Chunks, Shape};
use super::infer::{Model, Pieces, Whole, collect, limited, take_room};
use crate::auth::Authenticated;
use crate::body::read_json;
use crate::error::{ApiError, ApiResult, ErrorReply};
use crate::gateway::Gateway;
use crate::ledger::unix_now;
use crate::sse::{Frames, Head};
use crate::wire::chat::ChatRequest;
use crate::wire::logprobs;
use crate::wire::reply::{AssistantMessage, ChatChoice, ChatCompletion, UsageReply, finish_reason};
use crate::wire::request::ChatCompletionRequest;

/// Answer a conversation, whole or as a stream of server-sent events.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    tag = "Inference",
    request_body = ChatCompletionRequest,
    responses(
        (status = 200, description = "Whole, or in chunks with `stream`", body = ChatCompletion),
        (status = "default", description = "Refused or failed", body = ErrorReply),
    )
)]
pub async fn create_chat_completion(
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
    let chat = ChatRequest::parse(body, gateway.bounds())?;
    let reply = Reply {
        id: new_id(IdKind::ChatCompletion),
        created: unix_now(),
        report_tier: chat.report_tier,
        logprobs: chat.generation.sampling.logprobs.is_some(),
        choices: chat.generation.choices,
    };
    let input = ChatRequest::input(chat.messages, chat.template_kwargs);
    let prompts = vec![(reply.id.clone(), input)];
    let refuse =
        |refusal| ApiError::from_refusal(&refusal, &model.name, Shape::Chat.prompt_param());
    let feed = model.run(gateway, caller, &chat.generation, prompts).await.map_err(refuse)?;
    let model = Arc::new(model);
    let pieces = Pieces::new(feed, reply.choices as usize, Arc::clone(&model), arrived);
    if chat.delivery.stream {
        let usage = chat.delivery.include_usage;
        return Ok(reply.stream(gateway, &model, pieces, usage, room));
    }
    let refuse =
        |refusal| ApiError::from_refusal(&refusal, &model.name, Shape::Chat.prompt_param());
    reply.whole(&model, pieces).await.map_err(refuse).map(|reply| Json(reply).into_response())
}

/// What all parts of one reply agree on.
struct Reply {
    id: String,
    created: i64,
    report_tier: bool,
    logprobs: bool,
    choices: u32,
}

impl Reply {
    async fn whole(
        self,
        model: &Model,
        pieces: Pieces,
    ) -> Result<ChatCompletion, storage::queue::message::Refusal> {
        let prompt_tokens = pieces.feed.prompt_tokens;
        let system_fingerprint = pieces.feed.fingerprint.clone();
        let (wholes, completion_tokens) = collect(pieces, self.choices as usize).await?;
        let choice = |(index, whole): (u32, Whole)| ChatChoice {
            index,
            message: AssistantMessage {
                role: "assistant",
                content: Some(whole.text),
                refusal: None,
                annotations: Vec::new(),
            },
            logprobs: self.logprobs.then(|| logprobs::chat(whole.logprobs)),
            finish_reason: finish_reason(whole.finish.unwrap_or(Finish::Stop)),
        };
        Ok(ChatCompletion {
            id: self.id,
            object: "chat.completion",
            created: self.created,
            model: model.name.clone(),
            choices: (0..).zip(wholes).map(choice).collect(),
            usage: UsageReply::new(prompt_tokens, completion_tokens),
            service_tier: self.report_tier.then_some("default"),
            system_fingerprint,
        })
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
            object: "chat.completion.chunk",
            created: self.created,
            model: &model.name,
            fingerprint: &pieces.feed.fingerprint,
            tier: self.report_tier,
            usage,
        });
        // Every choice's role comes before any content: clients index choices by arrival.
        let ready = (0..self.choices).map(|index| frames.chat_role(index)).collect();
        let chunks = Chunks {
            shape: Shape::Chat,
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
