//! Server-sent events exactly as OpenAI clients read them: `data: <one line of JSON>\n\n`, comment
//! lines while nothing happens, `data: [DONE]\n\n` at the end.
//!
//! What all chunks of a reply share (id, created, model, fingerprint) is serialised once; a token
//! costs one small buffer.

use std::pin::Pin;
use std::task::{Context as TaskState, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use futures::Stream;
use serde::Serialize;
use storage::queue::message::Finish;
use tokio::time::{Instant, Sleep};

use crate::error::ApiError;
use crate::wire::logprobs::{ChatLogprobs, CompletionLogprobs};
use crate::wire::reply::{UsageReply, finish_reason};

/// Ends every stream that went well.
pub const DONE: &[u8] = b"data: [DONE]\n\n";
const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// What all chunks of one reply have in common.
#[derive(Clone, Debug)]
pub struct Head<'a> {
    /// `chatcmpl-…` or `cmpl-…`.
    pub id: &'a str,
    /// `chat.completion.chunk` or `text_completion`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: i64,
    /// The model as requested.
    pub model: &'a str,
    /// `fp_…`.
    pub fingerprint: &'a str,
    /// Report `service_tier: default`.
    pub tier: bool,
    /// Announce usage: every chunk but the last says `"usage":null`.
    pub usage: bool,
}

/// Writes the chunks of one reply.
#[derive(Debug)]
pub struct Frames {
    /// Up to and including `"choices":[`.
    head: Vec<u8>,
    /// From `]` to the end of the frame.
    tail: &'static [u8],
}

impl Frames {
    /// Serialises what is shared.
    pub fn new(head: &Head<'_>) -> Frames {
        let mut bytes = b"data: {\"id\":".to_vec();
        push_json(&mut bytes, &head.id);
        bytes.extend_from_slice(b",\"object\":");
        push_json(&mut bytes, &head.object);
        bytes.extend_from_slice(b",\"created\":");
        push_json(&mut bytes, &head.created);
        bytes.extend_from_slice(b",\"model\":");
        push_json(&mut bytes, &head.model);
        if head.tier {
            bytes.extend_from_slice(b",\"service_tier\":\"default\"");
        }
        bytes.extend_from_slice(b",\"system_fingerprint\":");
        push_json(&mut bytes, &head.fingerprint);
        bytes.extend_from_slice(b",\"choices\":[");
        let tail: &[u8] = if head.usage { b"],\"usage\":null}\n\n" } else { b"]}\n\n" };
        Frames { head: bytes, tail }
    }

    fn chunk(&self, index: u32, write: impl FnOnce(&mut Vec<u8>)) -> Bytes {
        let mut bytes = Vec::with_capacity(self.head.len() + 128);
        bytes.extend_from_slice(&self.head);
        bytes.extend_from_slice(b"{\"index\":");
        push_json(&mut bytes, &index);
        write(&mut bytes);
        bytes.push(b'}');
        bytes.extend_from_slice(self.tail);
        bytes.into()
    }

    /// First chunk of a chat choice.
    pub fn chat_role(&self, index: u32) -> Bytes {
        self.chunk(index, |bytes| {
            bytes.extend_from_slice(
                b",\"delta\":{\"role\":\"assistant\",\"content\":\"\",\"refusal\":null},\
                  \"logprobs\":null,\"finish_reason\":null",
            );
        })
    }

    /// New text of a chat choice.
    pub fn chat_content(&self, index: u32, text: &str, logprobs: Option<&ChatLogprobs>) -> Bytes {
        self.chunk(index, |bytes| {
            bytes.extend_from_slice(b",\"delta\":{\"content\":");
            push_json(bytes, &text);
            bytes.extend_from_slice(b"},\"logprobs\":");
            push_json(bytes, &logprobs);
            bytes.extend_from_slice(b",\"finish_reason\":null");
        })
    }

    /// Last chunk of a chat choice.
    pub fn chat_finish(&self, index: u32, finish: Finish) -> Bytes {
        self.chunk(index, |bytes| {
            bytes.extend_from_slice(b",\"delta\":{},\"logprobs\":null,\"finish_reason\":");
            push_json(bytes, &finish_reason(finish));
        })
    }

    /// New text of a completion; the last chunk carries the reason.
    pub fn completion(
        &self,
        index: u32,
        text: &str,
        logprobs: Option<&CompletionLogprobs>,
        finish: Option<Finish>,
    ) -> Bytes {
        self.chunk(index, |bytes| {
            bytes.extend_from_slice(b",\"text\":");
            push_json(bytes, &text);
            bytes.extend_from_slice(b",\"logprobs\":");
            push_json(bytes, &logprobs);
            bytes.extend_from_slice(b",\"finish_reason\":");
            push_json(bytes, &finish.map(finish_reason));
        })
    }

