//! Fine-tuning jobs with fixed seeds, and everything of them that must not depend on what happened
//! to the service meanwhile.

use super::clients::Client;
use super::common::chat_file;
use super::schedule::JOBS;
use reqwest::Method;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Between two looks at a job.
const LOOK: Duration = Duration::from_millis(200);
/// A job on a calm service has done its first step so long after it was made.
const PUBLISHED_WITHIN: Duration = Duration::from_secs(30);
/// Everything in a tar archive comes in blocks of this many bytes.
const BLOCK_BYTES: usize = 512;

/// What a job left behind.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Bytes of the adapter's tensors.
    pub weights: Vec<u8>,
    /// The adapter's configuration.
    pub config: Value,
    /// `step_metrics.csv`.
    pub metrics: String,
    /// Messages of its events; drawn names are left out.
    pub events: Vec<String>,
}

impl Outcome {
    /// What differs from another; nothing if all is equal.
    pub fn difference(&self, calm: &Outcome) -> Option<String> {
        if self == calm {
            return None;
        }
        let mut parts = Vec::new();
        if self.weights != calm.weights {
            let differing = self.weights.iter().zip(&calm.weights).filter(|(a, b)| a != b).count();
            let (is, should) = (self.weights.len(), calm.weights.len());
            parts.push(format!("{differing} bytes of the weights ({is}, {should})"));
        }
        if self.config != calm.config {
            parts.push(format!("the configuration: {} not {}", self.config, calm.config));
        }
        if self.metrics != calm.metrics {
            let mut pairs = self.metrics.lines().zip(calm.metrics.lines());
            let first = pairs.find(|(a, b)| a != b);
            let (is, should) = (self.metrics.lines().count(), calm.metrics.lines().count());
            parts.push(format!("step_metrics.csv: {is} lines, not {should}, first {first:?}"));
        }
        if self.events != calm.events {
            let mut pairs = self.events.iter().zip(&calm.events);
            let first = pairs.find(|(a, b)| a != b);
            let (is, should) = (self.events.len(), calm.events.len());
            parts.push(format!("events: {is} not {should}, first {first:?}"));
        }
        Some(parts.join("; "))
    }
}

/// The jobs: three shapes, each its own seed, file and schedule; with their examples.
pub fn bodies() -> [(Value, usize); JOBS] {
    let job = |seed: u64, epochs: u64, lora: Value, training: Value| {
        json!({
            "model": "tiny",
            "seed": seed,
            "hyperparameters": {"n_epochs": epochs, "batch_size": 4},
            "lora": lora,
            "training": training,
        })
    };
    [
        (job(11, 10, json!({"rank": 4}), json!({"checkpoint_every_steps": 7})), 800),
        (
            job(
                12,
                8,
                json!({"rank": 8, "dropout": 0.1, "use_rslora": true}),
                json!({"checkpoint_every_steps": 10, "lr_scheduler": "cosine"}),
            ),
            1200,
        ),
        (
            job(
                13,
                20,
                json!({"rank": 4, "init": "gaussian", "target_modules": ["q_proj", "v_proj"]}),
                json!({"checkpoint_every_steps": 5, "weight_decay": 0.01}),
            ),
            450,
        ),
    ]
}

/// A job that outlasts a storm: it is cancelled. One epoch, so it lists nothing before its end.
pub fn doomed() -> (Value, usize) {
    let body = json!({
        "model": "tiny",
        "seed": 14,
        "hyperparameters": {"n_epochs": 1, "batch_size": 2},
        "lora": {"rank": 4},
        "training": {"checkpoint_every_steps": 25},
    });
    (body, 12_000)
}

/// Uploads their files and makes jobs; their ids.
pub async fn create(
    client: &Client,
    root: &str,
    jobs: impl IntoIterator<Item = (Value, usize)>,
) -> Vec<String> {
    let mut ids = Vec::new();
    for (mut body, examples) in jobs {
        let lines = chat_file(examples).into_bytes();
        let part = reqwest::multipart::Part::bytes(lines).file_name("t.jsonl");
        let form = reqwest::multipart::Form::new().text("purpose", "fine-tune").part("file", part);
        let request = client.request(Method::POST, &format!("{root}/files")).multipart(form);
        let file: Value = request.send().await.unwrap().json().await.unwrap();
        body["training_file"] = file["id"].clone();
        let request = client.request(Method::POST, &format!("{root}/fine_tuning/jobs")).json(&body);
        let job: Value = request.send().await.unwrap().json().await.unwrap();
        ids.push(job["id"].as_str().unwrap_or_else(|| panic!("{job}")).to_owned());
    }
    ids
}

