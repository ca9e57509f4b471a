//! Chat completions sent whole.

use serde_json::{Value, json};
use storage::queue::message::{Finish, Input, Target};

use crate::site::{Site, chat_body};
use crate::worker::{self, Script};

/// Ids and times replaced, so that the rest can be compared.
pub fn settled(mut reply: Value) -> Value {
    let id = reply["id"].as_str().unwrap();
    let (prefix, rest) = id.split_once('-').unwrap();
    assert!(rest.len() >= 20 && rest.chars().all(|c| c.is_ascii_alphanumeric()), "{id}");
    reply["id"] = json!(format!("{prefix}-…"));
    assert!(reply["created"].as_i64().unwrap() > 1_700_000_000);
    reply["created"] = json!(0);
    reply
}

#[tokio::test]
async fn a_whole_reply() {
    let site = Site::open().await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    let reply = site.client().chat(json!({"n": 2, "logprobs": true, "top_logprobs": 1})).await;
    insta::assert_json_snapshot!("chat_completion", settled(reply.ok()));
}

#[tokio::test]
async fn every_parameter_reaches_the_worker() {
    let site = Site::open().await;
    let worker = worker::start(&site.storage, "w", Script::default()).await;
    let body = json!({
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 1,
        "frequency_penalty": -1, "repetition_penalty": 1.5, "logit_bias": {"5": -100, "7": 1.5},
        "seed": -3, "logprobs": true, "top_logprobs": 4, "max_completion_tokens": 9,
        "min_tokens": 2, "stop": ["a", "b"], "stop_token_ids": [1, 2], "ignore_eos": true, "n": 3,
        "chat_template_kwargs": {"thinking": false},
        "messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}],
    });
    site.client().chat(body).await.ok();
    let request = worker.last_request();
    let sampling = &request.sampling;
    assert_eq!((sampling.temperature, sampling.top_p), (0.5, 0.9));
    assert_eq!((sampling.top_k, sampling.min_p), (7, 0.1));
    assert_eq!((sampling.presence_penalty, sampling.frequency_penalty), (1.0, -1.0));
    assert_eq!((sampling.repetition_penalty, sampling.seed), (1.5, -3));
    assert_eq!(sampling.logit_bias, [(5, -100.0), (7, 1.5)]);
    assert_eq!((sampling.logprobs, request.choices), (Some(4), 3));
    assert_eq!((request.limits.max_tokens, request.limits.min_tokens), (Some(9), 2));
    assert_eq!(request.limits.stop, ["a", "b"]);
    assert_eq!(
        (&request.limits.stop_token_ids[..], request.limits.ignore_eos),
        (&[1, 2][..], true)
    );
    assert_eq!((request.target, request.base.as_str()), (Target::Base, "b"));
    let Input::Chat { messages, template_kwargs, .. } = request.input else { panic!("chat") };
    assert_eq!((messages[0].role.as_str(), messages[0].content.as_deref()), ("system", Some("x")));
    assert_eq!(template_kwargs["thinking"], false);
}

#[tokio::test]
async fn without_a_seed_one_is_drawn() {
    let site = Site::open().await;
    let worker = worker::start(&site.storage, "w", Script::default()).await;
    site.client().chat(json!({})).await.ok();
    let first = worker.last_request();
    site.client().chat(json!({})).await.ok();
    assert_ne!(first.sampling.seed, worker.last_request().sampling.seed);
    assert_eq!((first.sampling.temperature, first.sampling.top_p), (1.0, 1.0));
    assert_eq!((first.limits.max_tokens, first.choices), (None, 1));
}

#[tokio::test]
async fn limits_are_told_apart_from_stops() {
    let site = Site::open().await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    let reply = site.client().chat(json!({"max_tokens": 2})).await.ok();
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
    assert_eq!(reply["choices"][0]["message"]["content"], "Hi ");
    let usage = json!({"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11});
    assert_eq!(reply["usage"], usage);
    assert_eq!(reply["choices"][0]["logprobs"], Value::Null);
    assert!(reply.get("service_tier").is_none());
}

#[tokio::test]
async fn content_type_does_not_matter_and_text_is_kept_exactly() {
    let site = Site::open().await;
    let script =
        Script { finish: Finish::Length, ..Script::saying(&["\u{0}\"\\\n", "é\u{2028}"]) };
    let _worker = worker::start(&site.storage, "w", script).await;
    let request = site
        .client()
        .request("POST", "/v1/chat/completions")
        .header("content-type", "text/plain")
        .body(chat_body(json!({})).to_string().into())
        .unwrap();
    let reply = site.client().send(request).await.ok();
    assert_eq!(reply["choices"][0]["message"]["content"], "\u{0}\"\\\né\u{2028}");
}

#[tokio::test]
async fn adapters_run_as_themselves_and_never_as_the_base() {
    let site = Site::open().await;
    let worker = worker::start(&site.storage, "w", Script::default()).await;
    let id = site.adapter("org-local", "ft:b:org-local:x:AbCd1234").await;
    let reply = site.client().chat(json!({"model": "ft:b:org-local:x:AbCd1234"})).await.ok();
    assert_eq!(reply["model"], "ft:b:org-local:x:AbCd1234");
    match worker.last_request().target {
        Target::Adapter { adapter_id, .. } => assert_eq!(adapter_id, id),
        other => panic!("{other:?}"),
    }
    let foreign = site.adapter("org-b", "ft:b:org-b::AbCd1234").await;
    for model in
        ["ft:b:org-b::AbCd1234", &foreign, "ft:b:org-local:x:AbCd1235", "B", "b ", "b\u{0}"]
    {
        let reply = site.client().chat(json!({"model": model})).await;
        assert_eq!(reply.status, 404, "{model}");
    }
    site.gateway.flush().await;
    let row = site.storage.db.adapters().get("org-local", &id).await.unwrap().unwrap();
    assert!(row.last_used_at.is_some());
    let sum = site.storage.db.usage().sum("org-local", None, 0, i64::MAX).await.unwrap();
    assert_eq!((sum.requests, sum.prompt_tokens, sum.completion_tokens), (1, 9, 4));
}

#[tokio::test]
async fn long_conversations_are_fine() {
    let site = Site::open().await;
    let worker = worker::start(&site.storage, "w", Script::default()).await;
    let text = "ü".repeat(1 << 20);
    let messages = json!([{"role": "user", "content": text}]);
    site.client().chat(json!({"messages": messages})).await.ok();
    let Input::Chat { messages, .. } = worker.last_request().input else { panic!("chat") };
    assert_eq!(messages[0].content.as_deref(), Some(text.as_str()));
}
