//! The embedded form as an operator meets it: one folder, one port, keys, signals.

#![allow(clippy::unwrap_used)]

mod common;

use common::process::{complaint, printed};
use common::server::Server;
use common::{chat, chat_file, is_idle, tiny_base, until};
use reqwest::Method;
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

fn loquetier(args: &[&str], data: &Path) -> Command {
    let mut command = common::process::loquetier();
    command.args(args).arg("--data-dir").arg(data);
    command
}

async fn create(server: &Server, epochs: usize) -> String {
    let file = server.upload(chat_file(60)).await;
    let job = json!({
        "model": "tiny",
        "training_file": file,
        "seed": 3,
        "hyperparameters": {"n_epochs": epochs, "batch_size": 2},
        "lora": {"rank": 4},
    });
    server.create(&job).await
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
    until("a step", async || server.steps(job).await.first().copied()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pauses_signals_and_restarts_do_not_change_a_result() {
    let scratch = tempfile::tempdir().unwrap();
    let base = tiny_base(scratch.path());
    let mut server = Server::embedded(&base, &scratch.path().join("data"), &[]);
    let calm = create(&server, 8).await;
    let calm = server.success(&calm).await;
    let expected = trace(&server, calm["fine_tuned_model"].as_str().unwrap()).await;

    let job = create(&server, 8).await;
    wait_for_step(&server, &job).await;
    assert_ne!(trace(&server, &job).await, Value::Null, "the live job answers");
    let paused = server.wish(&job, "pause").await;
    assert_eq!(paused["status"], "paused");
    let at_pause = trace(&server, &job).await;
    assert_eq!(trace(&server, &job).await, at_pause, "a paused job's weights stand still");
    let resumed = server.wish(&job, "resume").await;
    assert_eq!(resumed["status"], "queued");
    server.wait_for(&job, &["running"]).await;
    assert!(server.process.terminate().await, "a signal ends it well");

    let server = Server::embedded(&base, &scratch.path().join("data"), &[]);
    let row = server.success(&job).await;
    assert_eq!(trace(&server, row["fine_tuned_model"].as_str().unwrap()).await, expected);
    assert_eq!(trace(&server, &job).await, expected, "the job id is an alias of the result");
    assert_ne!(trace(&server, "tiny").await, expected, "training changed the answers");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_job_is_gone_and_leaves_room() {
    let scratch = tempfile::tempdir().unwrap();
    let base = tiny_base(scratch.path());
    let server = Server::embedded(&base, &scratch.path().join("data"), &[]);
    assert!(is_idle(&server.workers().await[0]), "a worker tells of its room from the start");
    let mut jobs = Vec::new();
    for _ in 0..6 {
        jobs.push(create(&server, 50).await);
    }
    wait_for_step(&server, &jobs[0]).await;
    for job in &jobs {
        let row = server.wish(job, "cancel").await;
        assert_eq!(row["status"], "cancelled");
    }
    let next = create(&server, 1).await;
    server.success(&next).await;
    server.until_workers("all is given back", |all| all.len() == 1 && is_idle(&all[0])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_folder_one_port_and_keys() {
    let scratch = tempfile::tempdir().unwrap();
    let base = tiny_base(scratch.path());
    let data = scratch.path().join("data");
    let server = Server::embedded(&base, &data, &[]);
    let address = server.root.trim_start_matches("http://").trim_end_matches("/v1");
    let base = base.to_str().unwrap();
    let serve = |listen: &str, data: &Path| {
        complaint(&mut loquetier(&["serve", "--base-model", base, "--listen", listen], data))
    };
    assert!(serve("127.0.0.1:0", &data).contains("in use"), "a second server of one folder");
    assert!(serve(address, &scratch.path().join("other")).contains("--listen"), "a busy port");
    let far = serve("0.0.0.0:0", &scratch.path().join("far"));
    assert!(far.contains("keys create --data-dir"), "{far}");

    assert_eq!(say(&server, "tiny").await["object"], "chat.completion");
    let key = printed(&mut loquetier(&["keys", "create", "--org", "org-a"], &data));
    assert!(key.starts_with("sk-"), "{key}");
    let refused = until("no open access", async || {
        Some(server.try_get("/models").await.status).filter(|s| *s != 200)
    });
    assert_eq!(refused.await, 401);
    let models = server.request(Method::GET, "/models").bearer_auth(&key);
    assert_eq!(server.reply(models).await.status, 200);
    let list = printed(&mut loquetier(&["keys", "list"], &data));
    assert!(list.contains("org-a") && !list.contains(&key), "{list}");
    let id = list.split('\t').next().unwrap();
    printed(&mut loquetier(&["keys", "revoke", id], &data));
    complaint(&mut loquetier(&["keys", "revoke", "key-none"], &data));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_context_limit_is_kept() {
    let scratch = tempfile::tempdir().unwrap();
    let base = tiny_base(scratch.path());
    let flags = ["--max-context", "40"];
    let server = Server::embedded(&base, &scratch.path().join("data"), &flags);
    let body = |content: &str| {
        json!({
            "model": "tiny",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 4000,
            "ignore_eos": true,
        })
    };
    let reply = server.ask(&body("Hi")).await.body;
    assert_eq!(reply["usage"]["total_tokens"], 40);
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
    let long = server.ask(&body(&"word ".repeat(100))).await;
    assert_eq!(
        (long.status, &long.body["error"]["code"]),
        (400, &json!("context_length_exceeded"))
    );
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
        let said = complaint(&mut loquetier(&args, &data));
        assert!(said.contains(named) && said.lines().count() == 1, "{said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_lets_an_open_answer_end() {
    let scratch = tempfile::tempdir().unwrap();
    let base = tiny_base(scratch.path());
    let mut server = Server::embedded(&base, &scratch.path().join("data"), &[]);
    let mut reply = server.open_stream(&chat("tiny", 400)).await;
    let mut text = reply.chunk().await.unwrap().unwrap().to_vec();
    server.process.signal("-TERM");
    while let Some(chunk) = reply.chunk().await.unwrap() {
        text.extend_from_slice(&chunk);
    }
    let text = String::from_utf8(text).unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"), "cut short: {text}");
    assert!(server.process.ended().await);
}
