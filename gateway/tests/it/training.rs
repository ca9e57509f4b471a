//! Jobs under way: the double writes the rows a worker would, the replies follow them.

use gateway::GatewayConfig;
use serde_json::{Value, json};
use storage::db::{
    Claim, Claimant, JobWrite, NewAdapter, NewCheckpoint, NewEvent, NewFile, StatusChange,
    event_kind,
};
use storage::queue::message::{Refusal, RefusalKind, Target};

use crate::jobs::{PATH, create, id};
use crate::site::{BASE, Client, PRINT, Reply, Site};
use crate::worker::{self, Script};

fn adapter(model: &str) -> NewAdapter {
    NewAdapter {
        model: model.to_owned(),
        kind: "lora".to_owned(),
        base: BASE.to_owned(),
        base_fingerprint: PRINT.to_owned(),
        rank: 16,
        alpha: 32.0,
        use_rslora: false,
        target_modules: vec!["q_proj".to_owned()],
        bytes: 1,
        version: 1,
        object: "adapters/x/1-1".to_owned(),
    }
}

/// A job and the worker that writes its rows.
struct Training<'a> {
    client: Client<'a>,
    job: String,
    claimant: Claimant,
}

impl Training<'_> {
    fn jobs(&self) -> storage::db::Jobs<'_> {
        self.client.site.storage.db.jobs()
    }

    async fn shown(&self) -> Value {
        self.client.get(&format!("{PATH}/{}", self.job)).await.ok()
    }

    async fn act(&self, action: &str) -> Reply {
        self.client.post_empty(&format!("{PATH}/{}/{action}", self.job)).await
    }

    async fn model_status(&self) -> u16 {
        self.client.chat(json!({"model": self.job})).await.status
    }
}

async fn training(site: &Site) -> Training<'_> {
    let client = site.client();
    let job = create(&client, json!({"hyperparameters": {"n_epochs": 2}})).await;
    let claimant = Claimant {
        worker: "w".to_owned(),
        base: BASE.to_owned(),
        base_fingerprint: PRINT.to_owned(),
    };
    Training { client, job: id(&job).to_owned(), claimant }
}

/// Validates the job and begins to train it.
async fn begin(training: &Training<'_>) -> Claim {
    let jobs = training.jobs();
    let claim = jobs.claim_validation(&training.claimant, 60_000).await.unwrap().unwrap();
    let resolved = json!({
        "hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1},
        "training": {"learning_rate": 0.004},
    });
    let write = JobWrite {
        resolved: Some(resolved),
        status: Some(StatusChange::Queued),
        ..JobWrite::default()
    };
    jobs.write(&claim, &write).await.unwrap();
    jobs.claim_training(&training.claimant, 60_000).await.unwrap().unwrap()
}

#[tokio::test]
async fn resolved_numbers_are_shown_and_a_running_job_is_a_model() {
    let site = Site::open().await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    let training = training(&site).await;
    assert_eq!(training.model_status().await, 404);
    begin(&training).await;
    let shown = training.shown().await;
    assert_eq!(shown["status"], "running");
    assert_eq!(shown["hyperparameters"]["batch_size"], 4);
    assert_eq!(shown["method"]["supervised"]["hyperparameters"]["batch_size"], 4);
    assert_eq!(shown["training"]["learning_rate"], 0.004);
    let reply = training.client.chat(json!({"model": training.job})).await.ok();
    assert_eq!(reply["model"], training.job);
}

#[tokio::test]
async fn checkpoints_and_events_as_the_worker_writes_them() {
    let site = Site::open().await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    let training = training(&site).await;
    let claim = begin(&training).await;
    let name = "ft:b:org-local::Ckpt1234:ckpt-step-5";
    let metrics = json!({"step": 5, "train_loss": 0.5});
    let checkpoint = NewCheckpoint {
        step: 5,
        metrics: serde_json::from_value(metrics.clone()).unwrap(),
        adapter: adapter(name),
    };
    let write = JobWrite {
        events: vec![NewEvent::info(event_kind::STEP, 5, "Step 5/10: training loss=0.50")],
        checkpoint: Some(checkpoint),
        ..JobWrite::default()
    };
    training.jobs().write(&claim, &write).await.unwrap();

    let path = format!("{PATH}/{}", training.job);
    let listed = training.client.get(&format!("{path}/checkpoints")).await.ok();
    let first = &listed["data"][0];
    assert_eq!(first["fine_tuned_model_checkpoint"], name);
    assert_eq!((&first["step_number"], &first["metrics"]), (&json!(5), &metrics));
    assert_eq!((&listed["first_id"], &listed["last_id"]), (&first["id"], &first["id"]));
    assert_eq!(training.client.chat(json!({"model": name})).await.status, 200);

    let events = training.client.get(&format!("{path}/events?limit=1")).await.ok();
    assert_eq!(events["has_more"], true);
    let after = events["data"][0]["id"].as_str().unwrap();
    let rest = training.client.get(&format!("{path}/events?limit=1000&after={after}")).await.ok();
    assert_eq!(rest["has_more"], false);
    assert!(rest["data"].as_array().unwrap().iter().all(|event| event["id"] != after));
}

