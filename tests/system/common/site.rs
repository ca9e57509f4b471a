//! A cluster with a gateway, and one job to compare others with.

use super::client::Reply;
use super::cluster::Cluster;
use super::process::Process;
use super::server::Server;
use super::stores::Stores;
use super::until;
use super::{chat, chat_file};
use serde_json::{Value, json};
use std::ops::Deref;
use std::time::{Duration, Instant};
use storage::Db;
use storage::db::JobRow;

/// Examples of a site's job, and of one of its steps.
const EXAMPLES: usize = 600;
const BATCH: usize = 4;

/// See the module.
pub struct Site {
    cluster: Cluster,
    /// A gateway that always reaches the stores.
    pub gateway: Server,
    /// A request for a job.
    pub job: Value,
    /// Its optimizer steps.
    pub steps: u64,
    /// The rows, as a process of its own sees them.
    pub rows: Db,
}

impl Deref for Site {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

impl Site {
    /// None where no stores are named.
    pub async fn open() -> Option<Self> {
        Some(Self::over(Stores::open()?).await)
    }

    /// Over stores that nobody has used.
    pub async fn over(stores: Stores) -> Self {
        let cluster = Cluster::over(stores);
        // A gateway knows a base from its first worker on.
        let mut first = cluster.worker("first", &["--max-jobs", "0"]);
        let gateway = cluster.gateway();
        let job = json!({
            "model": "tiny",
            "training_file": gateway.upload(chat_file(EXAMPLES)).await,
            "seed": 5,
            "hyperparameters": {"batch_size": BATCH},
            "lora": {"rank": 128, "dropout": 0.1},
            "training": {"checkpoint_every_steps": 20},
        });
        assert!(first.terminate().await);
        let rows = cluster.rows().await;
        let mut site = Self { cluster, gateway, job, steps: 0, rows };
        site.set_epochs(6);
        site
    }

    /// Makes the job shorter or longer.
    pub fn set_epochs(&mut self, epochs: usize) {
        self.job["hyperparameters"]["n_epochs"] = json!(epochs);
        self.steps = (epochs * EXAMPLES / BATCH) as u64;
    }

    /// A worker with a short lease.
    pub fn hasty(&self, id: &str, stores: &Stores) -> Process {
        self.worker_by(stores, id, &["--lease-secs", "2", "--cold-wait-secs", "3"])
    }

    /// The same job on a worker that nothing happens to: its files.
    pub async fn undisturbed(&self) -> Vec<u8> {
        let calm = self.hasty("calm", &self.stores);
        let id = self.gateway.create(&self.job).await;
        let start = Instant::now();
        let row = self.gateway.success(&id).await;
        println!("undisturbed: {:?}", start.elapsed());
        assert_eq!(self.gateway.steps(&id).await, (1..=self.steps).collect::<Vec<_>>());
        drop(calm);
        self.gateway.content(&row).await
    }

    /// A job's row.
    pub async fn row(&self, id: &str) -> JobRow {
        self.rows.jobs().get("org-local", id).await.unwrap().unwrap()
    }

    /// Waits until a job's row is as wanted.
    pub async fn until_row(&self, id: &str, wanted: impl Fn(&JobRow) -> bool) -> JobRow {
        until(&format!("{id} as wanted"), async || Some(self.row(id).await).filter(&wanted)).await
    }

    /// Waits until a job has come to a step; its row.
    pub async fn step(&self, id: &str, step: u64) -> JobRow {
        self.until_row(id, |row| {
            let now = (row.status, row.step, row.attempt);
            assert!(row.error.is_none() && row.finished_at.is_none(), "{now:?}");
            row.step >= step as i64
        })
        .await
    }

    /// A short answer, whatever its status.
    pub async fn ask(&self, model: &str) -> Reply {
        self.gateway.ask(&chat(model, 4)).await
    }

    /// What a refusal for now says, and how long it took. The base answers sooner.
    pub async fn refused(&self, model: &str) -> (String, Duration) {
        let (reply, base) = tokio::join!(self.ask(model), self.ask("tiny"));
        assert_eq!((reply.status, base.status), (503, 200), "{reply:?} {base:?}");
        assert!(base.took < reply.took, "{reply:?} {base:?}");
        (reply.message().to_owned(), reply.took)
    }

    /// The job ends as the undisturbed one did.
    pub async fn ends_like(&self, id: &str, expected: &[u8]) {
        let row = self.gateway.success(id).await;
        assert!(self.gateway.content(&row).await == expected, "the adapters differ");
        assert_eq!(self.gateway.steps(id).await, (1..=self.steps).collect::<Vec<_>>());
    }
}
