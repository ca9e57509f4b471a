//! Thousands of broken requests: never a 5xx, never a reply outside the contract.

use axum::body::Body;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use serde_json::{Value, json};

use crate::site::{Site, form};
use crate::worker::{self, Script};

/// Random cases of one test; `./dev soak` asks for more.
fn rounds() -> usize {
    let factor = std::env::var("LOQUETIER_SOAK").ok().and_then(|text| text.parse().ok());
    1500 * factor.unwrap_or(1)
}

/// Replaces, removes or adds something somewhere.
fn mutate(value: &mut Value, rng: &mut impl Rng) {
    let odd = |rng: &mut dyn Rng| match rng.next_u32() % 12 {
        0 => json!(null),
        1 => json!(-1),
        2 => json!(1e308),
        3 => json!(""),
        4 => json!("\u{0}\u{ffff}🦀"),
        5 => json!([]),
        6 => json!({}),
        7 => json!(true),
        8 => json!(18446744073709551615u64),
        9 => json!([[[null]]]),
        10 => json!({"a": {"b": [1]}}),
        _ => json!("x".repeat(300)),
    };
    match value {
        Value::Object(map) if !map.is_empty() && rng.random_bool(0.8) => {
            let keys: Vec<String> = map.keys().cloned().collect();
            let key = keys[rng.random_range(0..keys.len())].clone();
            match rng.random_range(0..6) {
                0 => {
                    map.remove(&key);
                }
                1 => {
                    map.insert(format!("{key}x"), odd(rng));
                }
                _ => mutate(&mut map[&key], rng),
            }
        }
        Value::Array(items) if !items.is_empty() && rng.random_bool(0.8) => {
            let at = rng.random_range(0..items.len());
            mutate(&mut items[at], rng);
        }
        other => *other = odd(rng),
    }
}

fn seeds(file: &str) -> Vec<(&'static str, Value)> {
    let chat = json!({
        "model": "b", "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "n"},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "c", "type": "function",
             "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "c", "content": "r"},
        ],
        "temperature": 0.5, "top_p": 0.5, "n": 2, "stop": ["x"], "seed": 5, "logprobs": true,
        "top_logprobs": 2, "logit_bias": {"1": 2}, "stream": true, "max_tokens": 3,
        "stream_options": {"include_usage": true}, "response_format": {"type": "text"},
        "metadata": {"a": "b"}, "service_tier": "auto", "modalities": ["text"],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "tool_choice": "none", "chat_template_kwargs": {"a": 1},
    });
    let completion = json!({
        "model": "b", "prompt": ["a", [1, 2]], "max_tokens": 2, "logprobs": 2, "n": 1,
        "best_of": 2, "stop": "x", "top_k": 5, "min_p": 0.1, "stop_token_ids": [1],
    });
    let job = json!({
        "model": "b", "training_file": file, "validation_file": null, "suffix": "s", "seed": 1,
        "metadata": {"a": "b"}, "method": {"type": "supervised", "supervised":
            {"hyperparameters": {"n_epochs": 1, "batch_size": "auto"}}},
        "lora": {"rank": 4, "target_modules": ["q_proj"], "alpha": 2, "dropout": 0.1},
        "training": {"learning_rate": 0.1, "lr_scheduler": "linear", "adam_beta1": 0.5},
    });
    vec![
        ("/v1/chat/completions", chat),
        ("/v1/completions", completion),
        ("/v1/fine_tuning/jobs", job),
    ]
}

#[tokio::test]
async fn mutated_json_is_never_our_fault() {
    let site = Site::open().await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    let client = site.client();
    let seeds = seeds(&client.training_file().await);
    let mut rng = StdRng::seed_from_u64(7);
    let mut answered = 0;
    for round in 0..rounds() {
        let (path, seed) = &seeds[round % seeds.len()];
        let mut body = seed.clone();
        for _ in 0..rng.random_range(0..3) {
            mutate(&mut body, &mut rng);
        }
        let mut text = body.to_string().into_bytes();
        if rng.random_bool(0.3) && !text.is_empty() {
            let at = rng.random_range(0..text.len());
            match rng.random_range(0..3) {
                0 => text[at] = rng.random(),
                1 => text.truncate(at),
                _ => text.insert(at, rng.random()),
            }
        }
        let shown = String::from_utf8_lossy(&text).into_owned();
        let request = client.request("POST", path).body(Body::from(text)).unwrap();
        let reply = client.send(request).await;
        assert!(reply.status < 500, "{path} {shown}: {reply}");
        answered += usize::from(reply.status == 200);
    }
    assert!(answered > rounds() / 20, "only {answered} were answered");
    assert_eq!(site.gateway.open_requests(), 0);
}

#[tokio::test]
async fn mutated_forms_are_never_our_fault() {
    let site = Site::open().await;
    let client = site.client();
    let parts: [(&str, Option<&str>, &[u8]); 4] = [
        ("purpose", None, b"fine-tune"),
        ("expires_after[anchor]", None, b"created_at"),
        ("expires_after[seconds]", None, b"4000"),
        ("file", Some("f.jsonl"), b"{\"a\":1}\n{}\n"),
    ];
    let good = form(&parts);
    let mut rng = StdRng::seed_from_u64(11);
    for _ in 0..rounds() / 3 {
        let mut body = good.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..body.len());
            match rng.random_range(0..4) {
                0 => body[at] = rng.random(),
                1 => body.truncate(at.max(1)),
                2 => body.insert(at, rng.random()),
                _ => {
                    body.remove(at);
                }
            }
            if body.is_empty() {
                body.push(0);
            }
        }
        let shown = String::from_utf8_lossy(&body).into_owned();
        let request = client
            .request("POST", "/v1/files")
            .header("content-type", "multipart/form-data; boundary=XX")
            .body(Body::from(body))
            .unwrap();
        let reply = client.send(request).await;
        assert!(reply.status < 500, "{shown}: {reply}");
    }
}

#[tokio::test]
async fn odd_paths_and_queries_are_never_our_fault() {
    let site = Site::open().await;
    let client = site.client();
    let mut rng = StdRng::seed_from_u64(13);
    let routes = [
        "/v1/models/",
        "/v1/files/",
        "/v1/fine_tuning/jobs/",
        "/v1/adapters/",
        "/v1/files?after=",
        "/v1/fine_tuning/jobs?metadata[",
        "/v1/files?limit=",
        "/v1/adapters?",
        "/",
    ];
    let bits = ["%", "%00", "%2F", "%ff", "/", ":", "a", "=", "&", "]", "..", "é", "%25", "+"];
    for round in 0..rounds() / 3 {
        let mut path = routes[round % routes.len()].to_owned();
        for _ in 0..rng.random_range(0..6) {
            path.push_str(bits[rng.random_range(0..bits.len())]);
        }
        if path.parse::<axum::http::Uri>().is_err() {
            continue;
        }
        for method in ["GET", "DELETE", "POST", "HEAD", "OPTIONS", "PATCH"] {
            let request = client.request(method, &path).body(Body::empty()).unwrap();
            let reply = client.send(request).await;
            assert!(reply.status < 500, "{method} {path}: {reply}");
        }
    }
}
