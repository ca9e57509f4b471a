//! Placement, full inboxes, lost workers and lost messages.

use std::time::Duration;

use gateway::GatewayConfig;
use serde_json::json;
use storage::queue::QueueLimits;
use storage::queue::message::{Finish, Item, Refusal, RefusalKind, TokenMessage, Update};

use crate::site::Site;
use crate::streaming::{chunks, content};
use crate::worker::{self, Script};

const ANSWER: [&str; 5] = ["Näh", "e", " 🦀", " an", "."];

#[tokio::test]
async fn a_lost_worker_leaves_no_trace_in_the_stream() {
    let site = Site::open().await;
    let script = Script { dies_after: Some(3), ..Script::saying(&ANSWER) };
    let first = worker::start(&site.storage, "w1", script).await;
    let stream = json!({"stream": true, "n": 2, "stream_options": {"include_usage": true}});
    let client = site.client();
    let chat = client.chat(stream);
    let (reply, second) = tokio::join!(chat, async {
        first.wait(|heard| heard.requests.first().cloned()).await;
        worker::start(&site.storage, "w2", Script::saying(&ANSWER)).await
    });
    let text = reply.text();
    let chunks = chunks(&text);
    for index in 0..2 {
        let of = chunks.iter().filter(|c| c["choices"][0]["index"] == index);
        let said: String =
            of.map(|c| c["choices"][0]["delta"]["content"].as_str().unwrap_or_default()).collect();
        assert_eq!(said, ANSWER.concat());
    }
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 10);
    let (before, after) = (first.last_request(), second.last_request());
    assert_eq!((before.attempt, after.attempt), (0, 1));
    assert_eq!(before.request_id, after.request_id);
    assert_eq!(before.sampling, after.sampling);
    assert!(before.replay.is_empty());
    assert_eq!(after.replay[0].tokens, [100, 101, 102]);
    assert_eq!(after.replay[0].text_chars, "Nähe 🦀".chars().count() as u32);
}

#[tokio::test]
async fn a_lost_message_moves_the_request_and_nothing_is_said_twice() {
    let site = Site::open().await;
    let script =
        Script { loses: Some(2), pause: Duration::from_millis(5), ..Script::saying(&ANSWER) };
    let worker = worker::start(&site.storage, "w", script).await;
    let text = site.client().chat(json!({"stream": true})).await.text();
    assert_eq!(content(&text), ANSWER.concat());
    let requests = worker.heard.lock().unwrap().requests.clone();
    assert_eq!(requests.iter().map(|r| r.attempt).collect::<Vec<_>>(), [0, 1]);
    // The only worker there is: it must forget the first attempt.
    assert_eq!(worker.cancelled().await, requests[0].request_id);
    assert_eq!(requests[1].replay[0].tokens, [100]);
}

#[tokio::test]
async fn what_runs_on_for_nobody_is_cancelled_where_it_runs() {
    let site = Site::open().await;
    let worker = worker::start(&site.storage, "w", Script::default()).await;
    let queue = &site.storage.queue;
    let gateway = queue.gateways().await.unwrap().remove(0);
    // It takes a look at presence until the gateway knows where this comes from.
    for sequence in 0..300 {
        let update =
            Update::Tokens { choice: 0, first: 0, tokens: vec![], text: "a".into(), finish: None };
        let item = Item { request_id: "chatcmpl-forgotten".into(), attempt: 3, update };
        let worker_incarnation = worker.incarnation.clone();
        let message = TokenMessage { worker_incarnation, sequence, items: vec![item] };
        queue.publish(&gateway, message).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
        if !worker.heard.lock().unwrap().cancels.is_empty() {
            break;
        }
    }
    assert_eq!(worker.cancelled().await, "chatcmpl-forgotten");
}

