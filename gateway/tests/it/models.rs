//! `/v1/models`, with names as clients spell them.

use axum::http::header;
use serde_json::json;

use crate::site::{Site, new_base};

#[tokio::test]
async fn bases_and_own_models_with_stable_times() {
    let site = Site::open().await;
    site.adapter("org-local", "ft:b:org-local:one:AbCd1234").await;
    let first = site.client().get("/v1/models").await.ok();
    let ids: Vec<&str> =
        first["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["b", "ft:b:org-local:one:AbCd1234"]);
    assert_eq!(first["object"], "list");
    for model in first["data"].as_array().unwrap() {
        assert_eq!(model["object"], "model");
        assert!(model["created"].is_i64() && model["owned_by"].is_string());
    }
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    assert_eq!(site.client().get("/v1/models").await.ok(), first);
}

#[tokio::test]
async fn names_may_be_encoded_or_not_and_are_decoded_once() {
    let site = Site::open().await;
    site.storage.db.bases().upsert(&new_base("Qwen/X:1", "p")).await.unwrap();
    site.storage.db.bases().upsert(&new_base("odd%2Fname", "p")).await.unwrap();
    for path in ["Qwen/X:1", "Qwen%2FX:1", "Qwen%2FX%3A1", "Qwen%2fX%3a1"] {
        let reply = site.client().get(&format!("/v1/models/{path}")).await;
        assert_eq!(reply.ok()["id"], "Qwen/X:1", "{path}");
    }
    assert_eq!(site.client().get("/v1/models/odd%252Fname").await.ok()["id"], "odd%2Fname");
    for path in ["Qwen%252FX:1", "Qwen", "qwen/x:1", "Qwen/X:1/", "%00", "%ff", "b%00"] {
        assert_eq!(site.client().get(&format!("/v1/models/{path}")).await.status, 404, "{path}");
    }
}

#[tokio::test]
async fn own_models_can_be_deleted_once_and_bases_never() {
    let site = Site::open().await;
    let model = "ft:b:org-local:one:AbCd1234";
    site.adapter("org-local", model).await;
    let reply = site.client().delete("/v1/models/b").await;
    assert_eq!(reply.refusal(), (403, Some("insufficient_permissions".to_owned()), None));
    let reply = site.client().delete(&format!("/v1/models/{model}")).await;
    assert_eq!(reply.ok(), json!({"id": model, "object": "model", "deleted": true}));
    assert_eq!(reply.headers[header::CONTENT_TYPE], "application/json");
    for reply in [
        site.client().delete(&format!("/v1/models/{model}")).await,
        site.client().get(&format!("/v1/models/{model}")).await,
        site.client().chat(json!({"model": model})).await,
    ] {
        let expected = (404, Some("model_not_found".to_owned()), Some("model".to_owned()));
        assert_eq!(reply.refusal(), expected);
    }
}
