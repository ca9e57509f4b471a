//! What goes on and what is refused while workers, the database or the object store are away.

use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::header;
use gateway::GatewayConfig;
use serde_json::json;
use storage::Objects;
use storage::db::Role;
use storage::objects::{S3Config, S3Limits};
use tokio::sync::mpsc;

use crate::site::{Client, Reply, Site, form, new_base};
use crate::worker::{self, Script};
use loquetier_tests::proxy::{Proxy, Way};

const OVERLOADED: &str = "server_is_overloaded";

fn overloaded() -> (u16, Option<String>, Option<String>) {
    (503, Some(OVERLOADED.to_owned()), None)
}

#[tokio::test]
async fn a_known_base_without_a_worker_is_listed_and_busy() {
    let site = Site::open().await;
    assert_eq!(site.client().get("/v1/models").await.ok()["data"][0]["id"], "b");
    let reply = site.client().chat(json!({})).await;
    assert_eq!(reply.refusal(), overloaded());
    assert!(reply.message().contains("`b`"), "{reply}");
    let unknown = site.client().chat(json!({"model": "c"})).await;
    assert_eq!(unknown.status, 404);
    let worker = worker::start(&site.storage, "w", Script::default()).await;
    assert_eq!(site.client().chat(json!({})).await.status, 200);
    drop(worker);
    // Once its inbox is closed it is gone.
    let began = Instant::now();
    while site.client().chat(json!({})).await.status != 503 {
        assert!(began.elapsed() < Duration::from_secs(5));
    }
    assert_eq!(site.client().get("/v1/models").await.ok()["data"][0]["id"], "b");
}

#[tokio::test]
async fn requests_go_to_workers_of_their_own_base() {
    let site = Site::open().await;
    let other = ("other", "other-print");
    site.storage.db.bases().upsert(&new_base(other.0, other.1)).await.unwrap();
    site.adapter("org-local", "ft:b:org-local:x:AbCd1234").await;
    let one = worker::start(&site.storage, "one", Script::default()).await;
    let script = Script { base: other, ..Script::default() };
    let two = worker::start(&site.storage, "two", script).await;
    for _ in 0..20 {
        for model in ["b", "ft:b:org-local:x:AbCd1234", "other"] {
            assert_eq!(site.client().chat(json!({"model": model})).await.status, 200, "{model}");
        }
    }
    let bases = |worker: &worker::Worker| -> Vec<String> {
        worker.heard.lock().unwrap().requests.iter().map(|r| r.base.clone()).collect()
    };
    assert_eq!(bases(&one), ["b"; 40]);
    assert_eq!(bases(&two), ["other"; 20]);
    drop(one);
    let began = Instant::now();
    while site.client().chat(json!({})).await.status != 503 {
        assert!(began.elapsed() < Duration::from_secs(5));
    }
    assert_eq!(site.client().chat(json!({"model": "other"})).await.status, 200);
    assert!(bases(&two).iter().all(|base| base == "other"), "never the next best");
}

#[tokio::test]
async fn inference_goes_on_without_the_database() {
    let site = Site::with(GatewayConfig::default()).await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    let member = site.key("org-a", Role::Member).await;
    let late = site.key("org-a", Role::Member).await;
    let adapter = "ft:b:org-a:x:AbCd1234";
    site.adapter("org-a", adapter).await;
    site.adapter("org-a", "ft:b:org-a:y:AbCd1234").await;
    let file = member.training_file().await;
    for model in ["b", adapter] {
        assert_eq!(member.chat(json!({"model": model})).await.status, 200);
    }
    site.storage.db.close().await;

    for model in ["b", adapter, "b"] {
        assert_eq!(member.chat(json!({"model": model})).await.status, 200, "{model}");
        let body = json!({"model": model, "prompt": "hello"});
        assert_eq!(member.post("/v1/completions", body).await.status, 200, "{model}");
    }
    let job = json!({"model": "b", "training_file": file});
    for (what, reply) in [
        (
            "a name not asked for before",
            member.chat(json!({"model": "ft:b:org-a:y:AbCd1234"})).await,
        ),
        ("no name at all", member.chat(json!({"model": "nothing"})).await),
        ("a key not seen before", late.chat(json!({})).await),
        ("models", member.get("/v1/models").await),
        ("one model", member.get("/v1/models/b").await),
        ("adapters", member.get("/v1/adapters").await),
        ("files", member.get("/v1/files").await),
        ("one file", member.get(&format!("/v1/files/{file}")).await),
        ("deleting", member.delete(&format!("/v1/files/{file}")).await),
        ("jobs", member.get("/v1/fine_tuning/jobs").await),
        ("a new job", member.post("/v1/fine_tuning/jobs", job).await),
        ("readiness", site.client().get("/readyz").await),
    ] {
        assert_eq!(reply.refusal(), overloaded(), "{what}: {reply}");
        assert!(reply.message().contains("database"), "{what}: {reply}");
    }
    assert_eq!(site.client().get("/healthz").await.status, 200);
    let unknown = Client { site: &site, key: Some("sk-unknown-unknown".to_owned()) };
    assert_eq!(unknown.chat(json!({})).await.refusal(), overloaded(), "cannot be judged");
}