#[tokio::test]
async fn a_choice_that_has_ended_stays_ended_after_a_move() {
    let site = Site::open().await;
    let script =
        Script { finish: Finish::Length, dies_after: Some(2), ..Script::saying(&["a", "b", "c"]) };
    let _first = worker::start(&site.storage, "w1", script.clone()).await;
    let body = json!({"model": "b", "prompt": "x", "max_tokens": 3});
    let client = site.client();
    let (reply, _second) = tokio::join!(client.post("/v1/completions", body), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        worker::start(&site.storage, "w2", Script { dies_after: None, ..script }).await
    });
    let reply = reply.ok();
    assert_eq!(reply["choices"][0]["text"], "abc");
    assert_eq!(reply["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn full_inboxes_are_a_503_and_the_next_worker_is_tried_first() {
    let limits = QueueLimits { inbox_requests: 1, ..QueueLimits::default() };
    let config = GatewayConfig { open_access: true, ..GatewayConfig::default() };
    let site = Site::with_limits(config, limits).await;
    let deaf = Script { deaf: true, ..Script::default() };
    let _deaf = worker::start(&site.storage, "deaf", deaf).await;
    let client = site.client();
    let others = async {
        while site.gateway.open_requests() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // The one before waits in the only inbox.
        let full = client.chat(json!({})).await;
        assert_eq!(full.refusal().1.as_deref(), Some("server_is_overloaded"));
        assert!(full.message().contains("busy"), "{full}");
        let _other = worker::start(&site.storage, "other", Script::default()).await;
        for _ in 0..5 {
            assert_eq!(client.chat(json!({})).await.status, 200);
        }
    };
    tokio::select! {
        reply = client.chat(json!({})) => panic!("nobody admits it: {reply}"),
        () = others => {}
    }
    assert_eq!(site.gateway.open_requests(), 0);
}

#[tokio::test]
async fn a_request_that_nobody_admits_is_refused_in_time() {
    let config = GatewayConfig {
        open_access: true,
        admission_timeout: Duration::from_millis(50),
        ..GatewayConfig::default()
    };
    let site = Site::with(config).await;
    let deaf = Script { deaf: true, ..Script::default() };
    let _deaf = worker::start(&site.storage, "deaf", deaf).await;
    let reply = site.client().chat(json!({"stream": true})).await;
    assert_eq!(reply.refusal().1.as_deref(), Some("server_is_overloaded"), "{reply}");
    assert_eq!(site.gateway.open_requests(), 0);
}

#[tokio::test]
async fn a_worker_that_is_full_passes_the_request_on() {
    let site = Site::open().await;
    let refusal =
        Refusal { kind: RefusalKind::Overloaded, message: "draining".to_owned(), param: None };
    let full = Script { refusal: Some(refusal), ..Script::default() };
    let _full = worker::start(&site.storage, "w1", full).await;
    let _other = worker::start(&site.storage, "w2", Script::default()).await;
    for _ in 0..5 {
        assert_eq!(site.client().chat(json!({})).await.status, 200);
    }
}

#[tokio::test]
async fn a_request_does_not_go_round_fast_among_workers_that_refuse_it() {
    let site = Site::open().await;
    let message = "the worker's queue is full".to_owned();
    let refusal = Refusal { kind: RefusalKind::Overloaded, message, param: None };
    let full = Script { refusal: Some(refusal), ..Script::default() };
    let one = worker::start(&site.storage, "w1", full.clone()).await;
    let two = worker::start(&site.storage, "w2", full).await;
    let begun = std::time::Instant::now();
    let reply = site.client().chat(json!({})).await;
    assert_eq!(reply.status, 503, "{reply}");
    assert!(reply.message().contains("queue is full"), "{reply}");
    // The first refusal passes it on at once, the others ever later.
    assert!(begun.elapsed() > Duration::from_millis(700), "{:?}", begun.elapsed());
    let attempts = |worker: &worker::Worker| {
        let heard = worker.heard.lock().unwrap();
        heard.requests.iter().map(|request| request.attempt % 2).collect::<Vec<_>>()
    };
    let mut attempts = [attempts(&one), attempts(&two)];
    attempts.sort();
    assert_eq!(attempts, [[0, 0], [1, 1]], "each goes to the other worker");
}

#[tokio::test]
async fn the_worker_that_holds_the_adapter_gets_the_request() {
    let site = Site::open().await;
    let id = site.adapter("org-local", "ft:b:org-local::AbCd1234").await;
    let holder = Script { resident: vec![id.clone()], ..Script::default() };
    let holder = worker::start(&site.storage, "w1", holder).await;
    let _other = worker::start(&site.storage, "w2", Script::default()).await;
    for _ in 0..10 {
        site.client().chat(json!({"model": "ft:b:org-local::AbCd1234"})).await.ok();
    }
    assert_eq!(holder.heard.lock().unwrap().requests.len(), 10);
    let shown = site.client().get(&format!("/v1/adapters/{id}")).await.ok();
    assert_eq!(shown["residency"], "device");
}

#[tokio::test]
async fn a_request_at_the_limit_of_the_process_is_a_503() {
    let config = GatewayConfig { open_access: true, requests_max: 1, ..GatewayConfig::default() };
    let site = Site::with(config).await;
    let script = Script { silent: true, ..Script::default() };
    let worker = worker::start(&site.storage, "w", script).await;
    let client = site.client();
    let one = client.chat(json!({}));
    let two = async {
        worker.wait(|heard| heard.requests.first().cloned()).await;
        client.chat(json!({})).await
    };
    tokio::select! {
        _ = one => panic!("nothing was said"),
        reply = two => assert_eq!(reply.status, 503),
    }
}
