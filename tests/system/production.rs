//! The production form: gateways and workers as processes of their own over Postgres, Redis and an
//! S3-compatible store, whose addresses `./dev test` sets.

#![allow(clippy::unwrap_used)]

mod common;

use common::{PATIENCE, chat_file, tiny_base};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Flags that name the shared stores, in places unlike any other test's.
fn stores() -> Option<Vec<String>> {
    let named = |name: &str| std::env::var(name).ok();
    let server = named("LOQUETIER_TEST_POSTGRES_URL")?;
    let redis = named("LOQUETIER_TEST_REDIS_URL")?;
    let bucket = named("LOQUETIER_TEST_S3_URL")?;
    let (endpoint, bucket) = bucket.rsplit_once('/')?;
    let schema = format!("production_{}", storage::ids::alphanumerics(8).to_lowercase());
    let create = format!("CREATE SCHEMA {schema}");
    assert!(Command::new("psql").args([&server, "-qc", &create]).status().unwrap().success());
    let joint = if server.contains('?') { '&' } else { '?' };
    let database = format!("{server}{joint}options=-c%20search_path%3D{schema}");
    let flags = [
        ("--database-url", database),
        ("--redis-url", redis),
        ("--object-store", format!("s3://{bucket}/{schema}")),
        ("--s3-endpoint", endpoint.to_owned()),
    ];
    Some(flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect())
}

fn loquetier() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loquetier"));
    // The test server takes any credentials.
    command.env("AWS_ACCESS_KEY_ID", "test").env("AWS_SECRET_ACCESS_KEY", "test");
    command
}

/// A process of the service; killed when dropped.
struct Process(Child);

impl Process {
    /// Starts one and waits until its log says `ready`; the rest of that line.
    fn start(command: &mut Command, ready: &str) -> (Self, String) {
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let process = Self(child);
        let mut seen = String::new();
        loop {
            let Some(line) = lines.next() else { panic!("it ended: {seen}") };
            let line = line.unwrap();
            if let Some((_, rest)) = line.split_once(ready) {
                let rest = rest.to_owned();
                // The pipe has to be read, or the process would block on a full one.
                std::thread::spawn(move || lines.for_each(drop));
                return (process, rest);
            }
            seen.push_str(&line);
            seen.push('\n');
        }
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([name, &self.0.id().to_string()]).status();
        assert!(sent.unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn worker(base: &Path, stores: &[String]) -> Process {
    let mut command = loquetier();
    command.args(["worker", "--device", "cpu", "--threads", "1", "--served-model-name", "tiny"]);
    command.arg("--base-model").arg(base).args(stores);
    Process::start(&mut command, "worker for").0
}

/// A gateway and a client of it.
struct Gateway {
    _process: Process,
    root: String,
    key: String,
    http: reqwest::Client,
}

impl Gateway {
    fn start(stores: &[String], key: &str) -> Self {
        let mut command = loquetier();
        command.args(["gateway", "--listen", "127.0.0.1:0"]).args(stores);
        let (process, address) = Process::start(&mut command, "gateway at ");
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let (root, key) = (address.trim().to_owned(), key.to_owned());
        Self { _process: process, root, key, http }
    }

    fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.root)).bearer_auth(&self.key)
    }

    async fn get(&self, path: &str) -> Value {
        self.request(reqwest::Method::GET, path).send().await.unwrap().json().await.unwrap()
    }

