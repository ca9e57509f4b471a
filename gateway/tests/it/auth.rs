//! Keys, open access and tenancy.

use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, header};
use gateway::GatewayConfig;
use serde_json::{Value, json};
use storage::Storage;
use storage::db::Role;

use crate::site::{Client, Site};
use crate::worker::{self, Script};

fn closed() -> GatewayConfig {
    GatewayConfig::default()
}

#[tokio::test]
async fn every_v1_route_needs_a_key() {
    let site = Site::with(closed()).await;
    for path in ["/v1/models", "/v1/foo", "/v1", "/v1/files/file-x", "/v1/models/a%2Fb"] {
        let reply = site.client().get(path).await;
        assert_eq!(reply.refusal(), (401, None, None), "{path}");
        assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
        let wrong = Client { site: &site, key: Some("sk-wrong-wrong-wrong".to_owned()) };
        let reply = wrong.get(path).await;
        assert_eq!(reply.refusal(), (401, Some("invalid_api_key".to_owned()), None), "{path}");
        assert!(!reply.message().contains("sk-wrong-wrong-wrong"), "{reply}");
    }
    for value in ["Basic abc", "Bearer", "Bearer "] {
        let request = site.client().request("GET", "/v1/models").header("authorization", value);
        assert_eq!(site.client().send(request.body(Body::empty()).unwrap()).await.status, 401);
    }
    assert_eq!(site.client().get("/healthz").await.status, 200);
}

#[tokio::test]
async fn replies_name_the_organization() {
    let site = Site::with(closed()).await;
    let member = site.key("org-a", Role::Member).await;
    let reply = member.get("/v1/models").await;
    assert_eq!((reply.status, reply.header("openai-organization")), (200, Some("org-a")));
    // Headers of other services are accepted and change nothing.
    let request = member
        .request("GET", "/v1/models")
        .header("openai-organization", "org-b")
        .header("openai-project", "p")
        .header("openai-beta", "x=y")
        .header("x-stainless-lang", "python")
        .header("x-client-request-id", "mine");
    let reply = member.send(request.body(Body::empty()).unwrap()).await;
    assert_eq!((reply.status, reply.header("openai-organization")), (200, Some("org-a")));
}

#[tokio::test]
async fn open_access_is_for_this_machine_only() {
    let site = Site::open().await;
    let get = |headers: Vec<(&str, &str)>| {
        let mut request = Request::builder().uri("/v1/models");
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let request = request.body(Body::empty()).unwrap();
        let site = &site;
        async move { site.client().send(request).await }
    };
    let ok = get(vec![("host", "localhost:8000"), ("authorization", "Bearer anything")]).await;
    assert_eq!((ok.status, ok.header("openai-organization")), (200, Some("org-local")));
    assert_eq!(get(vec![("host", "[::1]:1"), ("origin", "http://localhost:3")]).await.status, 200);
    for bad in [
        vec![],
        vec![("host", "example.com")],
        vec![("host", "127.0.0.1.example.com")],
        vec![("host", "localhost"), ("origin", "https://example.com")],
        vec![("host", "localhost"), ("origin", "null")],
        vec![("host", "localhost"), ("forwarded", "for=1.2.3.4")],
        vec![("host", "localhost"), ("x-forwarded-for", "1.2.3.4")],
        vec![("host", "localhost"), ("X-Forwarded-Proto", "https")],
    ] {
        let reply = get(bad.clone()).await;
        let code = Some("insufficient_permissions".to_owned());
        assert_eq!(reply.refusal(), (403, code, None), "{bad:?}");
    }
}

#[tokio::test]
async fn the_first_key_ends_open_access_for_good() {
    let site = Site::open().await;
    assert_eq!(site.client().get("/v1/models").await.status, 200);
    // As `keys create` does from another process.
    let rows = Storage::open_rows(site.folder.path()).await.unwrap();
    let (key, secret) = rows.keys().create("org-local", Role::Member).await.unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(site.client().get("/v1/models").await.status, 401);
    let holder = Client { site: &site, key: Some(secret) };
    assert_eq!(holder.get("/v1/models").await.status, 200);
    rows.keys().revoke(&key.id).await.unwrap();
    assert_eq!(site.client().get("/v1/models").await.status, 401);
}

