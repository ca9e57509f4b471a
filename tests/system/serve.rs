//! The embedded form as an operator meets it: one folder, one port, keys, signals.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Server, chat_file, tiny_base};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

fn loquetier(args: &[&str], data: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_loquetier"))
        .args(args)
        .arg("--data-dir")
        .arg(data)
        .output()
        .unwrap()
}

fn complaint(output: &Output) -> String {
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

async fn create(server: &Server, epochs: usize) -> String {
    let file = server.upload(&chat_file(60)).await;
    let job = json!({
        "model": "tiny",
        "training_file": file,
        "seed": 3,
        "hyperparameters": {"n_epochs": epochs, "batch_size": 2},
        "lora": {"rank": 4},
    });
    server.post("/fine_tuning/jobs", &job).await["id"].as_str().unwrap().to_owned()
}

async fn say(server: &Server, model: &str) -> Value {
    let body = json!({
        "model": model,
        "messages": [{"role": "user", "content": "What is 3 and 4?"}],
        "temperature": 0,
        "max_tokens": 12,
        "logprobs": true,
    });
    server.post("/chat/completions", &body).await
}

/// Tokens and their log-probabilities: equal only for equal weights.
async fn trace(server: &Server, model: &str) -> Value {
    say(server, model).await["choices"][0]["logprobs"].clone()
}

async fn wait_for_step(server: &Server, job: &str) {
    let start = Instant::now();
    loop {
        let events = server.events(job).await;
        if events.iter().any(|event| event["type"] == "metrics") {
            return;
        }
        assert!(start.elapsed() < common::PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pauses_signals_and_restarts_do_not_change_a_result() {
    let scratch = tempfile::tempdir().unwrap();
    let base = tiny_base(scratch.path());
    let mut server = Server::start(&base, &scratch.path().join("data")).await;
    let calm = create(&server, 8).await;
    let calm = server.wait_for(&calm, &["succeeded"]).await;
    let expected = trace(&server, calm["fine_tuned_model"].as_str().unwrap()).await;

    let job = create(&server, 8).await;
    wait_for_step(&server, &job).await;
    assert_ne!(trace(&server, &job).await, Value::Null, "the live job answers");
    let paused = server.post(&format!("/fine_tuning/jobs/{job}/pause"), &json!({})).await;
    assert_eq!(paused["status"], "paused");
    let at_pause = trace(&server, &job).await;
    assert_eq!(trace(&server, &job).await, at_pause, "a paused job's weights stand still");
    let resumed = server.post(&format!("/fine_tuning/jobs/{job}/resume"), &json!({})).await;
    assert_eq!(resumed["status"], "queued");
    server.wait_for(&job, &["running"]).await;
    assert!(server.terminate(), "a signal ends it well");

    let server = Server::start(&base, &scratch.path().join("data")).await;
    let row = server.wait_for(&job, &["succeeded"]).await;
    assert_eq!(trace(&server, row["fine_tuned_model"].as_str().unwrap()).await, expected);
    assert_eq!(trace(&server, &job).await, expected, "the job id is an alias of the result");
    assert_ne!(trace(&server, "tiny").await, expected, "training changed the answers");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_job_is_gone_and_leaves_room() {
    let scratch = tempfile::tempdir().unwrap();
    let base = tiny_base(scratch.path());
    let server = Server::start(&base, &scratch.path().join("data")).await;
    let idle = server.get("/workers").await;
    let mut jobs = Vec::new();
    for _ in 0..6 {
        jobs.push(create(&server, 50).await);
    }
    wait_for_step(&server, &jobs[0]).await;
    for job in &jobs {
        let row = server.post(&format!("/fine_tuning/jobs/{job}/cancel"), &json!({})).await;
        assert_eq!(row["status"], "cancelled");
    }
    let next = create(&server, 1).await;
    server.wait_for(&next, &["succeeded"]).await;
    let start = Instant::now();
    loop {
        let now = server.get("/workers").await;
        let same = |field: &str| now["data"][0][field] == idle["data"][0][field];
        if same("free_blocks") && same("training_jobs") && same("requests") {
            break;
        }
        assert!(start.elapsed() < common::PATIENCE, "not given back: {now}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_folder_one_port_and_keys() {
    let scratch = tempfile::tempdir().unwrap();
    let base = tiny_base(scratch.path());
    let data = scratch.path().join("data");
    let server = Server::start(&base, &data).await;
    let address = server.root.trim_start_matches("http://").trim_end_matches("/v1");
    let base = base.to_str().unwrap();
    let serve = |listen: &str, data: &Path| {
        complaint(&loquetier(&["serve", "--base-model", base, "--listen", listen], data))
    };
    assert!(serve("127.0.0.1:0", &data).contains("in use"), "a second server of one folder");
    assert!(serve(address, &scratch.path().join("other")).contains("--listen"), "a busy port");
    let far = serve("0.0.0.0:0", &scratch.path().join("far"));
    assert!(far.contains("keys create --data-dir"), "{far}");

    assert_eq!(say(&server, "tiny").await["object"], "chat.completion");
    let made = loquetier(&["keys", "create", "--org", "org-a"], &data);
    let key = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    assert!(key.starts_with("sk-"), "{key}");
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let models = format!("{}/models", server.root);
    let start = Instant::now();
    while client.get(&models).send().await.unwrap().status() != 401 {
        assert!(start.elapsed() < Duration::from_secs(3), "open access goes on");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(client.get(&models).bearer_auth(&key).send().await.unwrap().status(), 200);
    let list = loquetier(&["keys", "list"], &data);
    let list = String::from_utf8(list.stdout).unwrap();
    assert!(list.contains("org-a") && !list.contains(&key), "{list}");
    let id = list.split('\t').next().unwrap();
    assert!(loquetier(&["keys", "revoke", id], &data).status.success());
    complaint(&loquetier(&["keys", "revoke", "key-none"], &data));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_context_limit_is_kept() {
    let scratch = tempfile::tempdir().unwrap();
    let base = tiny_base(scratch.path());
    let flags = ["--max-context", "40"];
    let server = Server::start_with(&base, &scratch.path().join("data"), &flags).await;
    let body = |content: &str| {
        json!({
            "model": "tiny",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 4000,
            "ignore_eos": true,
        })
    };
    let reply = server.post("/chat/completions", &body("Hi")).await;
    assert_eq!(reply["usage"]["total_tokens"], 40);
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("{}/chat/completions", server.root);
    let long = client.post(url).json(&body(&"word ".repeat(100))).send().await.unwrap();
    assert_eq!(long.status(), 400);
    let error: Value = long.json().await.unwrap();
    assert_eq!(error["error"]["code"], "context_length_exceeded");
}

#[test]
fn what_cannot_be_served_is_one_clear_line() {
    let scratch = tempfile::tempdir().unwrap();
    let base = tiny_base(scratch.path());
    let data = scratch.path().join("data");
    let config = base.join("config.json");
    let good = std::fs::read_to_string(&config).unwrap();
    let faults = [
        ("\"LlamaForCausalLM\"", "\"GptForCausalLM\"", "GptForCausalLM"),
        ("\"hidden_size\":32", "\"hidden_size\":48", "embed_tokens"),
        ("\"num_hidden_layers\":2", "\"num_hidden_layers\":3", "layers.2"),
    ];
    for (from, to, named) in faults {
        assert!(good.contains(from), "{good}");
        std::fs::write(&config, good.replace(from, to)).unwrap();
        let args = ["serve", "--listen", "127.0.0.1:0", "--base-model", base.to_str().unwrap()];
        let said = complaint(&loquetier(&args, &data));
        assert!(said.contains(named) && said.lines().count() == 1, "{said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_lets_an_open_answer_end() {
    let scratch = tempfile::tempdir().unwrap();
    let base = tiny_base(scratch.path());
    let mut server = Server::start(&base, &scratch.path().join("data")).await;
    let body = json!({
        "model": "tiny",
        "messages": [{"role": "user", "content": "Count."}],
        "max_tokens": 400,
        "ignore_eos": true,
        "stream": true,
    });
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("{}/chat/completions", server.root);
    let mut reply = client.post(url).json(&body).send().await.unwrap();
    let mut text = reply.chunk().await.unwrap().unwrap().to_vec();
    let ended = std::thread::spawn(move || server.terminate());
    while let Some(chunk) = reply.chunk().await.unwrap() {
        text.extend_from_slice(&chunk);
    }
    let text = String::from_utf8(text).unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"), "cut short: {text}");
    assert!(ended.join().unwrap());
}