/// Waits until a job has weights to answer with: its first steps are done.
pub async fn published(client: &Client, root: &str, id: &str) {
    let start = Instant::now();
    let url = format!("{root}/fine_tuning/jobs/{id}/events?limit=1");
    while start.elapsed() < PUBLISHED_WITHIN {
        let page = get(client, &url).await.unwrap();
        if page["data"][0]["message"].as_str().is_some_and(|told| told.starts_with("Step ")) {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
    panic!("{id} does not begin");
}

/// Waits until a job has succeeded.
pub async fn finish(
    client: &Client,
    root: &str,
    id: &str,
    within: Duration,
) -> Result<Value, String> {
    let start = Instant::now();
    loop {
        let row = get(client, &format!("{root}/fine_tuning/jobs/{id}")).await?;
        match row["status"].as_str() {
            Some("succeeded") => return Ok(row),
            Some("failed" | "cancelled") => return Err(format!("{id}: {row}")),
            _ if start.elapsed() > within => return Err(format!("{id} is not over: {row}")),
            _ => tokio::time::sleep(LOOK).await,
        }
    }
}

/// Whether a job is still what it was cancelled to be.
pub async fn cancelled(client: &Client, root: &str, id: &str) -> Result<(), String> {
    let row = get(client, &format!("{root}/fine_tuning/jobs/{id}")).await?;
    let over = row["status"] == "cancelled" && row["fine_tuned_model"].is_null();
    if over { Ok(()) } else { Err(format!("{id} was cancelled and is {row}")) }
}

/// Everything that is to be equal of a job that has succeeded.
pub async fn outcome(client: &Client, root: &str, job: &Value) -> Result<Outcome, String> {
    let id = job["id"].as_str().unwrap();
    let model = job["fine_tuned_model"].as_str().ok_or("a job without a model")?;
    let name = model.replace(':', "%3A");
    let archive = bytes(client, &format!("{root}/adapters/{name}/content")).await?;
    let file = job["result_files"][0].as_str().ok_or("a job without a result file")?;
    let metrics = bytes(client, &format!("{root}/files/{file}/content")).await?;
    let config = entry(&archive, "adapter_config.json").ok_or("no configuration")?;
    Ok(Outcome {
        weights: entry(&archive, "adapter_model.safetensors").ok_or("no weights")?.to_vec(),
        config: serde_json::from_slice(config).map_err(|error| error.to_string())?,
        metrics: String::from_utf8(metrics).map_err(|error| error.to_string())?,
        events: events(client, root, id).await?,
    })
}

async fn events(client: &Client, root: &str, id: &str) -> Result<Vec<String>, String> {
    let (mut messages, mut after) = (Vec::new(), String::new());
    loop {
        let path = format!("{root}/fine_tuning/jobs/{id}/events?limit=100{after}");
        let page = get(client, &path).await?;
        for event in page["data"].as_array().ok_or("no events")? {
            let message = event["message"].as_str().unwrap_or_default();
            after = format!("&after={}", event["id"].as_str().unwrap_or_default());
            // Of these there are as many as somebody wished.
            if ["The job has been paused", "The job has been resumed"].contains(&message) {
                continue;
            }
            // Ids and names of models are drawn anew.
            let drawn = ["ft:", "ftjob-", "file-"].iter().filter_map(|id| message.find(id)).min();
            let fixed = &message[..drawn.unwrap_or(message.len())];
            messages.push(format!("{fixed}{}", event["data"]));
        }
        if page["has_more"] != true {
            messages.reverse();
            // Steps do not wait for a checkpoint that the store does not take yet: each kind of
            // event keeps its order, and the kinds may come apart.
            messages.sort_by_key(|message| !message.starts_with("Checkpoint created"));
            return Ok(messages);
        }
    }
}

/// JSON of a path that must be there.
pub async fn get(client: &Client, url: &str) -> Result<Value, String> {
    let body = bytes(client, url).await?;
    serde_json::from_slice(&body).map_err(|error| format!("{url}: {error}"))
}

/// Bytes of a path that must be there.
pub async fn bytes(client: &Client, url: &str) -> Result<Vec<u8>, String> {
    let reply = client.request(Method::GET, url).send().await;
    let reply = reply.map_err(|error| format!("{url}: {error}"))?;
    let status = reply.status();
    let body = reply.bytes().await.map_err(|error| format!("{url}: {error}"))?;
    if !status.is_success() {
        return Err(format!("{url}: {status}: {}", String::from_utf8_lossy(&body)));
    }
    Ok(body.to_vec())
}

/// A file of a tar archive.
fn entry<'a>(archive: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let text = |bytes: &[u8]| {
        String::from_utf8_lossy(bytes).trim_end_matches(['\0', ' ']).trim().to_owned()
    };
    let mut at = 0;
    while let Some(head) = archive.get(at..at + BLOCK_BYTES) {
        let size = usize::from_str_radix(&text(&head[124..136]), 8).ok()?;
        let content = at + BLOCK_BYTES;
        if text(&head[..100]) == name {
            return archive.get(content..content + size);
        }
        at = content + size.next_multiple_of(BLOCK_BYTES);
    }
    None
}
