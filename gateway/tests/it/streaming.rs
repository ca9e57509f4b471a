//! Chat completions as server-sent events, to the byte.

use std::time::Duration;

use axum::body::Body;
use axum::http::header;
use futures::StreamExt;
use gateway::GatewayConfig;
use serde_json::{Value, json};
use storage::queue::message::{Finish, Refusal, RefusalKind};

use crate::site::{Site, chat_body};
use crate::worker::{self, FINGERPRINT, Script};

/// The stream's text with its id and time replaced, which must be the same in all chunks.
pub fn settled(text: &str) -> String {
    let first = text.split("\n\n").next().unwrap().strip_prefix("data: ").unwrap();
    let first: Value = serde_json::from_str(first).unwrap();
    let (id, created) = (first["id"].as_str().unwrap(), first["created"].to_string());
    text.replace(id, "ID").replace(&format!("\"created\":{created}"), "\"created\":0")
}

/// JSON of every `data:` event but the last, which must be `[DONE]`.
pub fn chunks(text: &str) -> Vec<Value> {
    let mut events: Vec<&str> = text
        .strip_suffix("\n\n")
        .unwrap()
        .split("\n\n")
        .filter(|event| !event.starts_with(':'))
        .map(|event| event.strip_prefix("data: ").unwrap())
        .collect();
    assert_eq!(events.pop(), Some("[DONE]"));
    events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

pub fn content(text: &str) -> String {
    let delta = |chunk: &Value| {
        chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned()
    };
    chunks(text).iter().map(delta).collect()
}

#[tokio::test]
async fn the_whole_stream_to_the_byte() {
    let site = Site::open().await;
    let _worker = worker::start(&site.storage, "w", Script::saying(&["Hi ", "🦀"])).await;
    let body = json!({"stream": true, "stream_options": {"include_usage": true}});
    let reply = site.client().chat(body).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(reply.header("cache-control"), Some("no-cache"));
    assert_eq!(reply.header("x-accel-buffering"), Some("no"));
    let head = format!(
        "{{\"id\":\"ID\",\"object\":\"chat.completion.chunk\",\"created\":0,\"model\":\"b\",\
         \"system_fingerprint\":\"{FINGERPRINT}\",\"choices\":["
    );
    let choice = |delta: &str, reason: &str| {
        format!(
            "data: {head}{{\"index\":0,\"delta\":{delta},\"logprobs\":null,\
             \"finish_reason\":{reason}}}],\"usage\":null}}\n\n"
        )
    };
    let expected = [
        choice("{\"role\":\"assistant\",\"content\":\"\",\"refusal\":null}", "null"),
        choice("{\"content\":\"Hi \"}", "null"),
        choice("{\"content\":\"🦀\"}", "null"),
        choice("{}", "\"stop\""),
        format!(
            "data: {head}],\"usage\":{{\"prompt_tokens\":9,\"completion_tokens\":2,\
             \"total_tokens\":11}}}}\n\n"
        ),
        "data: [DONE]\n\n".to_owned(),
    ];
    assert_eq!(settled(&reply.text()), expected.concat());
}

#[tokio::test]
async fn without_options_there_is_no_usage_and_no_chunk_without_choices() {
    let site = Site::open().await;
    let script = Script { finish: Finish::Length, ..Script::default() };
    let _worker = worker::start(&site.storage, "w", script).await;
    for options in [json!(null), json!({"include_usage": false, "include_obfuscation": true})] {
        let body = json!({"stream": true, "stream_options": options});
        let text = site.client().chat(body).await.text();
        for chunk in chunks(&text) {
            assert!(chunk.get("usage").is_none(), "{chunk}");
            assert_eq!(chunk["choices"].as_array().unwrap().len(), 1, "{chunk}");
        }
        assert_eq!(chunks(&text).last().unwrap()["choices"][0]["finish_reason"], "length");
        assert_eq!(content(&text), "Hi 🦀!");
    }
}

#[tokio::test]
async fn roles_of_all_choices_come_first_and_in_order() {
    let site = Site::open().await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    let text = site.client().chat(json!({"stream": true, "n": 3})).await.text();
    let chunks = chunks(&text);
    for (i, chunk) in chunks.iter().enumerate() {
        let choice = &chunk["choices"][0];
        if i < 3 {
            assert_eq!(choice["index"], i);
            assert_eq!(choice["delta"]["role"], "assistant");
        } else {
            assert!(choice["delta"].get("role").is_none(), "{chunk}");
        }
    }
    for index in 0..3 {
        let of = |chunk: &&Value| chunk["choices"][0]["index"] == index;
        let reasons =
            chunks.iter().filter(of).filter(|c| !c["choices"][0]["finish_reason"].is_null());
        assert_eq!(reasons.count(), 1);
    }
}

#[tokio::test]
async fn streamed_and_whole_replies_agree() {
    let site = Site::open().await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    let body = json!({"logprobs": true, "top_logprobs": 2, "seed": 1, "max_tokens": 3});
    let whole = site.client().chat(body.clone()).await.ok();
    let mut streamed = body;
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let text = site.client().chat(streamed).await.text();
    let chunks = chunks(&text);
    let choice = &whole["choices"][0];
    assert_eq!(content(&text), choice["message"]["content"].as_str().unwrap());
    let entries: Vec<Value> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().cloned())
        .flatten()
        .collect();
    assert_eq!(json!(entries), choice["logprobs"]["content"]);
    assert_eq!(entries.len(), 3);
    let usage = &chunks.last().unwrap()["usage"];
    assert_eq!(usage, &whole["usage"]);
    let reason = &chunks[chunks.len() - 2]["choices"][0]["finish_reason"];
    assert_eq!(reason, &choice["finish_reason"]);
}