/// The owner obeys a pause a moment later; the reply waits for it.
#[tokio::test]
async fn pause_waits_for_the_owner_and_resume_queues() {
    let site = Site::open().await;
    let training = training(&site).await;
    let claim = begin(&training).await;
    let obey = async {
        while training
            .jobs()
            .get("org-local", &training.job)
            .await
            .unwrap()
            .unwrap()
            .intent
            .is_none()
        {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        let write = JobWrite {
            resume_point: Some(5),
            status: Some(StatusChange::Paused),
            ..JobWrite::default()
        };
        training.jobs().write(&claim, &write).await.unwrap();
    };
    let (paused, ()) = tokio::join!(training.act("pause"), obey);
    assert_eq!(paused.ok()["status"], "paused");
    assert_eq!(training.act("pause").await.status, 400);
    assert_eq!(training.act("resume").await.ok()["status"], "queued");
}

#[tokio::test]
async fn pause_gives_up_waiting_and_shows_the_row() {
    let config = GatewayConfig {
        open_access: true,
        pause_wait: std::time::Duration::from_millis(150),
        ..GatewayConfig::default()
    };
    let site = Site::with(config).await;
    let training = training(&site).await;
    begin(&training).await;
    assert_eq!(training.act("pause").await.ok()["status"], "running");
}

#[tokio::test]
async fn a_failed_job_says_why_and_is_no_model() {
    let site = Site::open().await;
    let _worker = worker::start(&site.storage, "w", Script::default()).await;
    let training = training(&site).await;
    let claim = begin(&training).await;
    let failed = StatusChange::Failed(storage::db::JobError {
        code: "invalid_training_file".to_owned(),
        message: "bad".to_owned(),
        param: Some("training_file".to_owned()),
    });
    let write = JobWrite { status: Some(failed), ..JobWrite::default() };
    training.jobs().write(&claim, &write).await.unwrap();
    let shown = training.shown().await;
    let error =
        json!({"code": "invalid_training_file", "message": "bad", "param": "training_file"});
    assert_eq!((&shown["status"], &shown["error"]), (&json!("failed"), &error));
    assert!(shown["finished_at"].is_i64());
    assert_eq!(training.model_status().await, 404);
    assert_eq!(training.act("cancel").await.status, 400);
}

/// A worker that has just let go of the job, which is asked for before its row says so.
async fn ask_at_the_end(status: StatusChange) -> (Reply, Vec<Target>) {
    let site = Site::open().await;
    let message = "no weights".to_owned();
    let refusal = Some(Refusal { kind: RefusalKind::Overloaded, message, param: None });
    let refuses = |target: &Target| matches!(target, Target::Job { .. });
    let script = Script { refusal, refuses, ..Script::default() };
    let worker = worker::start(&site.storage, "w", script).await;
    let training = training(&site).await;
    let claim = begin(&training).await;
    let end = async {
        worker.wait(|heard| heard.requests.first().cloned()).await;
        let write = JobWrite { status: Some(status), ..JobWrite::default() };
        training.jobs().write(&claim, &write).await.unwrap();
    };
    let (reply, ()) = tokio::join!(training.client.chat(json!({"model": training.job})), end);
    let heard = worker.heard.lock().unwrap();
    (reply, heard.requests.iter().map(|request| request.target.clone()).collect())
}

#[tokio::test]
async fn a_job_asked_as_it_ends_answers_with_its_final_adapter() {
    let name = "ft:b:org-local::Last1234";
    let checkpoint =
        NewCheckpoint { step: 9, metrics: serde_json::Map::new(), adapter: adapter(name) };
    let result_file = NewFile {
        id: "file-result".to_owned(),
        filename: "step_metrics.csv".to_owned(),
        purpose: "fine-tune-results".to_owned(),
        bytes: 1,
        expires_after_secs: None,
    };
    let checkpoint = Box::new(checkpoint);
    let succeeded = StatusChange::Succeeded { checkpoint, result_file, trained_tokens: 9 };
    let (reply, targets) = ask_at_the_end(succeeded).await;
    assert_eq!(reply.status, 200, "{reply}");
    let served = targets.last().unwrap();
    assert!(matches!(served, Target::Adapter { model, .. } if model == name), "{targets:?}");
    assert!(matches!(targets[0], Target::Job { .. }), "{targets:?}");
}

#[tokio::test]
async fn a_job_asked_as_it_fails_is_no_model() {
    let code = "training_failed".to_owned();
    let error = storage::db::JobError { code, message: "bad".to_owned(), param: None };
    let (reply, _) = ask_at_the_end(StatusChange::Failed(error)).await;
    assert_eq!((reply.status, reply.refusal().1.as_deref()), (404, Some("model_not_found")));
}
