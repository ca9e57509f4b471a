//! The committed OpenAPI document is the router's.

use serde_json::{Value, json};

use crate::site::Site;

#[test]
fn the_committed_document_is_up_to_date() {
    let committed = concat!(env!("CARGO_MANIFEST_DIR"), "/../openapi/openapi.json");
    let committed = std::fs::read_to_string(committed).unwrap_or_default();
    assert!(
        committed == gateway::openapi_json(),
        "openapi/openapi.json is out of date; regenerate it with: ./dev openapi"
    );
}

#[test]
fn it_names_every_route_once_and_in_its_own_spelling() {
    let document: Value = serde_json::from_str(&gateway::openapi_json()).unwrap();
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.contains_key("/v1/models/{model}"));
    assert!(paths.keys().all(|path| !path.contains('*')), "{:?}", paths.keys());
    let mut operations = std::collections::HashSet::new();
    for operation in paths.values().flat_map(|path| path.as_object().unwrap().values()) {
        assert!(operations.insert(operation["operationId"].as_str().unwrap().to_owned()));
    }
    assert!(operations.len() > 20);
    let chat = &document["components"]["schemas"]["ChatCompletionRequest"];
    assert_eq!(chat["required"], json!(["model", "messages"]));
    assert_eq!(document["security"], json!([{"api_key": []}]));
}

/// A field that the document offers must be one that the parser knows.
#[tokio::test]
async fn every_published_field_is_parsed() {
    let site = Site::open().await;
    let document: Value = serde_json::from_str(&gateway::openapi_json()).unwrap();
    for (schema, path) in [
        ("ChatCompletionRequest", "/v1/chat/completions"),
        ("TextCompletionRequest", "/v1/completions"),
        ("CreateJobRequest", "/v1/fine_tuning/jobs"),
    ] {
        let file = site.client().training_file().await;
        let mut body = match schema {
            "ChatCompletionRequest" => json!({"messages": [{"role": "user", "content": "x"}]}),
            "TextCompletionRequest" => json!({"prompt": "x"}),
            _ => json!({"training_file": file}),
        };
        body["model"] = json!("b");
        let fields = &document["components"]["schemas"][schema]["properties"];
        for field in fields.as_object().unwrap().keys() {
            if body.get(field).is_none() {
                body[field] = json!(null);
            }
        }
        let reply = site.client().post(path, body).await;
        let no_worker = reply.status == 503;
        assert!(reply.status == 200 || no_worker, "{schema}: {reply}");
    }
    for (schema, section) in [("LoraSettings", "lora"), ("TrainingSettings", "training")] {
        let fields = &document["components"]["schemas"][schema]["properties"];
        let nulls: serde_json::Map<String, Value> =
            fields.as_object().unwrap().keys().map(|key| (key.clone(), Value::Null)).collect();
        let mut body = json!({"model": "b", "training_file": site.client().training_file().await});
        body[section] = json!(nulls);
        site.client().post("/v1/fine_tuning/jobs", body).await.ok();
    }
}