    /// The usage chunk, without choices.
    pub fn usage(&self, usage: &UsageReply) -> Bytes {
        let mut bytes = self.head.clone();
        bytes.extend_from_slice(b"],\"usage\":");
        push_json(&mut bytes, usage);
        bytes.extend_from_slice(b"}\n\n");
        bytes.into()
    }
}

/// A failure after the first byte; the stream then ends without `[DONE]`.
pub fn error_frame(error: &ApiError) -> Bytes {
    let mut bytes = b"data: ".to_vec();
    push_json(&mut bytes, &error.reply());
    bytes.extend_from_slice(b"\n\n");
    bytes.into()
}

/// Values written here are strings, numbers and structs of them, which always serialise to memory;
/// serde_json escapes control characters, so a value is one line.
fn push_json(bytes: &mut Vec<u8>, value: &impl Serialize) {
    serde_json::to_writer(bytes, value).expect("plain values serialise to memory");
}

/// The streaming reply around a stream of frames.
pub fn response<S>(frames: S, keep_alive: Duration) -> Response
where
    S: Stream<Item = Bytes> + Send + 'static,
{
    let body = Body::from_stream(KeepAlive::new(frames, keep_alive));
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Inserts a comment line whenever the inner stream was silent for `every`.
struct KeepAlive {
    frames: Pin<Box<dyn Stream<Item = Bytes> + Send>>,
    every: Duration,
    silence: Pin<Box<Sleep>>,
}

impl KeepAlive {
    fn new(frames: impl Stream<Item = Bytes> + Send + 'static, every: Duration) -> KeepAlive {
        KeepAlive { frames: Box::pin(frames), every, silence: Box::pin(tokio::time::sleep(every)) }
    }
}

impl Stream for KeepAlive {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, task: &mut TaskState<'_>) -> Poll<Option<Self::Item>> {
        let next = match self.frames.as_mut().poll_next(task) {
            Poll::Ready(frame) => frame,
            Poll::Pending => match self.silence.as_mut().poll(task) {
                Poll::Ready(()) => Some(Bytes::from_static(KEEP_ALIVE)),
                Poll::Pending => return Poll::Pending,
            },
        };
        let deadline = Instant::now() + self.every;
        self.silence.as_mut().reset(deadline);
        Poll::Ready(next.map(Ok))
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    fn frames(usage: bool) -> Frames {
        Frames::new(&Head {
            id: "chatcmpl-x",
            object: "chat.completion.chunk",
            created: 1_760_000_000,
            model: "ft:b:o:s:AbCd1234",
            fingerprint: "fp_1",
            tier: false,
            usage,
        })
    }

    #[test]
    fn chunks_are_the_contract_to_the_byte() {
        const B: &str = "data: {\"id\":\"chatcmpl-x\",\"object\":\"chat.completion.chunk\",\
            \"created\":1760000000,\"model\":\"ft:b:o:s:AbCd1234\",\
            \"system_fingerprint\":\"fp_1\",";
        let with = frames(true);
        let expected = format!(
            "{B}\"choices\":[{{\"index\":0,\"delta\":{{\"role\":\"assistant\",\"content\":\"\",\
             \"refusal\":null}},\"logprobs\":null,\"finish_reason\":null}}],\"usage\":null}}\n\n"
        );
        assert_eq!(with.chat_role(0), expected);
        let expected = format!(
            "{B}\"choices\":[{{\"index\":1,\"delta\":{{\"content\":\"Hi 🦀\\n\"}},\
             \"logprobs\":null,\"finish_reason\":null}}]}}\n\n"
        );
        assert_eq!(frames(false).chat_content(1, "Hi 🦀\n", None), expected);
        let expected = format!(
            "{B}\"choices\":[{{\"index\":0,\"delta\":{{}},\"logprobs\":null,\
             \"finish_reason\":\"stop\"}}],\"usage\":null}}\n\n"
        );
        assert_eq!(with.chat_finish(0, Finish::Stop), expected);
        let expected = format!(
            "{B}\"choices\":[],\"usage\":{{\"prompt_tokens\":9,\"completion_tokens\":4,\
             \"total_tokens\":13}}}}\n\n"
        );
        assert_eq!(with.usage(&UsageReply::new(9, 4)), expected);
    }

    #[tokio::test]
    async fn silence_is_filled_with_comments() {
        let slow = futures::stream::once(async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            Bytes::from_static(DONE)
        });
        let frames = KeepAlive::new(slow, Duration::from_millis(20));
        let mut sent: Vec<Bytes> = frames.map(|frame| frame.unwrap()).collect().await;
        assert_eq!(sent.pop().unwrap(), DONE);
        assert!(!sent.is_empty() && sent.iter().all(|frame| frame == KEEP_ALIVE), "{sent:?}");
    }
}
