//! The production form: gateways and workers over Postgres, Redis and an S3-compatible store, whose
//! addresses `./dev test` sets.

use super::PATIENCE;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Where the shared stores are, in places unlike any other test's.
#[derive(Clone, Debug)]
pub struct Stores {
    /// `postgres://…`
    pub database: String,
    /// `redis…://…`
    pub redis: String,
    /// `s3://…`
    pub bucket: String,
    /// `http://…`
    pub endpoint: String,
}

/// New places in the stores of the environment; none where it names none, which CI must not.
pub fn stores() -> Option<Stores> {
    let stores = find_stores();
    let named = stores.is_some() || std::env::var_os("CI").is_none();
    assert!(named, "CI names Postgres, Redis and an S3 server");
    stores
}

fn find_stores() -> Option<Stores> {
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
    let bucket = format!("s3://{bucket}/{schema}");
    Some(Stores { database, redis, bucket, endpoint: endpoint.to_owned() })
}

impl Stores {
    /// Flags that name them.
    pub fn flags(&self) -> Vec<&str> {
        let Self { database, redis, bucket, endpoint } = self;
        let mut flags = vec!["--database-url", database, "--redis-url", redis];
        flags.extend(["--object-store", bucket, "--s3-endpoint", endpoint]);
        flags
    }

    /// Brings the schema up to date; a new key.
    pub fn prepare(&self) -> String {
        let database = ["--database-url", &self.database];
        assert!(loquetier().arg("migrate").args(database).status().unwrap().success());
        let key = loquetier().args(["keys", "create"]).args(database).output().unwrap();
        String::from_utf8(key.stdout).unwrap().trim().to_owned()
    }
}

/// The binary.
pub fn loquetier() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loquetier"));
    // The test server takes any credentials.
    command.env("AWS_ACCESS_KEY_ID", "test").env("AWS_SECRET_ACCESS_KEY", "test");
    command
}

/// A process of the service; killed when dropped.
pub struct Process {
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Process {
    /// Starts one and waits until its log says `ready`; the rest of that line.
    pub fn start(command: &mut Command, ready: &str) -> (Self, String) {
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log = Arc::new(Mutex::new(String::new()));
        let process = Self { child, log: log.clone() };
        let mut note = move |line: String| {
            let mut log = log.lock().unwrap();
            log.push_str(&line);
            log.push('\n');
        };
        loop {
            let Some(line) = lines.next() else { panic!("it ended: {}", process.log()) };
            let line = line.unwrap();
            if let Some((_, rest)) = line.split_once(ready) {
                let rest = rest.to_owned();
                // The pipe has to be read, or the process would block on a full one.
                std::thread::spawn(move || lines.map_while(Result::ok).for_each(&mut note));
                return (process, rest);
            }
            note(line);
        }
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Sends a signal, such as `-STOP`.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([name, &self.child.id().to_string()]).status();
        assert!(sent.unwrap().success());
    }

    /// Waits for its end; whether that was a success.
    pub fn wait(&mut self) -> bool {
        self.child.wait().unwrap().success()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            println!("{}", self.log());
        }
    }
}

/// Starts a worker of a base.
pub fn worker(base: &Path, stores: &Stores, flags: &[&str]) -> Process {
    let mut command = loquetier();
    command.args(["worker", "--device", "cpu", "--threads", "1", "--served-model-name", "tiny"]);
    command.arg("--base-model").arg(base).args(stores.flags()).args(flags);
    Process::start(&mut command, "worker for").0
}

/// A gateway and a client of it.
pub struct Gateway {
    process: Process,
    /// Ends in `/v1`.
    pub root: String,
    key: String,
    http: reqwest::Client,
}

impl Gateway {
    /// Starts a gateway.
    pub fn start(stores: &Stores, key: &str) -> Self {
        let mut command = loquetier();
        command.args(["gateway", "--listen", "127.0.0.1:0"]).args(stores.flags());
        let (process, address) = Process::start(&mut command, "gateway at ");
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let (root, key) = (address.trim().to_owned(), key.to_owned());
        Self { process, root, key, http }
    }

