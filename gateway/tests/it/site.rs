//! A gateway over a temporary data folder, and clients that hold every reply to the contract.

use std::sync::Arc;

use async_trait::async_trait;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Method, Request, header};
use axum::response::Response;
use gateway::{AdapterCheck, CheckRefusal, CheckedAdapter, Gateway, GatewayConfig};
use serde_json::{Value, json};
use storage::db::{NewAdapter, NewBase, Role};
use storage::queue::QueueLimits;
use storage::{Objects, Storage, objects::ObjectKey};
use tempfile::TempDir;
use tower::ServiceExt;

pub const BASE: &str = "b";
pub const PRINT: &str = "base-print";

pub struct Site {
    pub folder: TempDir,
    pub storage: Storage,
    pub gateway: Arc<Gateway>,
    pub app: Router,
}

/// Stands in for the worker crate's judgement, which needs a base's dimensions.
struct Judge;

#[async_trait]
impl AdapterCheck for Judge {
    async fn check(
        &self,
        _base: &str,
        config: Bytes,
        weights: Bytes,
    ) -> Result<CheckedAdapter, CheckRefusal> {
        let invalid = |param, message: &str| {
            Err(CheckRefusal::Invalid { param, message: message.to_owned() })
        };
        let Ok(parsed) = serde_json::from_slice::<Value>(&config) else {
            return invalid("config", "adapter_config.json is not JSON");
        };
        let Some(rank) = parsed["r"].as_i64() else {
            return invalid("config", "adapter_config.json has no 'r'");
        };
        Ok(CheckedAdapter {
            rank,
            alpha: 2.0 * rank as f64,
            use_rslora: false,
            target_modules: vec!["q_proj".to_owned()],
            device_bytes: weights.len() as i64,
            base_fingerprint: PRINT.to_owned(),
            config,
            weights,
        })
    }
}

/// A base as its worker announces it.
pub fn new_base(name: &str, fingerprint: &str) -> NewBase {
    NewBase {
        name: name.to_owned(),
        fingerprint: fingerprint.to_owned(),
        context: 1024,
        modules: json!({}),
    }
}

impl Site {
    /// With open access and one base, without a worker.
    pub async fn open() -> Site {
        Site::with(GatewayConfig { open_access: true, ..GatewayConfig::default() }).await
    }

    pub async fn with(config: GatewayConfig) -> Site {
        Site::with_limits(config, QueueLimits::default()).await
    }

    pub async fn with_limits(config: GatewayConfig, limits: QueueLimits) -> Site {
        let folder = tempfile::tempdir().unwrap();
        let storage = Storage::open_embedded_with(folder.path(), limits).await.unwrap();
        Site::over(folder, storage, config).await
    }

    /// With open access, its objects elsewhere.
    pub async fn with_objects(objects: Objects) -> Site {
        let folder = tempfile::tempdir().unwrap();
        let mut storage = Storage::open_embedded(folder.path()).await.unwrap();
        storage.objects = objects;
        let config = GatewayConfig { open_access: true, ..GatewayConfig::default() };
        Site::over(folder, storage, config).await
    }

    async fn over(folder: TempDir, storage: Storage, config: GatewayConfig) -> Site {
        storage.db.bases().upsert(&new_base(BASE, PRINT)).await.unwrap();
        let gateway = Gateway::start(storage.clone(), config, Arc::new(Judge)).await.unwrap();
        let app = gateway::app(Arc::clone(&gateway));
        Site { folder, storage, gateway, app }
    }

    pub fn client(&self) -> Client<'_> {
        Client { site: self, key: None }
    }

    /// Makes a key for an organization.
    pub async fn key(&self, org: &str, role: Role) -> Client<'_> {
        let (_, secret) = self.storage.db.keys().create(org, role).await.unwrap();
        Client { site: self, key: Some(secret) }
    }

    /// Records an adapter of `org` with some bytes for objects.
    pub async fn adapter(&self, org: &str, model: &str) -> String {
        let object = format!("adapters/imported/{}", storage::ids::alphanumerics(12));
        let adapter = NewAdapter {
            model: model.to_owned(),
            kind: "lora".to_owned(),
            base: BASE.to_owned(),
            base_fingerprint: PRINT.to_owned(),
            rank: 8,
            alpha: 16.0,
            use_rslora: false,
            target_modules: vec!["q_proj".to_owned()],
            bytes: 4096,
            version: 1,
            object: object.clone(),
        };
        let objects = &self.storage.objects;
        let config = ObjectKey::AdapterConfig { object: object.clone() };
        objects.put(&config, Bytes::from_static(b"{\"r\":8}")).await.unwrap();
        let weights = ObjectKey::AdapterWeights { object };
        objects.put(&weights, Bytes::from(vec![7; 1000])).await.unwrap();
        self.storage.db.adapters().insert(org, &adapter).await.unwrap().id
    }
}

pub struct Client<'a> {
    pub site: &'a Site,
    pub key: Option<String>,
}

pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self}"))
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.to_vec()).unwrap()
    }

    /// The object of a 200.
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{self}");
        self.json()
    }

    /// Status, code and param of a refusal.
    pub fn refusal(&self) -> (u16, Option<String>, Option<String>) {
        let error = &self.json()["error"];
        let text = |key: &str| error[key].as_str().map(str::to_owned);
        (self.status, text("code"), text("param"))
    }

    pub fn message(&self) -> String {
        self.json()["error"]["message"].as_str().unwrap().to_owned()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

impl std::fmt::Display for Reply {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} {}", self.status, String::from_utf8_lossy(&self.body))
    }
}

/// What every reply must have, whatever it is.
pub fn check_headers(headers: &HeaderMap) {
    assert!(headers["x-request-id"].to_str().unwrap().starts_with("req_"));
    headers["openai-processing-ms"].to_str().unwrap().parse::<u64>().unwrap();
    assert_eq!(headers["openai-version"], "2020-10-01");
    assert!(headers.contains_key("openai-organization"));
}

/// What every refusal must look like.
pub fn check_envelope(reply: &Reply) {
    assert_eq!(reply.headers[header::CONTENT_TYPE], "application/json", "{reply}");
    let body = reply.json();
    let keys: Vec<&String> = body["error"].as_object().expect("error").keys().collect();
    assert_eq!(keys, ["message", "type", "param", "code"], "{reply}");
    assert!(body["error"]["message"].is_string(), "{reply}");
    let code = &body["error"]["code"];
    assert!(code.is_string() || code.is_null(), "{reply}");
    match reply.headers.get(header::RETRY_AFTER) {
        Some(value) => {
            let secs: u64 = value.to_str().unwrap().parse().unwrap();
            assert!((1..=60).contains(&secs), "{reply}");
        }
        None => assert!(reply.status != 503 && reply.status != 429, "{reply}"),
    }
}

impl Client<'_> {
    pub fn request(&self, method: &str, path: &str) -> axum::http::request::Builder {
        let method: Method = method.parse().unwrap();
        let builder =
            Request::builder().method(method).uri(path).header(header::HOST, "127.0.0.1:8000");
        match &self.key {
            Some(key) => builder.header(header::AUTHORIZATION, format!("Bearer {key}")),
            None => builder,
        }
    }

    /// The reply before its body is read.
    pub async fn raw(&self, request: Request<Body>) -> Response {
        let response = self.site.app.clone().oneshot(request).await.unwrap();
        check_headers(response.headers());
        response
    }

    pub async fn send(&self, request: Request<Body>) -> Reply {
        let head = *request.method() == Method::HEAD;
        let response = self.raw(request).await;
        let status = response.status().as_u16();
        let headers = response.headers().clone();
        let body = axum::body::to_bytes(response.into_body(), 1 << 30).await.unwrap();
        let reply = Reply { status, headers, body };
        if status >= 300 && !head {
            check_envelope(&reply);
        }
        reply
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send(self.request("GET", path).body(Body::empty()).unwrap()).await
    }

    pub async fn delete(&self, path: &str) -> Reply {
        self.send(self.request("DELETE", path).body(Body::empty()).unwrap()).await
    }

    /// As SDKs send an action without a body.
    pub async fn post_empty(&self, path: &str) -> Reply {
        let request = self.request("POST", path).header(header::CONTENT_TYPE, "application/json");
        self.send(request.body(Body::empty()).unwrap()).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Reply {
        self.post_text(path, &body.to_string()).await
    }

    pub async fn post_text(&self, path: &str, body: &str) -> Reply {
        let request = self.request("POST", path);
        self.send(request.body(Body::from(body.to_owned())).unwrap()).await
    }

    pub async fn chat(&self, extra: Value) -> Reply {
        self.post("/v1/chat/completions", chat_body(extra)).await
    }

    /// Uploads a form of (name, filename, content) parts.
    pub async fn upload(&self, path: &str, parts: &[(&str, Option<&str>, &[u8])]) -> Reply {
        let request = self
            .request("POST", path)
            .header(header::CONTENT_TYPE, "multipart/form-data; boundary=XX");
        self.send(request.body(Body::from(form(parts))).unwrap()).await
    }

    /// Uploads a training file; returns its id.
    pub async fn training_file(&self) -> String {
        let parts: [(&str, Option<&str>, &[u8]); 2] =
            [("purpose", None, b"fine-tune"), ("file", Some("t.jsonl"), b"{\"messages\":[]}\n")];
        self.upload("/v1/files", &parts).await.ok()["id"].as_str().unwrap().to_owned()
    }
}

pub fn form(parts: &[(&str, Option<&str>, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, filename, content) in parts {
        body.extend_from_slice(
            format!("--XX\r\nContent-Disposition: form-data; name=\"{name}\"").as_bytes(),
        );
        if let Some(filename) = filename {
            body.extend_from_slice(format!("; filename=\"{filename}\"").as_bytes());
        }
        body.extend_from_slice(b"\r\n\r\n");
        body.extend_from_slice(content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(b"--XX--\r\n");
    body
}

/// A good chat request with some fields replaced or added; null removes.
pub fn chat_body(extra: Value) -> Value {
    let mut body = json!({"model": BASE, "messages": [{"role": "user", "content": "hello"}]});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}