#[tokio::test]
async fn what_belongs_to_others_does_not_exist() {
    let site = Site::with(closed()).await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    let a = site.key("org-a", Role::Member).await;
    let b = site.key("org-b", Role::Operator).await;
    let file = a.training_file().await;
    let body = json!({"model": "b", "training_file": file});
    let job = a.post("/v1/fine_tuning/jobs", body.clone()).await.ok();
    let job = job["id"].as_str().unwrap();
    let model = "ft:b:org-a::AbCd1234";
    let adapter = site.adapter("org-a", model).await;

    let same = |theirs: (u16, Option<String>, Option<String>), path: &str| {
        assert_eq!(theirs.0, 404, "{path}");
    };
    for path in [
        format!("/v1/files/{file}"),
        format!("/v1/files/{file}/content"),
        format!("/v1/fine_tuning/jobs/{job}"),
        format!("/v1/fine_tuning/jobs/{job}/events"),
        format!("/v1/fine_tuning/jobs/{job}/checkpoints"),
        format!("/v1/models/{model}"),
        format!("/v1/adapters/{adapter}"),
        format!("/v1/adapters/{adapter}/content"),
    ] {
        assert_eq!(a.get(&path).await.status, 200, "{path}");
        same(b.get(&path).await.refusal(), &path);
    }
    for path in [format!("/v1/files/{file}"), format!("/v1/models/{model}")] {
        same(b.delete(&path).await.refusal(), &path);
    }
    for action in ["cancel", "pause", "resume"] {
        let path = format!("/v1/fine_tuning/jobs/{job}/{action}");
        same(b.post_empty(&path).await.refusal(), &path);
    }
    for list in ["/v1/files", "/v1/fine_tuning/jobs", "/v1/adapters"] {
        assert_eq!(b.get(list).await.ok()["data"], json!([]), "{list}");
    }
    for (list, id) in [("files", file.as_str()), ("fine_tuning/jobs", job), ("adapters", &adapter)]
    {
        let reply = b.get(&format!("/v1/{list}?after={id}")).await;
        assert_eq!((reply.status, reply.refusal().2.as_deref()), (400, Some("after")), "{list}");
    }
    let models = b.get("/v1/models").await.ok();
    assert_eq!(models["data"].as_array().unwrap().len(), 1);
    assert_eq!(b.chat(json!({"model": model})).await.status, 404);
    let reply = b.post("/v1/fine_tuning/jobs", body).await;
    assert_eq!((reply.status, reply.refusal().2.as_deref()), (400, Some("training_file")));
    // A foreign thing and a thing that never was look the same.
    let foreign = b.get(&format!("/v1/files/{file}")).await.json().to_string();
    let unknown = b.get("/v1/files/file-unknown").await.json().to_string();
    assert_eq!(foreign.replace(&file, "X"), unknown.replace("file-unknown", "X"));
}

#[tokio::test]
async fn while_the_database_is_away_nobody_is_turned_off() {
    let site = Site::with(closed()).await;
    let member = site.key("org-a", Role::Member).await;
    assert_eq!(member.get("/v1/models").await.status, 200);
    site.storage.db.close().await;
    let unknown = Client { site: &site, key: Some("sk-unknown".to_owned()) };
    for reply in [
        unknown.get("/v1/models").await,
        member.get("/v1/models").await,
        member.chat(json!({})).await,
        member.get("/readyz").await,
    ] {
        let code = Some("server_is_overloaded".to_owned());
        assert_eq!(reply.refusal(), (503, code, None), "{reply}");
    }
    // A known key still counts as one.
    assert_eq!(member.get("/v1/nowhere").await.status, 404);
    assert_eq!(member.get("/healthz").await.status, 200);
}

#[tokio::test]
async fn operators_see_more_than_members() {
    let site = Site::with(closed()).await;
    let script = Script { resident: vec!["adp-1".to_owned()], ..Script::default() };
    let _worker = worker::start(&site.storage, "w", script).await;
    let member = site.key("org-a", Role::Member).await;
    let operator = site.key("org-a", Role::Operator).await;
    let workers = member.get("/v1/workers").await.ok();
    assert_eq!(workers["data"][0]["resident_adapters"], 1);
    assert!(workers["data"][0].get("adapters").is_none());
    let workers = operator.get("/v1/workers").await.ok();
    assert_eq!(workers["data"][0]["adapters"][0]["id"], "adp-1");
    assert_eq!(site.client().get("/metrics").await.status, 401);
    assert_eq!(member.get("/metrics").await.status, 403);
    let metrics = operator.get("/metrics").await;
    assert_eq!(metrics.status, 200);
    assert!(metrics.text().contains("loquetier_http_requests_total{route=\"/v1/workers\""));
}

#[tokio::test]
async fn other_web_origins_are_let_in_only_by_configuration() {
    let preflight = |client: Client<'_>| {
        let request = client
            .request("OPTIONS", "/v1/chat/completions")
            .header("origin", "https://app.example")
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,x-stainless-os");
        request.body(Body::empty()).unwrap()
    };
    let site = Site::open().await;
    let reply = site.client().send(preflight(site.client())).await;
    assert!(reply.header("access-control-allow-origin").is_none());

    let cors_origins = vec!["https://app.example".to_owned()];
    let config = GatewayConfig { open_access: true, cors_origins, ..closed() };
    let site = Site::with(config).await;
    let reply = site.client().send(preflight(site.client())).await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("access-control-allow-origin"), Some("https://app.example"));
    assert!(reply.header("access-control-allow-headers").unwrap().contains("x-stainless-os"));
    let request =
        site.client().request("GET", "/v1/models").header(header::ORIGIN, "https://app.example");
    let reply = site.client().send(request.body(Body::empty()).unwrap()).await;
    assert_eq!(reply.status, 200);
    assert!(reply.header("access-control-expose-headers").unwrap().contains("x-request-id"));
    let body: Value = reply.json();
    assert_eq!(body["object"], "list");
}
