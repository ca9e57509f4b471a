//! The processes of the production form over shared stores, and a client of them.

use super::PATIENCE;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Flags that name the shared stores, in places unlike any other test's. None where no servers are.
pub fn stores() -> Option<Vec<String>> {
    let found = servers();
    assert!(
        found.is_some() || std::env::var_os("CI").is_none(),
        "CI names Postgres, Redis and an S3 server"
    );
    found
}

fn servers() -> Option<Vec<String>> {
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

/// The binary.
pub fn loquetier() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loquetier"));
    // The test server takes any credentials.
    command.env("AWS_ACCESS_KEY_ID", "test").env("AWS_SECRET_ACCESS_KEY", "test");
    command
}

/// A process of the service; killed when dropped.
pub struct Process(Child);

impl Process {
    /// Starts one and waits until its log says `ready`; the rest of that line.
    pub fn start(command: &mut Command, ready: &str) -> (Self, String) {
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

    /// Sends a signal, such as `-TERM`.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([name, &self.0.id().to_string()]).status();
        assert!(sent.unwrap().success());
    }

    /// Waits for its end; whether it ended well.
    pub async fn ended(mut self) -> bool {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.success();
            }
            assert!(start.elapsed() < PATIENCE, "it does not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a worker with its name.
pub fn worker(id: &str, base: &Path, stores: &[String]) -> Process {
    let mut command = loquetier();
    command.args(["worker", "--device", "cpu", "--threads", "1", "--served-model-name", "tiny"]);
    command.args(["--worker-id", id]).arg("--base-model").arg(base).args(stores);
    Process::start(&mut command, "worker for").0
}

/// A gateway and a client of it.
pub struct Gateway {
    _process: Process,
    root: String,
    key: String,
    http: reqwest::Client,
}

impl Gateway {
    /// Starts one on a free port.
    pub fn start(stores: &[String], key: &str) -> Self {
        let mut command = loquetier();
        command.args(["gateway", "--listen", "127.0.0.1:0"]).args(stores);
        let (process, address) = Process::start(&mut command, "gateway at ");
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let (root, key) = (address.trim().to_owned(), key.to_owned());
        Self { _process: process, root, key, http }
    }

    /// A request with the key.
    pub fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.root)).bearer_auth(&self.key)
    }

    /// `GET` of JSON.
    pub async fn get(&self, path: &str) -> Value {
        self.request(reqwest::Method::GET, path).send().await.unwrap().json().await.unwrap()
    }

    /// `POST` of JSON that must succeed.
    pub async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        let reply = self.request(reqwest::Method::POST, path).json(body).send().await.unwrap();
        assert!(reply.status().is_success(), "{path}: {}", reply.text().await.unwrap());
        reply
    }

    /// `POST` without a body; the reply, whatever it is.
    pub async fn try_post(&self, path: &str) -> Value {
        let reply = self.request(reqwest::Method::POST, path).send().await.unwrap();
        reply.json().await.unwrap()
    }

    /// Uploads a training file; its id.
    pub async fn upload(&self, lines: String) -> String {
        let part = reqwest::multipart::Part::bytes(lines.into_bytes()).file_name("t.jsonl");
        let form = reqwest::multipart::Form::new().text("purpose", "fine-tune").part("file", part);
        let request = self.request(reqwest::Method::POST, "/files").multipart(form);
        let file: Value = request.send().await.unwrap().json().await.unwrap();
        file["id"].as_str().unwrap_or_else(|| panic!("{file}")).to_owned()
    }

    /// `GET` of whatever is not JSON.
    pub async fn bytes(&self, path: &str) -> Vec<u8> {
        let reply = self.request(reqwest::Method::GET, path).send().await.unwrap();
        assert!(reply.status().is_success(), "{path}: {}", reply.status());
        reply.bytes().await.unwrap().to_vec()
    }

    /// Creates a job; its id.
    pub async fn create_job(&self, job: &Value) -> String {
        let job: Value = self.post("/fine_tuning/jobs", job).await.json().await.unwrap();
        job["id"].as_str().unwrap_or_else(|| panic!("{job}")).to_owned()
    }

    /// Waits until a job has succeeded; its row.
    pub async fn succeeded(&self, job: &str) -> Value {
        let start = Instant::now();
        loop {
            let row = self.get(&format!("/fine_tuning/jobs/{job}")).await;
            if row["status"] == "succeeded" {
                return row;
            }
            assert!(row["status"] != "failed" && start.elapsed() < PATIENCE, "{row}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A streamed answer to a chat request with these fields; `meanwhile` runs after the first
    /// piece.
    pub async fn stream(&self, fields: &Value, meanwhile: impl FnOnce()) -> String {
        let mut body = json!({
            "messages": [{"role": "user", "content": "What is 3 and 4?"}],
            "ignore_eos": true,
            "stream": true,
        });
        for (name, value) in fields.as_object().unwrap() {
            body[name] = value.clone();
        }
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