    /// A request with its key.
    pub fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.root)).bearer_auth(&self.key)
    }

    /// `GET` of JSON, any status.
    pub async fn get(&self, path: &str) -> Value {
        self.request(reqwest::Method::GET, path).send().await.unwrap().json().await.unwrap()
    }

    /// `POST` of JSON; panics on an error reply.
    pub async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        let reply = self.request(reqwest::Method::POST, path).json(body).send().await.unwrap();
        assert!(reply.status().is_success(), "{path}: {}", reply.text().await.unwrap());
        reply
    }

    /// Uploads a training file; its id.
    pub async fn upload(&self, lines: String) -> String {
        let part = reqwest::multipart::Part::bytes(lines.into_bytes()).file_name("t.jsonl");
        let form = reqwest::multipart::Form::new().text("purpose", "fine-tune").part("file", part);
        let request = self.request(reqwest::Method::POST, "/files").multipart(form);
        let file: Value = request.send().await.unwrap().json().await.unwrap();
        file["id"].as_str().unwrap_or_else(|| panic!("{file}")).to_owned()
    }

    /// The process, for signals and its log.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Creates a job; its id.
    pub async fn create(&self, job: &Value) -> String {
        let job: Value = self.post("/fine_tuning/jobs", job).await.json().await.unwrap();
        job["id"].as_str().unwrap_or_else(|| panic!("{job}")).to_owned()
    }

    /// A job as it is now.
    pub async fn job(&self, id: &str) -> Value {
        self.get(&format!("/fine_tuning/jobs/{id}")).await
    }

    /// Waits until a job is as wanted; panics when it ends otherwise.
    pub async fn wait_for(&self, id: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let start = Instant::now();
        loop {
            let row = self.job(id).await;
            if wanted(&row) {
                return row;
            }
            let ended = ["failed", "cancelled", "succeeded"].map(|word| row["status"] == word);
            assert!(!ended.contains(&true) && start.elapsed() < PATIENCE, "{row}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until a job has succeeded; its row.
    pub async fn success(&self, id: &str) -> Value {
        self.wait_for(id, |row| row["status"] == "succeeded").await
    }

    /// The files of a job's result, one after another.
    pub async fn content(&self, job: &Value) -> Vec<u8> {
        let model = job["fine_tuned_model"].as_str().unwrap();
        let path = format!("/adapters/{model}/content");
        let reply = self.request(reqwest::Method::GET, &path).send().await.unwrap();
        assert!(reply.status().is_success(), "{path}: {}", reply.status());
        // The archive tells when they were made, too.
        let (archive, mut files) = (reply.bytes().await.unwrap(), Vec::new());
        let mut rest = &archive[..];
        while rest.len() > 512 && rest[0] != 0 {
            let size = std::str::from_utf8(&rest[124..135]).unwrap();
            let size = usize::from_str_radix(size, 8).unwrap();
            files.extend_from_slice(&rest[512..512 + size]);
            rest = &rest[512 + size.next_multiple_of(512)..];
        }
        assert!(!files.is_empty());
        files
    }

    /// Steps that a job's events tell of, in their order.
    pub async fn steps(&self, id: &str) -> Vec<u64> {
        let (mut steps, mut after) = (Vec::new(), String::new());
        loop {
            let path = format!("/fine_tuning/jobs/{id}/events?limit=1000{after}");
            let page = self.get(&path).await;
            let data = page["data"].as_array().unwrap();
            let metrics = data.iter().filter(|event| event["type"] == "metrics");
            steps.extend(metrics.map(|event| event["data"]["step"].as_u64().unwrap()));
            let Some(last) = data.last().filter(|_| page["has_more"] == true) else { break };
            after = format!("&after={}", last["id"].as_str().unwrap());
        }
        steps.reverse();
        steps
    }

    /// A greedy answer; `meanwhile` runs after the first piece.
    pub async fn stream(&self, model: &str, tokens: usize, meanwhile: impl FnOnce()) -> String {
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