/// Reads a streaming body frame by frame.
async fn frames(site: &Site, extra: Value) -> axum::body::BodyDataStream {
    let request = site
        .client()
        .request("POST", "/v1/chat/completions")
        .body(Body::from(chat_body(extra).to_string()))
        .unwrap();
    let response = site.client().raw(request).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream; charset=utf-8");
    response.into_body().into_data_stream()
}

#[tokio::test]
async fn waiting_is_filled_with_comments() {
    let keep_alive = Duration::from_millis(20);
    let config = GatewayConfig { open_access: true, keep_alive, ..GatewayConfig::default() };
    let site = Site::with(config).await;
    let script = Script { silent: true, ..Script::default() };
    let _worker = worker::start(&site.storage, "w", script).await;
    let mut frames = frames(&site, json!({"stream": true})).await;
    let role = frames.next().await.unwrap().unwrap();
    assert!(role.starts_with(b"data: "));
    for _ in 0..3 {
        assert_eq!(frames.next().await.unwrap().unwrap(), ": keep-alive\n\n");
    }
}

#[tokio::test]
async fn a_reader_that_goes_away_cancels_at_once() {
    let site = Site::open().await;
    let script = Script { silent: true, ..Script::default() };
    let worker = worker::start(&site.storage, "w", script).await;
    let mut frames = frames(&site, json!({"stream": true})).await;
    frames.next().await.unwrap().unwrap();
    assert_eq!(site.gateway.open_requests(), 1);
    drop(frames);
    assert_eq!(worker.cancelled().await, worker.last_request().request_id);
    assert_eq!(site.gateway.open_requests(), 0);
}

#[tokio::test]
async fn a_client_that_hangs_up_on_a_whole_reply_cancels_too() {
    let site = Site::open().await;
    let script = Script { silent: true, ..Script::default() };
    let worker = worker::start(&site.storage, "w", script).await;
    let client = site.client();
    tokio::select! {
        reply = client.chat(json!({})) => panic!("nothing was said: {reply}"),
        _ = worker.wait(|heard| heard.requests.first().cloned()) => {}
    }
    assert_eq!(worker.cancelled().await, worker.last_request().request_id);
}

#[tokio::test]
async fn a_reader_that_is_too_slow_is_cut_off_with_an_error() {
    let config =
        GatewayConfig { open_access: true, stream_buffer_messages: 4, ..GatewayConfig::default() };
    let site = Site::with(config).await;
    let pieces: Vec<String> = (0..100).map(|i| format!("{i} ")).collect();
    let script = Script { pieces, ..Script::default() };
    let worker = worker::start(&site.storage, "w", script).await;
    let frames = frames(&site, json!({"stream": true})).await;
    // The worker stops although nobody reads on.
    worker.cancelled().await;
    let text: Vec<u8> = frames.map(|frame| frame.unwrap().to_vec()).concat().await;
    let text = String::from_utf8(text).unwrap();
    assert!(!text.contains("[DONE]"), "{text}");
    let last = text.trim_end().rsplit("\n\n").next().unwrap().strip_prefix("data: ").unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert_eq!(last["error"]["code"], "server_is_overloaded");
}

#[tokio::test]
async fn a_failure_after_the_first_byte_ends_without_done() {
    let config = GatewayConfig {
        open_access: true,
        replacement_timeout: Duration::from_millis(100),
        ..GatewayConfig::default()
    };
    let site = Site::with(config).await;
    let script = Script { dies_after: Some(2), ..Script::default() };
    let _worker = worker::start(&site.storage, "w", script).await;
    let text = site.client().chat(json!({"stream": true})).await.text();
    assert!(!text.contains("[DONE]"), "{text}");
    let last = text.trim_end().rsplit("\n\n").next().unwrap();
    let error: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
    let keys: Vec<&String> = error["error"].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["message", "type", "param", "code"]);

    // Sent whole, it is a plain refusal.
    let refusal =
        Refusal { kind: RefusalKind::Overloaded, message: "full".to_owned(), param: None };
    let script = Script { refusal: Some(refusal), ..Script::default() };
    let _worker = worker::start(&site.storage, "w", script).await;
    assert_eq!(site.client().chat(json!({})).await.status, 503);
}
