//! A real server process over a tiny base, for whole-system tests.

// Each test binary uses a part of this.
#![allow(dead_code, clippy::unwrap_used)]

pub mod cluster;
pub mod processes;
pub mod proxy;
pub mod site;

use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for anything.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A running `loquetier serve`; killed when dropped.
pub struct Server {
    process: Child,
    /// Ends in `/v1`.
    pub root: String,
    http: reqwest::Client,
}

impl Server {
    /// Starts a server and waits until it is ready.
    pub async fn start(base: &Path, data: &Path) -> Self {
        Self::start_with(base, data, &[]).await
    }

    /// The same, with further flags.
    pub async fn start_with(base: &Path, data: &Path, flags: &[&str]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_loquetier"))
            .args(["serve", "--device", "cpu", "--served-model-name", "tiny"])
            .args(["--listen", "127.0.0.1:0", "--log", "info"])
            .arg("--base-model")
            .arg(base)
            .arg("--data-dir")
            .arg(data)
            .args(flags)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut seen = String::new();
        let root = loop {
            let Some(line) = lines.next() else { panic!("the server ended: {seen}") };
            let line = line.unwrap();
            if let Some((_, rest)) = line.split_once(" at http://") {
                break format!("http://{}", rest.split([',', ' ']).next().unwrap());
            }
            seen.push_str(&line);
            seen.push('\n');
        };
        // The pipe has to be read, or the server would block on a full one.
        std::thread::spawn(move || lines.for_each(drop));
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { process, root, http }
    }

    /// Kills the process as a power cut would.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Asks it to end, and waits.
    pub fn terminate(&mut self) -> bool {
        let id = self.process.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        self.process.wait().unwrap().success()
    }

    /// `GET`, any status.
    pub async fn try_get(&self, path: &str) -> Option<Value> {
        let reply = self.http.get(format!("{}{path}", self.root)).send().await.ok()?;
        reply.json().await.ok()
    }

    /// `GET` of what must be there.
    pub async fn get(&self, path: &str) -> Value {
        self.try_get(path).await.unwrap_or_else(|| panic!("GET {path} failed"))
    }

    /// `POST` of JSON; panics on an error reply.
    pub async fn post(&self, path: &str, body: &Value) -> Value {
        let reply = self.http.post(format!("{}{path}", self.root)).json(body).send().await;
        let reply = reply.unwrap();
        let status = reply.status();
        let body: Value = reply.json().await.unwrap();
        assert!(status.is_success(), "{path}: {status} {body}");
        body
    }

    /// Uploads a training file and returns its id.
    pub async fn upload(&self, lines: &str) -> String {
        let part = reqwest::multipart::Part::bytes(lines.as_bytes().to_vec()).file_name("t.jsonl");
        let form = reqwest::multipart::Form::new().text("purpose", "fine-tune").part("file", part);
        let request = self.http.post(format!("{}/files", self.root)).multipart(form);
        let file: Value = request.send().await.unwrap().json().await.unwrap();
        file["id"].as_str().unwrap_or_else(|| panic!("{file}")).to_owned()
    }

    /// Waits until a job has one of these states; panics when it ends in another.
    pub async fn wait_for(&self, job: &str, states: &[&str]) -> Value {
        let start = Instant::now();
        loop {
            let row = self.get(&format!("/fine_tuning/jobs/{job}")).await;
            let status = row["status"].as_str().unwrap_or_default().to_owned();
            if states.contains(&status.as_str()) {
                return row;
            }
            let ended = ["failed", "cancelled", "succeeded"].contains(&status.as_str());
            assert!(!ended, "{row}");
            assert!(start.elapsed() < PATIENCE, "still {status}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// All events of a job, oldest first.
    pub async fn events(&self, job: &str) -> Vec<Value> {
        let (mut events, mut after) = (Vec::new(), String::new());
        loop {
            let path = format!("/fine_tuning/jobs/{job}/events?limit=1000{after}");
            let page = self.get(&path).await;
            let data = page["data"].as_array().unwrap();
            events.extend(data.iter().cloned());
            match (page["has_more"].as_bool(), data.last()) {
                (Some(true), Some(last)) => {
                    after = format!("&after={}", last["id"].as_str().unwrap());
                }
                _ => break,
            }
        }
        events.reverse();
        events
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A two-layer base with random weights and the demo base's tokenizer.
pub fn tiny_base(folder: &Path) -> PathBuf {
    let base = folder.join("tiny");
    std::fs::create_dir_all(&base).unwrap();
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/base");
    for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        std::fs::copy(demo.join(file), base.join(file)).unwrap();
    }
    std::fs::copy(demo.join("generation_config.json"), base.join("generation_config.json"))
        .unwrap();
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(demo.join("config.json")).unwrap()).unwrap();
    let (hidden, ffn, layers, vocab) = (32, 64, 2, 4096);
    let sizes = [
        ("hidden_size", hidden),
        ("intermediate_size", ffn),
        ("num_hidden_layers", layers),
        ("num_attention_heads", 2),
        ("num_key_value_heads", 1),
        ("head_dim", 16),
    ];
    for (field, value) in sizes {
        config[field] = json!(value);
    }
    std::fs::write(base.join("config.json"), config.to_string()).unwrap();
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    for layer in 0..layers {
        let shapes = [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![32, hidden]),
            ("self_attn.k_proj", vec![16, hidden]),
            ("self_attn.v_proj", vec![16, hidden]),
            ("self_attn.o_proj", vec![hidden, 32]),
            ("mlp.gate_proj", vec![ffn, hidden]),
            ("mlp.up_proj", vec![ffn, hidden]),
            ("mlp.down_proj", vec![hidden, ffn]),
        ];
        for (name, shape) in shapes {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    std::fs::write(base.join("model.safetensors"), safetensors_of(&tensors)).unwrap();
    base
}

/// Random f32 tensors; norms are ones.
fn safetensors_of(tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
    let (mut header, mut bytes) = (serde_json::Map::new(), Vec::new());
    let mut state = 1_u64;
    for (name, shape) in tensors {
        let start = bytes.len();
        for _ in 0..shape.iter().product::<usize>() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let uniform = (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5;
            let value = if shape.len() == 1 { 1.0 } else { uniform * 0.3 };
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, bytes.len()]});
        header.insert(name.clone(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(bytes);
    file
}

/// A chat training file of `n` short examples.
pub fn chat_file(n: usize) -> String {
    let line = |i: usize| {
        let question = format!("What is {i} and {}?", i % 7);
        let answer = format!("It is {}.", i + i % 7);
        let messages = json!([
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]);
        json!({"messages": messages}).to_string() + "\n"
    };
    (0..n).map(line).collect()
}
