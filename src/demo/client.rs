//! What the demonstration asks the server over HTTP, as any client would.

use anyhow::{Context, bail};
use futures::StreamExt;
use serde_json::{Value, json};
use std::time::Duration;

/// Longest answer asked for.
const MAX_TOKENS: u32 = 64;
/// Longest wait for any reply.
const REPLY_WAIT: Duration = Duration::from_secs(120);

/// A client of one server.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    root: String,
}

impl Client {
    /// `root` ends in `/v1`.
    pub fn new(root: String) -> anyhow::Result<Self> {
        Ok(Self { http: reqwest::Client::builder().no_proxy().build()?, root })
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> anyhow::Result<Value> {
        let reply = request.timeout(REPLY_WAIT).send().await?;
        let status = reply.status();
        let body: Value = reply.json().await.context("the reply is not JSON")?;
        if !status.is_success() {
            bail!("{status}: {}", body["error"]["message"].as_str().unwrap_or("no message"));
        }
        Ok(body)
    }

    async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.send(self.http.get(format!("{}{path}", self.root))).await
    }

    /// Uploads a training file; returns its id.
    pub async fn upload(&self, name: &str, bytes: &'static [u8]) -> anyhow::Result<String> {
        let part = reqwest::multipart::Part::bytes(bytes).file_name(name.to_owned());
        let form = reqwest::multipart::Form::new().text("purpose", "fine-tune").part("file", part);
        let request = self.http.post(format!("{}/files", self.root)).multipart(form);
        text(&self.send(request).await?, "id")
    }

    /// Creates a job; returns its id.
    pub async fn create_job(&self, job: &Value) -> anyhow::Result<String> {
        let request = self.http.post(format!("{}/fine_tuning/jobs", self.root)).json(job);
        text(&self.send(request).await?, "id")
    }

    /// A job as it is.
    pub async fn job(&self, id: &str) -> anyhow::Result<Value> {
        self.get(&format!("/fine_tuning/jobs/{id}")).await
    }

    /// The newest metrics of a job: step, steps in all, loss.
    pub async fn progress(&self, id: &str) -> anyhow::Result<Option<(u64, u64, f64)>> {
        let events = self.get(&format!("/fine_tuning/jobs/{id}/events?limit=5")).await?;
        let newest = events["data"].as_array().and_then(|events| {
            events.iter().find(|event| event["type"] == "metrics").map(|event| &event["data"])
        });
        Ok(newest.and_then(|data| {
            let number = |name: &str| data[name].as_u64();
            Some((number("step")?, number("total_steps")?, data["train_loss"].as_f64()?))
        }))
    }

    fn question(model: &str, prompt: &str, stream: bool) -> Value {
        json!({
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "stream": stream,
        })
    }

    /// A whole answer.
    pub async fn ask(&self, model: &str, prompt: &str) -> anyhow::Result<String> {
        let request = self.http.post(format!("{}/chat/completions", self.root));
        let reply = self.send(request.json(&Self::question(model, prompt, false))).await?;
        text(&reply["choices"][0]["message"], "content")
    }

    /// Streams an answer; returns the number of chunks with text.
    pub async fn stream(&self, model: &str, prompt: &str) -> anyhow::Result<usize> {
        let request = self.http.post(format!("{}/chat/completions", self.root));
        let reply = request.json(&Self::question(model, prompt, true)).send().await?;
        let mut bytes = reply.error_for_status()?.bytes_stream();
        let (mut rest, mut chunks) = (Vec::new(), 0);
        while let Some(part) = bytes.next().await {
            rest.extend_from_slice(&part?);
            while let Some(end) = rest.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = rest.drain(..end + 2).collect();
                let Some(data) = event.strip_prefix(b"data: ") else { continue };
                let chunk: Value = serde_json::from_slice(data).unwrap_or(Value::Null);
                let content = chunk["choices"][0]["delta"]["content"].as_str();
                chunks += usize::from(content.is_some_and(|content| !content.is_empty()));
            }
        }
        Ok(chunks)
    }
}

fn text(value: &Value, field: &str) -> anyhow::Result<String> {
    let text = value[field].as_str().with_context(|| format!("the reply has no '{field}'"))?;
    Ok(text.to_owned())
}
