//! Clients of the service: what they ask, how they read a stream, and the answers of a calm day.

use futures::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A stream that has not ended by then hangs.
pub const BOUND: Duration = Duration::from_secs(60);

/// A request that is asked again and again.
#[derive(Clone, Debug)]
pub struct Case {
    /// Below `/v1`.
    pub path: &'static str,
    /// The body.
    pub body: Value,
}

impl Case {
    /// Name of the model that it asks.
    pub fn model(&self) -> &str {
        self.body["model"].as_str().unwrap()
    }
}

/// Sixteen different requests: greedy and seeded, of the base and of adapters, one choice and
/// two, chat and plain completions, with log-probabilities, penalties and stop texts.
pub fn cases(models: &[String]) -> Vec<Case> {
    let names = ["tiny"].into_iter().chain(models.iter().map(String::as_str));
    let models: Vec<&str> = names.collect();
    (0..16).map(|at| case(at, models[at % models.len()])).collect()
}

/// A greedy request of whatever a job has published last.
pub fn live_case(job: &str) -> Case {
    let body = json!({
        "model": job,
        "max_tokens": 200,
        "ignore_eos": true,
        "temperature": 0,
        "stream": true,
        "stream_options": {"include_usage": true},
        "messages": [{"role": "user", "content": "What is 5 and 6?"}],
    });
    Case { path: "/chat/completions", body }
}

fn case(at: usize, model: &str) -> Case {
    let question = format!("What is {at} and {}?", at * at);
    let mut body = json!({
        "model": model,
        "max_tokens": 160 + 40 * (at % 7),
        "ignore_eos": true,
        "n": 1 + usize::from(at.is_multiple_of(3)),
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    if at.is_multiple_of(2) {
        body["temperature"] = json!(0);
    } else {
        body["temperature"] = json!(0.8);
        body["top_p"] = json!(0.9);
        body["seed"] = json!(1000 + at);
    }
    if at % 5 == 1 {
        body["presence_penalty"] = json!(0.4);
        body["frequency_penalty"] = json!(0.3);
    }
    if at % 8 == 7 {
        body["stop"] = json!(["qqq", "the end of it"]);
    }
    if at % 4 == 3 {
        body["prompt"] = json!(question);
        return Case { path: "/completions", body };
    }
    if at % 8 == 2 {
        body["logprobs"] = json!(true);
        body["top_logprobs"] = json!(2);
    }
    body["messages"] = json!([{"role": "user", "content": question}]);
    Case { path: "/chat/completions", body }
}

/// What came of one choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choice {
    /// All its text.
    pub text: String,
    /// All its log-probabilities, as they were written.
    pub logprobs: Vec<Value>,
    /// Why it ended.
    pub finish: Option<String>,
}

/// What has come of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// By index.
    pub choices: Vec<Choice>,
    /// Tokens of the prompt and of the answer.
    pub usage: Option<(u64, u64)>,
    /// Names the weights; in every chunk the same.
    pub fingerprint: String,
}

impl Answer {
    /// Whether all of this is the beginning of another.
    pub fn begins(&self, whole: &Answer) -> bool {
        let same = self.choices.is_empty() || self.fingerprint == whole.fingerprint;
        same && self.choices.len() <= whole.choices.len()
            && self.choices.iter().zip(&whole.choices).all(|(part, whole)| {
                whole.text.starts_with(&part.text)
                    && whole.logprobs.starts_with(&part.logprobs)
                    && (part.finish.is_none() || part == whole)
            })
    }

    fn take(&mut self, event: &Value) {
        let fingerprint = event["system_fingerprint"].as_str().unwrap_or_default();
        if self.fingerprint.is_empty() {
            fingerprint.clone_into(&mut self.fingerprint);
        }
        assert_eq!(self.fingerprint, fingerprint, "{event}");
        if let Some(usage) = event["usage"].as_object() {
            let count = |name: &str| usage[name].as_u64().unwrap();
            self.usage = Some((count("prompt_tokens"), count("completion_tokens")));
        }
        for chunk in event["choices"].as_array().into_iter().flatten() {
            let index = chunk["index"].as_u64().unwrap() as usize;
            if self.choices.len() <= index {
                self.choices.resize(index + 1, Choice::default());
            }
            let choice = &mut self.choices[index];
            let text = chunk["delta"]["content"].as_str().or(chunk["text"].as_str());
            choice.text.push_str(text.unwrap_or_default());
            let logprobs = chunk["logprobs"]["content"].as_array();
            choice.logprobs.extend(logprobs.into_iter().flatten().cloned());
            if let Some(finish) = chunk["finish_reason"].as_str() {
                choice.finish = Some(finish.to_owned());
            }
        }
    }
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
pub enum How {
    /// With `[DONE]`.
    Whole,
    /// With an error: its status (200 where the stream had begun) and its message.
    Error(u16, String),
    /// Nobody took the connection.
    Refused(String),
    /// The connection broke.
    Broken(String),
    /// Not within [`BOUND`].
    Hung,
}

/// What a request asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A case, by its number.
    Case(usize),
    /// The model of a running job, by its number.
    Live(usize),
}

