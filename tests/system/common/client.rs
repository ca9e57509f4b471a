//! What a client of the service does.

use super::{PATIENCE, until};
use reqwest::multipart::{Form, Part};
use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A client with its key.
pub struct Client {
    /// Ends in `/v1`.
    pub root: String,
    key: Option<String>,
    http: reqwest::Client,
}

/// An answer, whatever its status.
#[derive(Debug)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Its JSON.
    pub body: Value,
    /// From the request on.
    pub took: Duration,
}

impl Reply {
    /// What an error says.
    pub fn message(&self) -> &str {
        self.body["error"]["message"].as_str().unwrap_or_else(|| panic!("no error: {self:?}"))
    }

    /// The text of a chat's answer.
    pub fn text(&self) -> &str {
        assert_eq!(self.status, 200, "{self:?}");
        self.body["choices"][0]["message"]["content"].as_str().unwrap()
    }
}

impl Client {
    /// Of a server at `root`.
    pub fn new(root: String, key: Option<&str>) -> Self {
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { root, key: key.map(str::to_owned), http }
    }

    /// A request with its key.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.root));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// An answer in JSON to a request.
    pub async fn reply(&self, request: RequestBuilder) -> Reply {
        let asked = Instant::now();
        let reply = request.send().await.unwrap();
        let status = reply.status().as_u16();
        Reply { status, body: reply.json().await.unwrap(), took: asked.elapsed() }
    }

    /// `GET`, any status.
    pub async fn try_get(&self, path: &str) -> Reply {
        self.reply(self.request(Method::GET, path)).await
    }

    /// `GET` of what must be there.
    pub async fn get(&self, path: &str) -> Value {
        let reply = self.try_get(path).await;
        assert_eq!(reply.status, 200, "{path}: {reply:?}");
        reply.body
    }

    /// `GET` of whatever is not JSON.
    pub async fn bytes(&self, path: &str) -> Vec<u8> {
        let reply = self.request(Method::GET, path).send().await.unwrap();
        assert!(reply.status().is_success(), "{path}: {}", reply.status());
        reply.bytes().await.unwrap().to_vec()
    }

    /// `POST` of JSON, any status.
    pub async fn try_post(&self, path: &str, body: &Value) -> Reply {
        self.reply(self.request(Method::POST, path).json(body)).await
    }

    /// `POST` of JSON that must succeed.
    pub async fn post(&self, path: &str, body: &Value) -> Value {
        let reply = self.try_post(path, body).await;
        assert_eq!(reply.status, 200, "{path}: {reply:?}");
        reply.body
    }

    /// A chat that is answered whole, any status.
    pub async fn ask(&self, chat: &Value) -> Reply {
        self.try_post("/chat/completions", chat).await
    }

    /// A chat that is answered piece by piece; not read yet.
    pub async fn open_stream(&self, chat: &Value) -> Response {
        let mut chat = chat.clone();
        chat["stream"] = json!(true);
        let request = self.request(Method::POST, "/chat/completions").json(&chat);
        let reply = request.send().await.unwrap();
        assert!(reply.status().is_success(), "{}", reply.text().await.unwrap());
        reply
    }

    /// The text of a streamed answer; `meanwhile` runs after the first piece.
    pub async fn stream(&self, chat: &Value, meanwhile: impl FnOnce()) -> String {
        let mut reply = self.open_stream(chat).await;
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

    /// Uploads a training file; its id.
    pub async fn upload(&self, lines: String) -> String {
        let part = Part::bytes(lines.into_bytes()).file_name("t.jsonl");
        let form = Form::new().text("purpose", "fine-tune").part("file", part);
        let file = self.reply(self.request(Method::POST, "/files").multipart(form)).await;
        file.body["id"].as_str().unwrap_or_else(|| panic!("{file:?}")).to_owned()
    }

    /// Creates a job; its id.
    pub async fn create(&self, job: &Value) -> String {
        let job = self.post("/fine_tuning/jobs", job).await;
        job["id"].as_str().unwrap_or_else(|| panic!("{job}")).to_owned()
    }

    /// A job as it is now.
    pub async fn job(&self, id: &str) -> Value {
        self.get(&format!("/fine_tuning/jobs/{id}")).await
    }

    /// Asks to `pause`, `resume` or `cancel` a job, any status.
    pub async fn try_wish(&self, id: &str, wish: &str) -> Reply {
        self.try_post(&format!("/fine_tuning/jobs/{id}/{wish}"), &json!({})).await
    }

    /// The same, which must succeed.
    pub async fn wish(&self, id: &str, wish: &str) -> Value {
        self.post(&format!("/fine_tuning/jobs/{id}/{wish}"), &json!({})).await
    }

    /// Waits until a job has one of these states; panics when it ends in another.
    pub async fn wait_for(&self, id: &str, states: &[&str]) -> Value {
        let start = Instant::now();
        loop {
            let row = self.job(id).await;
            let status = row["status"].as_str().unwrap();
            if states.contains(&status) {
                return row;
            }
            let ended = ["failed", "cancelled", "succeeded"].contains(&status);
            assert!(!ended && start.elapsed() < PATIENCE, "{row}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until a job has succeeded; its row.
    pub async fn success(&self, id: &str) -> Value {
        self.wait_for(id, &["succeeded"]).await
    }

    /// All events of a job, oldest first.
    pub async fn events(&self, id: &str) -> Vec<Value> {
        let (mut events, mut after) = (Vec::new(), String::new());
        loop {
            let page = self.get(&format!("/fine_tuning/jobs/{id}/events?limit=1000{after}")).await;
            let data = page["data"].as_array().unwrap();
            events.extend(data.iter().cloned());
            let Some(last) = data.last().filter(|_| page["has_more"] == true) else { break };
            after = format!("&after={}", last["id"].as_str().unwrap());
        }
        events.reverse();
        events
    }

    /// Steps that a job's events tell of, in their order.
    pub async fn steps(&self, id: &str) -> Vec<u64> {
        let events = self.events(id).await;
        let metrics = events.iter().filter(|event| event["type"] == "metrics");
        metrics.map(|event| event["data"]["step"].as_u64().unwrap()).collect()
    }

    /// The files of a job's result, one after another.
    pub async fn content(&self, job: &Value) -> Vec<u8> {
        let model = job["fine_tuned_model"].as_str().unwrap();
        // The archive tells when they were made, too.
        let (archive, mut files) =
            (self.bytes(&format!("/adapters/{model}/content")).await, Vec::new());
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

    /// Waits until the server says that it has all it needs.
    pub async fn until_ready(&self) {
        let ready = async || self.try_get("/../readyz").await.status == 200;
        until("ready", async || ready().await.then_some(())).await;
    }

    /// Live workers.
    pub async fn workers(&self) -> Vec<Value> {
        let list = self.get("/workers").await;
        list["data"].as_array().unwrap().clone()
    }

    /// Waits until the live workers are as wanted.
    pub async fn until_workers(&self, what: &str, wanted: impl Fn(&[Value]) -> bool) {
        until(what, async || wanted(&self.workers().await).then_some(())).await;
    }
}
