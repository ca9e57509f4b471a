//! `/v1/adapters`: look, pin, export, import.

use std::io::Read;

use gateway::GatewayConfig;
use serde_json::json;

use crate::site::Site;
use crate::worker::{self, Script};

const MODEL: &str = "ft:b:org-local:one:AbCd1234";

#[tokio::test]
async fn by_id_and_by_name() {
    let site = Site::open().await;
    let id = site.adapter("org-local", MODEL).await;
    let by_id = site.client().get(&format!("/v1/adapters/{id}")).await.ok();
    let encoded = MODEL.replace(':', "%3A");
    assert_eq!(site.client().get(&format!("/v1/adapters/{encoded}")).await.ok(), by_id);
    assert_eq!((&by_id["rank"], &by_id["residency"]), (&json!(8), &json!("object_store")));
    assert_eq!(site.client().get("/v1/adapters").await.ok()["data"], json!([by_id]));
    let reply = site.client().get("/v1/adapters/adp-x").await;
    assert_eq!(reply.refusal(), (404, None, Some("id".to_owned())));
}

#[tokio::test]
async fn pins_are_kept_and_counted() {
    let config =
        GatewayConfig { open_access: true, pinned_adapters_max: 1, ..GatewayConfig::default() };
    let site = Site::with(config).await;
    let one = site.adapter("org-local", MODEL).await;
    let two = site.adapter("org-local", "ft:b:org-local:two:AbCd1234").await;
    let path = |id: &str, action: &str| format!("/v1/adapters/{id}/{action}");
    for _ in 0..2 {
        let reply = site.client().post_empty(&path(&one, "pin")).await.ok();
        assert_eq!(reply["pinned"], true);
    }
    assert_eq!(site.client().post_empty(&path(&two, "pin")).await.status, 400);
    assert_eq!(site.client().post_empty(&path(&one, "unpin")).await.ok()["pinned"], false);
    assert_eq!(site.client().post_empty(&path(&two, "pin")).await.ok()["pinned"], true);
    assert_eq!(site.client().post_empty(&path("adp-x", "pin")).await.status, 404);
}

#[tokio::test]
async fn the_export_is_a_tar_of_both_files() {
    let site = Site::open().await;
    let id = site.adapter("org-local", MODEL).await;
    let reply = site.client().get(&format!("/v1/adapters/{id}/content")).await;
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/x-tar")));
    assert_eq!(reply.header("content-length").unwrap(), reply.body.len().to_string());
    let mut archive = tar::Archive::new(&reply.body[..]);
    let mut files = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        files.push((name, bytes));
    }
    let config = ("adapter_config.json".to_owned(), b"{\"r\":8}".to_vec());
    let weights = ("adapter_model.safetensors".to_owned(), vec![7; 1000]);
    assert_eq!(files, [config, weights]);
}

#[tokio::test]
async fn an_import_gets_a_new_name_and_can_be_used() {
    let site = Site::open().await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    let config = b"{\"r\":4,\"base_model_name_or_path\":\"elsewhere\"}";
    let parts: [(&str, Option<&str>, &[u8]); 3] = [
        ("weights", Some("adapter_model.safetensors"), b"weights"),
        ("name", None, b"mine"),
        ("config", Some("adapter_config.json"), config),
    ];
    let first = site.client().upload("/v1/adapters", &parts).await.ok();
    let second = site.client().upload("/v1/adapters", &parts).await.ok();
    let model = first["model"].as_str().unwrap();
    assert!(model.starts_with("ft:b:org-local:mine:"), "{model}");
    assert_ne!(first["model"], second["model"]);
    assert_eq!((&first["rank"], &first["bytes"]), (&json!(4), &json!(7)));
    assert_eq!(site.client().chat(json!({"model": model})).await.status, 200);
    let path = format!("/v1/adapters/{}/content", first["id"].as_str().unwrap());
    let exported = site.client().get(&path).await;
    assert!(exported.body.windows(7).any(|bytes| bytes == b"weights"));
}

#[tokio::test]
async fn imports_that_are_refused() {
    let site = Site::open().await;
    type Part<'a> = (&'a str, Option<&'a str>, &'a [u8]);
    let name: Part = ("name", None, b"mine");
    let config: Part = ("config", Some("c"), b"{\"r\":4}");
    let weights: Part = ("weights", Some("w"), b"w");
    for (parts, code, param) in [
        (vec![config, weights], "missing_required_parameter", "name"),
        (vec![name, weights], "missing_required_parameter", "config"),
        (vec![name, config], "missing_required_parameter", "weights"),
        (vec![name, ("config", None, b"{}"), weights], "invalid_value", "config"),
        (vec![("name", None, b"a b"), config, weights], "invalid_value", "name"),
        (vec![("name", None, b""), config, weights], "string_below_min_length", "name"),
        (vec![name, config, weights, ("x", None, b"")], "unknown_parameter", "x"),
    ] {
        let reply = site.client().upload("/v1/adapters", &parts).await;
        let expected = (400, Some(code.to_owned()), Some(param.to_owned()));
        assert_eq!(reply.refusal(), expected, "{reply}");
    }
    let reply =
        site.client().upload("/v1/adapters", &[name, config, weights, ("base", None, b"c")]).await;
    assert_eq!(reply.status, 404);
    let request = site
        .client()
        .request("POST", "/v1/adapters")
        .header("content-type", "application/json")
        .body(json!({"name": "x", "source": "s3://bucket/x"}).to_string().into())
        .unwrap();
    assert_eq!(site.client().send(request).await.status, 400);
    assert_eq!(site.client().get("/v1/adapters").await.ok()["data"], json!([]));
}
