//! The production form while a part of it is away: an import where no worker is alive, a base of
//! the same name and other weights, Postgres silent and gone. Needs the servers that `./dev test`
//! names.

#![allow(clippy::unwrap_used)]

mod common;
#[allow(dead_code, reason = "it fails in more ways than are needed here")]
#[path = "../../storage/tests/conformance/proxy.rs"]
mod proxy;

use common::processes::{Gateway, loquetier, stores, worker};
use common::{PATIENCE, tiny_base};
use proxy::{Fault, Proxy};
use reqwest::Method;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};
use worker::adapters::{AdapterLayout, AdapterShape, peft};
use worker::base::{BaseFiles, ModuleDims};

/// Migrated stores, and a key. Tests that run at once must not see each other's workers: each has a
/// database of its own in Redis.
fn prepared(redis_database: u8) -> Option<(Vec<String>, String)> {
    let mut stores = stores()?;
    let joint = if stores[3].starts_with("redis+unix:") { "?db=" } else { "/" };
    stores[3] = format!("{}{joint}{redis_database}", stores[3]);
    let database = &stores[..2];
    assert!(loquetier().arg("migrate").args(database).status().unwrap().success());
    let key = loquetier().args(["keys", "create"]).args(database).output().unwrap();
    let key = String::from_utf8(key.stdout).unwrap().trim().to_owned();
    Some((stores, key))
}

fn chat(model: &str) -> Value {
    json!({
        "model": model,
        "messages": [{"role": "user", "content": "What is 3 and 4?"}],
        "temperature": 0,
        "max_tokens": 20,
        "ignore_eos": true,
    })
}

/// Status, body and how long it took.
async fn ask(
    gateway: &Gateway,
    method: Method,
    path: &str,
    body: &Value,
) -> (u16, Value, Duration) {
    let began = Instant::now();
    let reply = gateway.request(method, path).json(body).send().await.unwrap();
    let status = reply.status().as_u16();
    (status, reply.json().await.unwrap(), began.elapsed())
}

async fn answer(gateway: &Gateway, model: &str) -> String {
    let (status, body, _) = ask(gateway, Method::POST, "/chat/completions", &chat(model)).await;
    assert_eq!(status, 200, "{body}");
    body["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

/// PEFT's two files for a base with modules of these sizes.
fn adapter(dims: &ModuleDims, value: f32) -> (Vec<u8>, Vec<u8>) {
    let targets = kernels::Module::ALL.to_vec();
    let shape = AdapterShape::new(4, 8.0, false, targets).unwrap();
    let layout = AdapterLayout::new(dims, &shape);
    let values: Vec<f32> =
        (0..layout.len()).map(|n| if n % 3 == 0 { value } else { -value }).collect();
    (peft::write_config(&shape, 0.0, "tiny"), peft::write_weights(&layout, &values))
}

async fn import(gateway: &Gateway, files: (Vec<u8>, Vec<u8>)) -> (u16, Value) {
    let form = Form::new()
        .text("name", "mine")
        .part("config", Part::bytes(files.0).file_name("adapter_config.json"))
        .part("weights", Part::bytes(files.1).file_name("adapter_model.safetensors"));
    let reply = gateway.request(Method::POST, "/adapters").multipart(form).send().await.unwrap();
    (reply.status().as_u16(), reply.json().await.unwrap())
}

fn dims(base: &Path) -> ModuleDims {
    BaseFiles::open(base).unwrap().config().dims()
}

/// A gateway judges adapters by the base's row: no worker need be alive, and none is asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adapters_are_imported_without_a_worker() {
    let Some((stores, key)) = prepared(1) else { return };
    let scratch = tempfile::tempdir().unwrap();
    let base = tiny_base(scratch.path());
    let gateway = Gateway::start(&stores, &key);
    let (status, body) = import(&gateway, adapter(&dims(&base), 0.05)).await;
    assert_eq!((status, &body["error"]["param"]), (400, &json!("base")), "no base at all: {body}");

    let first = worker("first", &base, &stores);
    assert!(answer(&gateway, "tiny").await.len() > 5);
    // The same name for other weights, while a worker serves it.
    let (other, weights) = (scratch.path().join("other"), base.join("model.safetensors"));
    std::fs::create_dir(&other).unwrap();
    let other_base = tiny_base(&other);
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(other_base.join("model.safetensors"), bytes).unwrap();
    let mut refused = loquetier();
    refused.args(["worker", "--device", "cpu", "--served-model-name", "tiny", "--base-model"]);
    let refused = refused.arg(&other_base).args(&stores).output().unwrap();
    let complaint = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && complaint.contains("other weights"), "{complaint}");

    first.signal("-TERM");
    assert!(first.ended().await);
    let (status, body, _) = ask(&gateway, Method::POST, "/chat/completions", &chat("tiny")).await;
    assert_eq!((status, &body["error"]["code"]), (503, &json!("server_is_overloaded")), "{body}");
    assert_eq!(gateway.get("/models").await["data"][0]["id"], "tiny");

    let wide = ModuleDims { hidden: 48, ..dims(&base) };
    let (status, body) = import(&gateway, adapter(&wide, 0.05)).await;
    let message = body["error"]["message"].as_str().unwrap();
    assert!(status == 400 && message.contains("the base needs"), "{body}");
    let (status, body) = import(&gateway, adapter(&dims(&base), 0.05)).await;
    assert_eq!(status, 200, "{body}");
    let model = body["model"].as_str().unwrap().to_owned();

    let _second = worker("second", &base, &stores);
    let (plain, adapted) = (answer(&gateway, "tiny").await, answer(&gateway, &model).await);
    assert_ne!(plain, adapted, "the adapter acts");
}

