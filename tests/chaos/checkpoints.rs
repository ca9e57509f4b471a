//! What the checkpoints of a job answer: as those of a calm day, also when they are read anew from
//! the object store.

use super::clients::Client;
use super::jobs::get;
use futures::{StreamExt, TryStreamExt};
use reqwest::Method;
use serde_json::{Value, json};

/// Asked at once.
const AT_ONCE: usize = 6;

/// A checkpoint's first tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    step: u64,
    /// With log-probabilities.
    choice: Value,
}

impl Sample {
    /// What differs between those of a job and those of a calm day; nothing if all is equal.
    pub fn difference(samples: &[Sample], calm: &[Sample]) -> Option<String> {
        let steps = |samples: &[Sample]| samples.iter().map(|one| one.step).collect::<Vec<_>>();
        let (is, should) = (steps(samples), steps(calm));
        if is != should {
            return Some(format!("checkpoints at the steps {is:?}, not {should:?}"));
        }
        let (is, should) = samples.iter().zip(calm).find(|(is, should)| is != should)?;
        Some(format!("a checkpoint answers {is:?}, not {should:?}"))
    }
}

/// Has all workers let go of each of a job's checkpoints, and asks it once.
pub async fn samples(client: &Client, root: &str, job: &str) -> Result<Vec<Sample>, String> {
    let page = get(client, &format!("{root}/fine_tuning/jobs/{job}/checkpoints?limit=100")).await?;
    let checkpoints = page["data"].as_array().cloned().ok_or("no checkpoints")?;
    if checkpoints.is_empty() || page["has_more"] == true {
        return Err(format!("{job} has {} checkpoints and more", checkpoints.len()));
    }
    let asked = checkpoints.into_iter().map(|checkpoint| async move {
        let model = checkpoint["fine_tuned_model_checkpoint"].as_str().ok_or("no model")?;
        let step = checkpoint["step_number"].as_u64().ok_or("no step")?;
        let name = model.replace(':', "%3A");
        let evicted = post(client, &format!("{root}/adapters/{name}/evict"), &json!({})).await?;
        if evicted["workers"].as_array().is_none_or(|workers| !workers.is_empty()) {
            return Err(format!("{model} is still held: {evicted}"));
        }
        let body = json!({
            "model": model,
            "prompt": "What is 3 and 4?",
            "max_tokens": 6,
            "ignore_eos": true,
            "temperature": 0,
            "logprobs": 2,
        });
        let answer = post(client, &format!("{root}/completions"), &body).await?;
        Ok(Sample { step, choice: answer["choices"][0].clone() })
    });
    futures::stream::iter(asked).buffered(AT_ONCE).try_collect().await
}

async fn post(client: &Client, url: &str, body: &Value) -> Result<Value, String> {
    let reply = client.request(Method::POST, url).json(body).send().await;
    let reply = reply.map_err(|error| format!("{url}: {error}"))?;
    let status = reply.status();
    let text = reply.text().await.map_err(|error| format!("{url}: {error}"))?;
    if !status.is_success() {
        return Err(format!("{url}: {status}: {text}"));
    }
    serde_json::from_str(&text).map_err(|error| format!("{url}: {error}"))
}