/// One request from its beginning to its end.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Which gateway was asked.
    pub gateway: usize,
    /// What was asked.
    pub asked: Asked,
    /// When it was sent.
    pub from: Instant,
    /// When its reply began with 200.
    pub admitted: Option<Instant>,
    /// When it ended.
    pub until: Instant,
    /// What had come by then.
    pub answer: Answer,
    /// How it ended.
    pub how: How,
    /// `x-request-id`, for the logs.
    pub id: String,
}

/// Asks gateways.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    /// An operator's.
    pub key: String,
}

impl Client {
    /// With a key.
    pub fn new(key: String) -> Self {
        // Every request on a connection of its own: one that idled while its gateway was killed
        // says nothing about the next gateway.
        let http = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0);
        Self { http: http.build().unwrap(), key }
    }

    /// A request with the key.
    pub fn request(&self, method: Method, url: &str) -> reqwest::RequestBuilder {
        self.http.request(method, url).bearer_auth(&self.key)
    }

    /// Asks a case once; never tries again.
    pub async fn ask(&self, (gateway, root): (usize, &str), asked: Asked, case: &Case) -> Ended {
        let from = Instant::now();
        let mut ended = Ended {
            gateway,
            asked,
            from,
            admitted: None,
            until: from,
            answer: Answer::default(),
            how: How::Hung,
            id: String::new(),
        };
        let url = format!("{root}{}", case.path);
        let stream = self.stream(&url, case, &mut ended);
        let how = tokio::time::timeout(BOUND, stream).await;
        Ended { how: how.unwrap_or(How::Hung), until: Instant::now(), ..ended }
    }

    /// JSON of a reply; how it ended where there is none.
    pub async fn reply(&self, method: Method, url: &str, body: &Value) -> Result<Value, How> {
        let mut request = self.request(method, url);
        if !body.is_null() {
            request = request.json(body);
        }
        let reply = request.send().await.map_err(|error| lost(&error))?;
        let status = reply.status().as_u16();
        let body: Value = reply.json().await.map_err(|error| lost(&error))?;
        if status == 200 { Ok(body) } else { Err(How::Error(status, message(&body["error"]))) }
    }

    async fn stream(&self, url: &str, case: &Case, ended: &mut Ended) -> How {
        let sent = self.request(Method::POST, url).json(&case.body).send().await;
        let reply = match sent {
            Ok(reply) => reply,
            Err(error) => return lost(&error),
        };
        if let Some(header) = reply.headers().get("x-request-id") {
            ended.id = header.to_str().unwrap_or_default().to_owned();
        }
        let status = reply.status().as_u16();
        if status != 200 {
            return match reply.json::<Value>().await {
                Ok(body) => How::Error(status, message(&body["error"])),
                Err(error) => lost(&error),
            };
        }
        ended.admitted = Some(Instant::now());
        let (mut bytes, mut chunks) = (Vec::new(), reply.bytes_stream());
        while let Some(chunk) = chunks.next().await {
            match chunk {
                Ok(chunk) => bytes.extend_from_slice(&chunk),
                Err(error) => return lost(&error),
            }
            while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = bytes.drain(..=end).collect();
                let line = String::from_utf8(line).unwrap();
                let Some(event) = line.trim().strip_prefix("data: ") else { continue };
                if event == "[DONE]" {
                    return How::Whole;
                }
                let event: Value = serde_json::from_str(event).unwrap();
                if event["error"].is_object() {
                    return How::Error(status, message(&event["error"]));
                }
                ended.answer.take(&event);
            }
        }
        How::Broken("it ended without [DONE] and without an error".to_owned())
    }
}

fn message(error: &Value) -> String {
    error["message"].as_str().unwrap_or("no message").to_owned()
}

fn lost(error: &reqwest::Error) -> How {
    let cause = root_cause(error);
    if error.is_connect() { How::Refused(cause) } else { How::Broken(cause) }
}

fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