/// Stores whose database is behind a proxy.
async fn behind(stores: &[String]) -> (Proxy, Vec<String>) {
    let (head, rest) = stores[1].split_once('@').unwrap();
    let (server, database) = rest.split_once('/').unwrap();
    let proxy = Proxy::start(server).await;
    let mut through = stores.to_vec();
    through[1] = format!("{head}@{}/{database}", proxy.address);
    (proxy, through)
}

/// While Postgres is silent or refuses, known callers chat with known models at nearly the usual
/// speed, everything else is a quick and clear 503; afterwards all is as before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inference_goes_on_without_postgres() {
    let Some((stores, key)) = prepared(2) else { return };
    let (proxy, through) = behind(&stores).await;
    let scratch = tempfile::tempdir().unwrap();
    let base = tiny_base(scratch.path());
    let _worker = worker("only", &base, &through);
    let gateway = Gateway::start(&through, &key);
    let (status, imported) = import(&gateway, adapter(&dims(&base), 0.05)).await;
    assert_eq!(status, 200, "{imported}");
    let model = imported["model"].as_str().unwrap().to_owned();
    let (plain, adapted) = (answer(&gateway, "tiny").await, answer(&gateway, &model).await);

    for fault in [Fault::Silent, Fault::Away] {
        let streamed = json!({"model": model, "temperature": 0, "max_tokens": 20});
        let stream = gateway.stream(&streamed, || proxy.set(fault)).await;
        assert_eq!(stream, adapted, "{fault:?}: a stream under way");
        // Whoever asks first waits a little; the key is fresh, the name is not.
        let (status, body, took) =
            ask(&gateway, Method::POST, "/chat/completions", &chat("tiny")).await;
        assert_eq!(status, 200, "{fault:?}: {body}");
        assert!(took < Duration::from_secs(5), "{fault:?}: {took:?}");
        for _ in 0..5 {
            let began = Instant::now();
            assert_eq!(answer(&gateway, "tiny").await, plain, "{fault:?}");
            assert_eq!(answer(&gateway, &model).await, adapted, "{fault:?}");
            assert!(began.elapsed() < Duration::from_secs(4), "{fault:?}: {:?}", began.elapsed());
        }
        let nothing = json!({});
        for (method, path, body) in [
            (Method::POST, "/chat/completions", chat("unknown")),
            (Method::GET, "/models", nothing.clone()),
            (Method::GET, "/files", nothing.clone()),
            (Method::GET, "/fine_tuning/jobs", nothing.clone()),
            (Method::GET, "/../readyz", nothing),
        ] {
            let (status, body, took) = ask(&gateway, method, path, &body).await;
            assert_eq!(status, 503, "{fault:?}, {path}: {body}");
            let message = body["error"]["message"].as_str().unwrap();
            assert!(message.contains("database"), "{fault:?}, {path}: {message}");
            assert!(took < Duration::from_secs(2), "{fault:?}, {path}: {took:?}");
        }
        let (status, ..) = ask(&gateway, Method::GET, "/../healthz", &json!({})).await;
        assert_eq!(status, 200, "{fault:?}");

        proxy.set(Fault::None);
        let began = Instant::now();
        while ask(&gateway, Method::GET, "/../readyz", &json!({})).await.0 != 200 {
            assert!(began.elapsed() < PATIENCE, "{fault:?}: still not ready");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(answer(&gateway, &model).await, adapted, "{fault:?}: afterwards");
        assert_eq!(gateway.get("/models").await["data"][0]["id"], "tiny");
    }
}
