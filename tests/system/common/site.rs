//! A place with all stores and a gateway, and one job to compare others with.

use super::cluster::{Gateway, Process, Stores, stores, worker};
use super::{PATIENCE, chat_file, tiny_base};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Optimizer steps of a site's job.
pub const STEPS: u64 = 900;

/// Stores, a gateway that always reaches them, and what an undisturbed job comes to.
pub struct Site {
    /// Where everything is.
    pub stores: Stores,
    /// A client of it.
    pub gateway: Gateway,
    /// Folder of the base.
    pub base: PathBuf,
    /// Of the one organization.
    pub key: String,
    /// A request for a job.
    pub job: Value,
    _scratch: tempfile::TempDir,
}

impl Site {
    /// None where no stores are named.
    pub async fn open() -> Option<Self> {
        let stores = stores()?;
        let scratch = tempfile::tempdir().unwrap();
        let base = tiny_base(scratch.path());
        let key = stores.prepare();
        // A gateway knows a base from its first worker on.
        let first = worker(&base, &stores, &["--max-jobs", "0"]);
        let gateway = Gateway::start(&stores, &key);
        let job = json!({
            "model": "tiny",
            "training_file": gateway.upload(chat_file(600)).await,
            "seed": 5,
            "hyperparameters": {"n_epochs": 6, "batch_size": 4},
            "lora": {"rank": 128, "dropout": 0.1},
            "training": {"checkpoint_every_steps": 20},
        });
        drop(first);
        Some(Self { stores, gateway, base, key, job, _scratch: scratch })
    }

    /// A worker with a short lease.
    pub fn worker(&self, id: &str, stores: &Stores) -> Process {
        let flags = ["--worker-id", id, "--lease-secs", "2", "--cold-wait-secs", "3"];
        worker(&self.base, stores, &flags)
    }

    /// The same job on a worker that nothing happens to: its files.
    pub async fn undisturbed(&self) -> Vec<u8> {
        let calm = self.worker("calm", &self.stores);
        let id = self.gateway.create(&self.job).await;
        let start = Instant::now();
        let row = self.gateway.success(&id).await;
        println!("undisturbed: {:?}", start.elapsed());
        assert_eq!(self.gateway.steps(&id).await, (1..=STEPS).collect::<Vec<_>>());
        drop(calm);
        self.gateway.content(&row).await
    }

    /// The rows, as a process of its own sees them.
    pub async fn rows(&self) -> storage::Db {
        storage::Db::open_shared(&self.stores.database).await.unwrap()
    }

    /// Waits until a job has come to a step; its row.
    pub async fn step(&self, rows: &storage::Db, id: &str, step: u64) -> storage::db::JobRow {
        let start = Instant::now();
        loop {
            let row = rows.jobs().get("org-local", id).await.unwrap().unwrap();
            if row.step >= step as i64 {
                return row;
            }
            let now = (row.status, row.step, row.attempt);
            assert!(row.error.is_none() && row.finished_at.is_none(), "{now:?}");
            assert!(start.elapsed() < PATIENCE, "{now:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// A short answer, whatever its status.
    pub async fn ask(&self, model: &str) -> reqwest::Response {
        let messages = json!([{"role": "user", "content": "What is 3 and 4?"}]);
        let body = json!({"model": model, "messages": messages, "max_tokens": 4});
        let request = self.gateway.request(reqwest::Method::POST, "/chat/completions");
        request.json(&body).send().await.unwrap()
    }

    /// What a refusal for now says, and how long it took. The base answers sooner.
    pub async fn refused(&self, model: &str) -> (String, Duration) {
        let asked = Instant::now();
        let base = async {
            assert_eq!(self.ask("tiny").await.status(), 200);
            asked.elapsed()
        };
        let (reply, base) = tokio::join!(self.ask(model), base);
        let waited = asked.elapsed();
        assert!(base < waited, "{base:?} {waited:?}");
        let status = reply.status();
        let body: Value = reply.json().await.unwrap();
        assert_eq!(status, 503, "{body}");
        (body["error"]["message"].as_str().unwrap().to_owned(), waited)
    }

    /// The job ends as the undisturbed one did.
    pub async fn ends_like(&self, id: &str, expected: &[u8]) {
        let row = self.gateway.success(id).await;
        assert!(self.gateway.content(&row).await == expected, "the adapters differ");
        assert_eq!(self.gateway.steps(id).await, (1..=STEPS).collect::<Vec<_>>());
    }
}
