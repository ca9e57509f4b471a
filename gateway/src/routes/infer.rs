//! What the two inference endpoints share: admission to the gateway, the resolved model, and the
//! way from a parsed request to a feed of tokens.

use std::sync::Arc;
use std::time::Instant;

use axum::response::{IntoResponse, Response};
use futures::future::try_join_all;
use storage::db::Caller;
use storage::queue::message::{Finish, Input, Refusal, Request};
use tokio::sync::OwnedSemaphorePermit;

use crate::aim::Aim;
use crate::error::{ApiError, ApiResult};
use crate::feed::Feed;
use crate::gateway::Gateway;
use crate::inference::Running;
use crate::wire::fields::Fields;
use crate::wire::generation::Generation;
use crate::wire::logprobs::{Pending, Placed};

/// Answers one inference request with its rate-limit headers.
pub async fn limited<F>(gateway: &Arc<Gateway>, caller: &Caller, answer: F) -> Response
where
    F: Future<Output = ApiResult<Response>>,
{
    let standings = match gateway.limiter().admit(&caller.org) {
        Ok(standings) => standings,
        Err(error) => return error.into_response(),
    };
    let mut response = answer.await.into_response();
    standings.write(response.headers_mut());
    response
}

/// Room for one more request in this process, until the permit is dropped.
pub fn take_room(gateway: &Gateway) -> ApiResult<OwnedSemaphorePermit> {
    Arc::clone(&gateway.request_room).try_acquire_owned().map_err(|_| {
        ApiError::overloaded("This gateway is at its limit of open requests. Try again shortly.")
    })
}

/// The model of a request: its name as requested and what it means.
pub struct Model {
    /// As requested.
    pub name: String,
    aim: Aim,
}

impl Model {
    /// Takes and resolves `model`: existence comes before all other parameters.
    pub async fn take(gateway: &Gateway, caller: &Caller, body: &mut Fields) -> ApiResult<Model> {
        let name = body.required_string("model")?;
        let resolved = gateway.resolve_for_inference(&caller.org, &name).await?;
        let aim = Aim::at(resolved, name.clone());
        Ok(Model { name, aim })
    }

    /// Places one request per prompt, under the given ids, and waits until all are admitted.
    pub async fn run(
        &self,
        gateway: &Arc<Gateway>,
        caller: &Caller,
        generation: &Generation,
        prompts: Vec<(String, Input)>,
    ) -> Result<Feed, Refusal> {
        let starts = prompts.into_iter().map(|(request_id, input)| {
            let request = Request {
                request_id,
                attempt: 0,
                gateway: gateway.relay().gateway_id.clone(),
                org: caller.org.clone(),
                base: self.aim.base.clone(),
                target: self.aim.target.clone(),
                input,
                sampling: generation.sampling.clone(),
                limits: generation.limits.clone(),
                choices: generation.choices,
                replay: Vec::new(),
            };
            Running::start(gateway, request, self.aim.hints.clone())
        });
        Ok(Feed::new(try_join_all(starts).await?, generation.choices))
    }

    /// Measures the time to the first token of a request that arrived at `arrived`.
    pub fn first_token(&self, arrived: Instant) {
        crate::metrics::first_token(&self.aim.target, arrived.elapsed());
    }
}

/// New text of one choice with the log-probabilities that belong to it.
pub struct Piece {
    /// Choice index over all prompts.
    pub index: u32,
    /// May be empty.
    pub text: String,
    /// Empty unless asked for.
    pub logprobs: Vec<Placed>,
    /// The choice ends here.
    pub finish: Option<Finish>,
}

/// A feed in pieces: tokens have become text and log-probabilities.
pub struct Pieces {
    /// Where they come from.
    pub feed: Feed,
    pending: Vec<Pending>,
    model: Arc<Model>,
    arrived: Option<Instant>,
}

impl Pieces {
    /// Of `choices` choices over all prompts.
    pub fn new(feed: Feed, choices: usize, model: Arc<Model>, arrived: Instant) -> Pieces {
        let pending = std::iter::repeat_with(Pending::default).take(choices).collect();
        Pieces { feed, pending, model, arrived: Some(arrived) }
    }

    /// The next piece; None once all choices have ended.
    pub async fn next(&mut self) -> Option<Result<Piece, Refusal>> {
        let delta = match self.feed.next().await? {
            Ok(delta) => delta,
            Err(refusal) => return Some(Err(refusal)),
        };
        if let Some(arrived) = self.arrived.take() {
            self.model.first_token(arrived);
        }
        let logprobs = match self.pending.get_mut(delta.choice as usize) {
            Some(pending) => pending.advance(delta.tokens, &delta.text, delta.finish),
            None => Vec::new(),
        };
        let (index, text, finish) = (delta.choice, delta.text, delta.finish);
        Some(Ok(Piece { index, text, logprobs, finish }))
    }
}

/// A choice that has ended.
#[derive(Default)]
pub struct Whole {
    /// All its text.
    pub text: String,
    /// All its log-probabilities.
    pub logprobs: Vec<Placed>,
    /// Why it ended.
    pub finish: Option<Finish>,
}

/// Waits for all choices; returns them in index order with the tokens they took.
pub async fn collect(mut pieces: Pieces, choices: usize) -> Result<(Vec<Whole>, u64), Refusal> {
    let mut wholes: Vec<Whole> = std::iter::repeat_with(Whole::default).take(choices).collect();
    while let Some(piece) = pieces.next().await {
        let piece = piece?;
        let Some(whole) = wholes.get_mut(piece.index as usize) else { continue };
        whole.text.push_str(&piece.text);
        whole.logprobs.extend(piece.logprobs);
        whole.finish = piece.finish.or(whole.finish);
    }
    Ok((wholes, pieces.feed.completion_tokens))
}
