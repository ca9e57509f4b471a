//! A streamed reply of either inference endpoint: frames that are ready, then those of the next
//! piece.

use std::collections::VecDeque;
use std::sync::Arc;

use axum::response::Response;
use bytes::Bytes;
use futures::stream;
use tokio::sync::OwnedSemaphorePermit;

use super::infer::{Model, Piece, Pieces};
use crate::error::ApiError;
use crate::gateway::Gateway;
use crate::sse::{self, Frames};
use crate::wire::logprobs;
use crate::wire::reply::UsageReply;

/// Whose frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `chat.completion.chunk`.
    Chat,
    /// `text_completion`.
    Completion,
}

impl Shape {
    /// The field that holds the prompt, for refusals.
    pub fn prompt_param(self) -> &'static str {
        match self {
            Shape::Chat => "messages",
            Shape::Completion => "prompt",
        }
    }
}

/// Everything a stream is made of.
pub struct Chunks {
    /// Whose frames.
    pub shape: Shape,
    /// Where text comes from.
    pub pieces: Pieces,
    /// Writes it.
    pub frames: Frames,
    /// To send before the first piece.
    pub ready: VecDeque<Bytes>,
    /// With log-probabilities.
    pub logprobs: bool,
    /// With a usage chunk.
    pub usage: bool,
    /// For refusals after the first byte.
    pub model: Arc<Model>,
    /// Held until the stream ends.
    pub _room: OwnedSemaphorePermit,
}

impl Chunks {
    /// The streaming reply.
    pub fn into_response(self, gateway: &Gateway) -> Response {
        let state = (self, false);
        let frames = stream::unfold(state, |(mut chunks, mut over)| async move {
            let frame = chunks.next(&mut over).await?;
            Some((frame, (chunks, over)))
        });
        sse::response(frames, gateway.config().keep_alive)
    }

    async fn next(&mut self, over: &mut bool) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                return Some(frame);
            }
            if *over {
                return None;
            }
            match self.pieces.next().await {
                Some(Ok(piece)) => self.write(piece),
                Some(Err(refusal)) => {
                    *over = true;
                    let param = self.shape.prompt_param();
                    let error = ApiError::from_refusal(&refusal, &self.model.name, param);
                    self.ready.push_back(sse::error_frame(&error));
                }
                None => {
                    *over = true;
                    if self.usage {
                        let feed = &self.pieces.feed;
                        let usage = UsageReply::new(feed.prompt_tokens, feed.completion_tokens);
                        self.ready.push_back(self.frames.usage(&usage));
                    }
                    self.ready.push_back(Bytes::from_static(sse::DONE));
                }
            }
        }
    }

    fn write(&mut self, piece: Piece) {
        let Piece { index, text, logprobs, finish } = piece;
        if !text.is_empty() || !logprobs.is_empty() {
            let frame = match self.shape {
                Shape::Chat => {
                    let logprobs = self.logprobs.then(|| logprobs::chat(logprobs));
                    self.frames.chat_content(index, &text, logprobs.as_ref())
                }
                Shape::Completion => {
                    let logprobs = self.logprobs.then(|| logprobs::completion(logprobs, 0));
                    self.frames.completion(index, &text, logprobs.as_ref(), None)
                }
            };
            self.ready.push_back(frame);
        }
        if let Some(finish) = finish {
            self.ready.push_back(match self.shape {
                Shape::Chat => self.frames.chat_finish(index, finish),
                Shape::Completion => self.frames.completion(index, "", None, Some(finish)),
            });
        }
    }
}