#[tokio::test]
async fn a_deleted_name_is_gone_at_once() {
    let site = Site::open().await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    let model = "ft:b:org-local:x:AbCd1234";
    site.adapter("org-local", model).await;
    assert_eq!(site.client().chat(json!({"model": model})).await.status, 200);
    site.client().delete(&format!("/v1/models/{model}")).await.ok();
    assert_eq!(site.client().chat(json!({"model": model})).await.status, 404);
    site.storage.db.close().await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    // Known to be gone: nothing of it is remembered.
    assert_ne!(site.client().chat(json!({"model": model})).await.status, 200);
}

/// A store that gives up soon.
fn store(server: &str, bucket: &str) -> Objects {
    let variable = |name: &str| (name.to_owned(), "test".to_owned());
    let config = S3Config {
        url: format!("s3://{bucket}/{}", storage::ids::alphanumerics(12)),
        endpoint: Some(format!("http://{server}")),
        region: None,
        environment: vec![variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY")],
        limits: S3Limits {
            answer: Duration::from_millis(1500),
            patience: Duration::from_millis(300),
            ..S3Limits::default()
        },
    };
    Objects::open_s3(&config).unwrap()
}

async fn upload(client: &Client<'_>) -> Reply {
    let parts: [(&str, Option<&str>, &[u8]); 2] =
        [("purpose", None, b"fine-tune"), ("file", Some("t.jsonl"), b"{\"messages\":[]}\n")];
    client.upload("/v1/files", &parts).await
}

async fn import(client: &Client<'_>) -> Reply {
    let parts: [(&str, Option<&str>, &[u8]); 3] = [
        ("name", None, b"mine"),
        ("config", Some("adapter_config.json"), b"{\"r\":4}"),
        ("weights", Some("adapter_model.safetensors"), &[1; 64]),
    ];
    client.upload("/v1/adapters", &parts).await
}

fn is_store_away(what: &str, reply: &Reply) {
    assert_eq!(reply.refusal(), overloaded(), "{what}: {reply}");
    assert!(reply.message().contains("object store"), "{what}: {reply}");
}

async fn is_empty(client: &Client<'_>) {
    for list in ["/v1/files", "/v1/adapters"] {
        assert_eq!(client.get(list).await.ok()["data"], json!([]), "{list}");
    }
}

#[tokio::test]
async fn without_a_store_nothing_is_taken_in() {
    let site = Site::with_objects(store("127.0.0.1:9", "bucket")).await;
    let client = site.client();
    let began = Instant::now();
    is_store_away("an upload", &upload(&client).await);
    is_store_away("an import", &import(&client).await);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    is_empty(&client).await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    assert_eq!(client.chat(json!({})).await.status, 200, "inference goes on");
}

/// A real store behind a proxy that stays silent: before, in the middle of, and after an upload.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_falls_silent() {
    let Ok(url) = std::env::var("LOQUETIER_TEST_S3_URL") else { return };
    let (server, bucket) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let proxy = Proxy::start(server).await;
    let site = Site::with_objects(store(&proxy.address, bucket)).await;
    let client = site.client();
    proxy.set(Way::Silent);
    is_store_away("an upload", &upload(&client).await);
    is_store_away("an import", &import(&client).await);
    is_empty(&client).await;

    proxy.set(Way::Open);
    is_store_away("half an upload", &cut_upload(&client, &proxy).await);
    proxy.set(Way::Open);
    is_empty(&client).await;

    let file = upload(&client).await.ok()["id"].as_str().unwrap().to_owned();
    let adapter = import(&client).await.ok()["id"].as_str().unwrap().to_owned();
    proxy.set(Way::Silent);
    is_store_away("a download", &client.get(&format!("/v1/files/{file}/content")).await);
    is_store_away("an export", &client.get(&format!("/v1/adapters/{adapter}/content")).await);
    // The row is what counts; the bytes are swept.
    client.delete(&format!("/v1/files/{file}")).await.ok();
    assert_eq!(client.get(&format!("/v1/files/{file}")).await.status, 404);
    proxy.set(Way::Open);
    assert_eq!(client.get(&format!("/v1/adapters/{adapter}/content")).await.status, 200);
}

/// Sends 24 MiB, in whose middle the store falls silent.
async fn cut_upload(client: &Client<'_>, proxy: &Proxy) -> Reply {
    let line = format!("{{\"messages\":[],\"x\":\"{}\"}}\n", "x".repeat(1 << 20));
    let content = line.repeat(24).into_bytes();
    let whole: [(&str, Option<&str>, &[u8]); 2] =
        [("purpose", None, b"fine-tune"), ("file", Some("t.jsonl"), &content)];
    let mut body = Bytes::from(form(&whole));
    let (sender, receiver) = mpsc::channel::<Result<Bytes, std::io::Error>>(1);
    let proxy = proxy.clone();
    let sending = tokio::spawn(async move {
        let mut sent = 0;
        while !body.is_empty() {
            let piece = body.split_to(body.len().min(64 << 10));
            sent += piece.len();
            // Refused before it is read to its end.
            if sender.send(Ok(piece)).await.is_err() {
                return;
            }
            // The first part is stored by then.
            if sent == 12 << 20 {
                tokio::time::sleep(Duration::from_millis(300)).await;
                proxy.set(Way::Silent);
            }
        }
    });
    let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let request = client
        .request("POST", "/v1/files")
        .header(header::CONTENT_TYPE, "multipart/form-data; boundary=XX");
    let reply = client.send(request.body(Body::from_stream(stream)).unwrap()).await;
    sending.await.unwrap();
    reply
}
