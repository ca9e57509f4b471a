//! `/v1/fine_tuning/jobs`.

use axum::body::Body;
use gateway::GatewayConfig;
use serde_json::{Value, json};

use crate::site::{BASE, Client, Site};
use crate::worker::{self, Script};

pub const PATH: &str = "/v1/fine_tuning/jobs";

pub async fn create(client: &Client<'_>, extra: Value) -> Value {
    let mut body = json!({"model": BASE, "training_file": client.training_file().await});
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    client.post(PATH, body).await.ok()
}

pub fn id(job: &Value) -> &str {
    job["id"].as_str().unwrap()
}

#[tokio::test]
async fn a_new_job_is_the_contract_to_the_key() {
    let site = Site::open().await;
    let worker = worker::start(&site.storage, "w", Script::default()).await;
    let extra = json!({"seed": 42, "hyperparameters": {"n_epochs": 3}, "suffix": "My.suf_fix-1"});
    let job = create(&site.client(), extra).await;
    assert_eq!(worker.wait(|heard| heard.nudges.first().cloned()).await, id(&job));
    let mut shown = job.clone();
    assert!(id(&job).starts_with("ftjob-"));
    for key in ["id", "training_file", "created_at"] {
        shown[key] = json!("…");
    }
    insta::assert_json_snapshot!("fine_tuning_job", shown);
    assert_eq!(site.client().get(&format!("{PATH}/{}", id(&job))).await.ok(), job);
    let events = site.client().get(&format!("{PATH}/{}/events", id(&job))).await.ok();
    let messages: Vec<&str> = events["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|event| event["message"].as_str().unwrap())
        .collect();
    assert_eq!(messages.len(), 2);
    assert!(messages[0].starts_with("Validating training file: file-"));
    assert_eq!(messages[1], format!("Created fine-tuning job: {}", id(&job)));
    assert_eq!(events["data"][0]["data"], json!({}));
    let checkpoints = site.client().get(&format!("{PATH}/{}/checkpoints", id(&job))).await.ok();
    let none = json!({"object": "list", "data": [], "first_id": null, "last_id": null,
                      "has_more": false});
    assert_eq!(checkpoints, none);
}

#[tokio::test]
async fn settings_are_echoed_with_every_field() {
    let site = Site::open().await;
    let job = create(
        &site.client(),
        json!({
            "lora": {"rank": 4, "target_modules": ["down_proj", "q_proj"], "use_rslora": true},
            "training": {"learning_rate": 0.001, "lr_scheduler": "cosine"},
            "metadata": {"k": "v"}, "integrations": [],
        }),
    )
    .await;
    assert_eq!(
        job["lora"],
        json!({"rank": 4, "alpha": 8, "dropout": 0, "target_modules": ["q_proj", "down_proj"],
               "use_rslora": true, "init": "default"})
    );
    assert_eq!(job["training"]["learning_rate"], 0.001);
    assert_eq!(job["training"]["max_sequence_length"], "auto");
    assert_eq!(job["metadata"], json!({"k": "v"}));
    assert!((0..=i64::from(i32::MAX)).contains(&job["seed"].as_i64().unwrap()));
}

#[tokio::test]
async fn requests_that_are_refused() {
    let site = Site::open().await;
    let client = site.client();
    let file = client.training_file().await;
    let parts: [(&str, Option<&str>, &[u8]); 2] =
        [("purpose", None, b"user_data"), ("file", Some("f"), b"{}")];
    let data = client.upload("/v1/files", &parts).await.ok()["id"].clone();
    let long = "x".repeat(65);
    for (extra, code, param) in [
        (json!({"model": null}), "missing_required_parameter", "model"),
        (json!({"model": "nope"}), "model_not_available", "model"),
        (json!({"model": "nope", "n": 1}), "model_not_available", "model"),
        (json!({"training_file": null}), "missing_required_parameter", "training_file"),
        (json!({"training_file": "file-x"}), "invalid_value", "training_file"),
        (json!({"training_file": "a\u{0}"}), "invalid_value", "training_file"),
        (json!({"training_file": data}), "invalid_value", "training_file"),
        (json!({"validation_file": "file-x"}), "invalid_value", "validation_file"),
        (json!({"suffix": ""}), "string_below_min_length", "suffix"),
        (json!({"suffix": long}), "string_above_max_length", "suffix"),
        (json!({"suffix": "a b"}), "invalid_value", "suffix"),
        (json!({"seed": -1}), "integer_below_min_value", "seed"),
        (json!({"seed": 2147483648i64}), "integer_above_max_value", "seed"),
        (json!({"metadata": {"k": "a\u{0}"}}), "invalid_value", "metadata.k"),
        (json!({"integrations": [{"type": "wandb"}]}), "unsupported_value", "integrations"),
        (json!({"method": {"type": "reinforcement"}}), "unsupported_value", "method.type"),
        (json!({"method": {"type": "dpo"}}), "unsupported_value", "method.type"),
        (
            json!({"hyperparameters": {"batch_size": 0}}),
            "integer_below_min_value",
            "hyperparameters.batch_size",
        ),
        (json!({"lora": {"rank": 257}}), "integer_above_max_value", "lora.rank"),
        (json!({"lora": {"r": 8}}), "unknown_parameter", "lora.r"),
        (json!({"training": {"warmup": 8}}), "unknown_parameter", "training.warmup"),
        (json!({"n_epochs": 3}), "unknown_parameter", "n_epochs"),
    ] {
        let mut body = json!({"model": BASE, "training_file": file});
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        let reply = client.post(PATH, body).await;
        let expected = (400, Some(code.to_owned()), Some(param.to_owned()));
        assert_eq!(reply.refusal(), expected, "{extra}: {reply}");
    }
    assert_eq!(client.get(PATH).await.ok()["data"], json!([]));
    let reply = client.post(PATH, json!({"model": "nope", "training_file": file})).await;
    let message = "Model nope is not available for fine-tuning or does not exist.";
    assert_eq!(reply.message(), message);
}

#[tokio::test]
async fn preference_pairs_where_they_are_offered() {
    let config = GatewayConfig { open_access: true, dpo: true, ..GatewayConfig::default() };
    let site = Site::with(config).await;
    let method = json!({"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.5}}});
    let job = create(&site.client(), json!({"method": method})).await;
    let hyper = json!({"n_epochs": "auto", "batch_size": "auto",
                       "learning_rate_multiplier": "auto", "beta": 0.5});
    assert_eq!(job["method"]["dpo"]["hyperparameters"], hyper);
    assert!(job["hyperparameters"].is_object());
    assert!(job["method"].get("supervised").is_none());
}

#[tokio::test]
async fn a_job_can_go_on_from_an_own_model() {
    let site = Site::open().await;
    let model = "ft:b:org-local:one:AbCd1234";
    site.adapter("org-local", model).await;
    let job = create(&site.client(), json!({"model": model})).await;
    assert_eq!((&job["model"], &job["lora"]["rank"]), (&json!(model), &json!(8)));
    let body = json!({"model": model, "training_file": site.client().training_file().await,
                      "lora": {"rank": 16}});
    let reply = site.client().post(PATH, body).await;
    assert_eq!(reply.refusal().2.as_deref(), Some("lora.rank"));
}

#[tokio::test]
async fn the_same_key_makes_one_job() {
    let site = Site::open().await;
    let client = site.client();
    let file = client.training_file().await;
    let post = |suffix: &str, key: &str| {
        let body = json!({"model": BASE, "training_file": file, "suffix": suffix}).to_string();
        let request = client.request("POST", PATH).header("idempotency-key", key);
        client.send(request.body(Body::from(body)).unwrap())
    };
    let first = post("a", "k1").await.ok();
    assert_eq!(post("a", "k1").await.ok(), first);
    let reused = post("b", "k1").await;
    assert_eq!((reused.status, reused.refusal().2.as_deref()), (400, Some("Idempotency-Key")));
    assert_ne!(post("b", "k2").await.ok()["id"], first["id"]);
    assert_eq!(client.get(PATH).await.ok()["data"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn lists_page_and_filter_by_metadata() {
    let site = Site::open().await;
    let client = site.client();
    let mut all = Vec::new();
    for metadata in
        [json!(null), json!({"a": "1"}), json!({"a": "1", "b c": "2&=é"}), json!({"a": ""})]
    {
        all.insert(0, id(&create(&client, json!({"metadata": metadata})).await).to_owned());
    }
    let ids = async |query: &str| {
        let list = client.get(&format!("{PATH}?{query}")).await.ok();
        let data = list["data"].as_array().unwrap();
        let ids: Vec<String> = data.iter().map(|job| id(job).to_owned()).collect();
        (ids, list["has_more"] == true)
    };
    let pick = |places: &[usize]| places.iter().map(|i| all[*i].clone()).collect::<Vec<_>>();
    assert_eq!(ids("").await, (all.clone(), false));
    assert_eq!(ids("limit=3").await, (pick(&[0, 1, 2]), true));
    assert_eq!(ids(&format!("limit=3&after={}", all[2])).await, (pick(&[3]), false));
    assert_eq!(ids("metadata[a]=1").await.0, pick(&[1, 2]));
    assert_eq!(ids("metadata%5Ba%5D=1&metadata%5Bb+c%5D=2%26%3D%C3%A9").await.0, pick(&[1]));
    assert_eq!(ids("metadata[a]=").await.0, pick(&[0]));
    assert_eq!(ids("metadata=null").await.0, pick(&[3]));
    assert_eq!(ids("metadata[zz]=1").await.0, Vec::<String>::new());
    for bad in ["limit=0", "limit=101", "after=ftjob-x", "metadata=x", "metadata[a=1"] {
        assert_eq!(client.get(&format!("{PATH}?{bad}")).await.status, 400, "{bad}");
    }
}

#[tokio::test]
async fn jobs_are_cancelled_once() {
    let site = Site::open().await;
    let client = site.client();
    let job = create(&client, json!({})).await;
    let file = job["training_file"].as_str().unwrap();
    assert_eq!(client.delete(&format!("/v1/files/{file}")).await.status, 400);
    for action in ["pause", "resume"] {
        let reply = client.post_empty(&format!("{PATH}/{}/{action}", id(&job))).await;
        assert_eq!(reply.status, 400);
        assert!(reply.message().contains("validating_files"), "{reply}");
    }
    let cancelled = client.post_empty(&format!("{PATH}/{}/cancel", id(&job))).await.ok();
    assert_eq!(cancelled["status"], "cancelled");
    assert!(cancelled["finished_at"].is_i64());
    let reply = client.post_empty(&format!("{PATH}/{}/cancel", id(&job))).await;
    assert_eq!(reply.status, 400);
    assert!(reply.message().contains("cancelled"));
    let unknown = client.post_empty(&format!("{PATH}/ftjob-x/cancel")).await;
    let code = Some("fine_tune_not_found".to_owned());
    assert_eq!(unknown.refusal(), (404, code, Some("fine_tune_id".to_owned())));
    assert_eq!(unknown.message(), "Could not find fine tune: ftjob-x");
    assert_eq!(client.delete(&format!("/v1/files/{file}")).await.status, 200);
}