    async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        let reply = self.request(reqwest::Method::POST, path).json(body).send().await.unwrap();
        assert!(reply.status().is_success(), "{path}: {}", reply.text().await.unwrap());
        reply
    }

    async fn upload(&self, lines: String) -> String {
        let part = reqwest::multipart::Part::bytes(lines.into_bytes()).file_name("t.jsonl");
        let form = reqwest::multipart::Form::new().text("purpose", "fine-tune").part("file", part);
        let request = self.request(reqwest::Method::POST, "/files").multipart(form);
        let file: Value = request.send().await.unwrap().json().await.unwrap();
        file["id"].as_str().unwrap_or_else(|| panic!("{file}")).to_owned()
    }

    /// A greedy answer; `meanwhile` runs after the first piece.
    async fn stream(&self, model: &str, tokens: usize, meanwhile: impl FnOnce()) -> String {
        let body = json!({
            "model": model,
            "messages": [{"role": "user", "content": "What is 3 and 4?"}],
            "temperature": 0,
            "max_tokens": tokens,
            "ignore_eos": true,
            "stream": true,
        });
        let mut reply = self.post("/chat/completions", &body).await;
        let (mut bytes, mut text, mut meanwhile) = (Vec::new(), String::new(), Some(meanwhile));
        while let Some(chunk) = reply.chunk().await.unwrap() {
            bytes.extend_from_slice(&chunk);
            while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = bytes.drain(..=end).collect();
                let line = String::from_utf8(line).unwrap();
                let Some(event) = line.trim().strip_prefix("data: {") else { continue };
                let event: Value = serde_json::from_str(&format!("{{{event}")).unwrap();
                assert!(event["error"].is_null(), "{event}");
                text.push_str(event["choices"][0]["delta"]["content"].as_str().unwrap_or(""));
                if !text.is_empty()
                    && let Some(meanwhile) = meanwhile.take()
                {
                    meanwhile();
                }
            }
        }
        text
    }
}

/// Two gateways, one after another two workers: a job made at one gateway is seen at the other, and
/// a stream whose worker freezes goes on at the next one without a gap or a repeat.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_and_streams_outlive_their_worker() {
    let Some(stores) = stores() else {
        assert!(std::env::var_os("CI").is_none(), "CI names Postgres, Redis and an S3 server");
        return;
    };
    let scratch = tempfile::tempdir().unwrap();
    let base = tiny_base(scratch.path());

    let early = loquetier().arg("gateway").args(&stores).output().unwrap();
    let complaint = String::from_utf8_lossy(&early.stderr).into_owned();
    assert!(complaint.contains("loquetier migrate"), "{complaint}");
    let database = &stores[..2];
    assert!(loquetier().arg("migrate").args(database).status().unwrap().success());
    let key = loquetier().args(["keys", "create"]).args(database).output().unwrap();
    let key = String::from_utf8(key.stdout).unwrap().trim().to_owned();

    let first = worker(&base, &stores);
    let (a, b) = (Gateway::start(&stores, &key), Gateway::start(&stores, &key));
    let job = json!({
        "model": "tiny",
        "training_file": a.upload(chat_file(40)).await,
        "seed": 3,
        "hyperparameters": {"n_epochs": 2, "batch_size": 4},
        "lora": {"rank": 4},
    });
    let job: Value = a.post("/fine_tuning/jobs", &job).await.json().await.unwrap();
    let path = format!("/fine_tuning/jobs/{}", job["id"].as_str().unwrap());
    let start = Instant::now();
    let model = loop {
        let row = b.get(&path).await;
        assert_ne!(row["status"], "failed", "{row}");
        if row["status"] == "succeeded" {
            break row["fine_tuned_model"].as_str().unwrap().to_owned();
        }
        assert!(start.elapsed() < PATIENCE, "{row}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };

    let calm = b.stream(&model, 300, || ()).await;
    assert!(calm.len() > 100, "{calm}");
    assert_eq!(a.stream(&model, 300, || ()).await, calm, "both gateways");
    let mut second = None;
    let moved = a.stream(&model, 300, || {
        first.signal("-STOP");
        second = Some(worker(&base, &stores));
    });
    assert_eq!(moved.await, calm, "moved to another worker");
    // What wakes again must not disturb what has moved on.
    first.signal("-CONT");
    assert_eq!(b.stream(&model, 300, || ()).await, calm, "after the first one woke");
    let stopping = second.unwrap();
    stopping.signal("-TERM");
    drop(first);
}
