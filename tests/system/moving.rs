//! What an operator may do to workers under open streams and running jobs, without a client
//! noticing: move an adapter, move a job, drain a worker, restart all of them in turn.

#![allow(clippy::unwrap_used)]

mod common;

use common::cluster::Cluster;
use common::process::{Process, complaint, loquetier, printed};
use common::server::Server;
use common::{chat, chat_file, is_idle, until};
use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use storage::db::{MetadataFilter, Page};

/// Tokens of a stream: enough that it is still open when something happens to it.
const TOKENS: usize = 1200;

/// Jobs at once.
const JOBS: usize = 3;

/// A running service, and what its clients shall see.
struct Load {
    cluster: Cluster,
    gateway: Server,
    /// A job and the adapter that an undisturbed worker makes of it.
    job: Value,
    adapter: Vec<u8>,
    /// Chats with the texts that an undisturbed worker answers.
    answers: Vec<(Value, String)>,
}

impl Load {
    fn new(cluster: Cluster) -> Self {
        let gateway = cluster.gateway();
        Self { cluster, gateway, job: Value::Null, adapter: Vec::new(), answers: Vec::new() }
    }

    fn worker(&self, id: &str) -> Process {
        self.cluster.worker(id, &[])
    }

    /// Has everything done once by a worker that nobody disturbs; the model of the adapter.
    async fn calm(&mut self) -> String {
        self.job = json!({
            "model": "tiny",
            "training_file": self.gateway.upload(chat_file(60)).await,
            "seed": 3,
            "hyperparameters": {"n_epochs": 12, "batch_size": 2},
            "lora": {"rank": 4},
        });
        let job = self.gateway.create(&self.job).await;
        let row = self.gateway.success(&job).await;
        self.adapter = self.gateway.content(&row).await;
        let model = row["fine_tuned_model"].as_str().unwrap();
        for (model, seed) in [(model, None), (model, Some(5)), ("tiny", Some(6))] {
            let mut chat = chat(model, TOKENS);
            if let Some(seed) = seed {
                (chat["temperature"], chat["seed"]) = (json!(1), json!(seed));
            }
            let text = self.gateway.stream(&chat, || ()).await;
            assert!(text.len() > TOKENS / 2, "{text}");
            self.answers.push((chat, text));
        }
        model.to_owned()
    }

    /// Asks everything at once, over and over until `stop`, and holds every text to the undisturbed
    /// one; how many streams that were.
    async fn clients(&self, stop: &AtomicBool) -> usize {
        let one = async |(chat, expected): &(Value, String)| {
            let mut streams = 0;
            while !stop.load(Relaxed) {
                let text = self.gateway.stream(chat, || ()).await;
                assert!(text == *expected, "{chat}:\n{text}\n{expected}");
                streams += 1;
            }
            streams
        };
        join_all(self.answers.iter().map(one)).await.into_iter().sum()
    }

    /// Trains the same adapter several times at once, over and over until `stop`, and holds every
    /// result to the undisturbed one; how many jobs that were.
    async fn trainers(&self, stop: &AtomicBool) -> usize {
        let one = async |_| {
            let mut jobs = 0;
            while !stop.load(Relaxed) {
                let job = self.gateway.create(&self.job).await;
                let row = self.gateway.success(&job).await;
                let adapter = self.gateway.content(&row).await;
                assert!(adapter == self.adapter, "{job} came to something else");
                jobs += 1;
            }
            jobs
        };
        join_all((0..JOBS).map(one)).await.into_iter().sum()
    }

    /// Does something while clients chat and train; how many streams were moved meanwhile, too.
    async fn under_load<T>(&self, what: &str, work: impl Future<Output = T>) -> (T, u64) {
        let stop = AtomicBool::new(false);
        let (streams, jobs) = (self.replacements().await, self.moved_jobs().await);
        let work = async {
            // The streams shall be open.
            tokio::time::sleep(Duration::from_millis(300)).await;
            let done = work.await;
            stop.store(true, Relaxed);
            done
        };
        let (done, asked, trained) = tokio::join!(work, self.clients(&stop), self.trainers(&stop));
        let streams = self.replacements().await - streams;
        let jobs = self.moved_jobs().await - jobs;
        println!("{what}: {streams} moves of {asked} streams, {jobs} of {trained} jobs moved");
        (done, streams)
    }

    /// Streams that the gateway has placed again.
    async fn replacements(&self) -> u64 {
        let metrics = self.gateway.bytes("/../metrics").await;
        let metrics = String::from_utf8(metrics).unwrap();
        let line =
            metrics.lines().find_map(|line| line.strip_prefix("loquetier_replacements_total"));
        line.map_or(0, |count| count.trim().parse().unwrap())
    }

    /// Workers that hold an adapter or a job's weights.
    async fn holders(&self, id: &str) -> Vec<String> {
        let workers = self.gateway.workers().await;
        let holds = |worker: &&Value| {
            worker["adapters"].as_array().unwrap().iter().any(|copy| copy["id"] == id)
        };
        let ids = workers.iter().filter(holds).map(|worker| worker["id"].as_str().unwrap());
        ids.map(str::to_owned).collect()
    }

    /// Jobs that more than one worker has trained: to check the files is a claim, too.
    async fn moved_jobs(&self) -> usize {
        let db = self.cluster.rows().await;
        let (page, all) = (Page::first(1000), MetadataFilter::default());
        let jobs = db.jobs().list("org-local", &page, &all).await.unwrap().rows;
        db.close().await;
        jobs.iter().filter(|job| job.attempt > 2).count()
    }

    /// A job that trains at the moment, and where: anywhere, or on this worker.
    async fn running_job(&self, on: Option<&str>) -> (String, String) {
        until("a job trains", async || {
            for worker in self.gateway.workers().await {
                let id = worker["id"].as_str().unwrap();
                let copies = worker["adapters"].as_array().unwrap();
                let job = copies.iter().filter_map(|copy| copy["id"].as_str());
                let job = job.filter(|_| on.is_none_or(|on| on == id));
                if let Some(job) = job.into_iter().find(|id| id.starts_with("ftjob-")) {
                    return Some((job.to_owned(), id.to_owned()));
                }
            }
            None
        })
        .await
    }

    /// Waits until no worker holds anything for a request.
    async fn until_idle(&self) {
        self.gateway.until_workers("all are idle", |all| all.iter().all(is_idle)).await;
    }

    /// Moves some job that runs; those that end just now are passed over.
    async fn migrate_a_job(&self) {
        until("a job moves", async || {
            let (job, _) = self.running_job(None).await;
            let request = self.gateway.request(Method::POST, &format!("/adapters/{job}/migrate"));
            let reply = self.gateway.reply(request).await.body;
            (reply["id"] == job && reply["status"] == "running").then_some(())
        })
        .await;
    }

    async fn migrate(&self, id: &str, to: &str) -> Value {
        self.gateway.post(&format!("/adapters/{id}/migrate"), &json!({"to": to})).await
    }

    /// `loquetier worker --drain`.
    fn drain(&self, id: &str) -> Command {
        let mut command = loquetier();
        command.args(["worker", "--drain", "--worker-id", id]).args(self.cluster.stores.flags());
        command
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_notice_no_move_no_drain_and_no_restart() {
    let Some(cluster) = Cluster::open() else { return };
    let mut service = Load::new(cluster);
    let mut workers = BTreeMap::from([("a".to_owned(), service.worker("a"))]);
    let model = service.calm().await;
    let adapter = service.gateway.get(&format!("/adapters/{model}")).await;
    let adapter = adapter["id"].as_str().unwrap();

    workers.insert("b".to_owned(), service.worker("b"));
    let (reply, moves) =
        service.under_load("an adapter moves", service.migrate(adapter, "b")).await;
    assert_eq!(reply["residency"], "device", "{reply}");
    assert!(moves > 0, "its streams were open at `a`");
    assert!(service.holders(adapter).await.contains(&"b".to_owned()));

    service.under_load("a job moves", service.migrate_a_job()).await;
    assert!(service.moved_jobs().await > 0);

    let said = complaint(&mut service.drain("nobody"));
    assert!(said.contains("no live worker 'nobody'; alive: a, b"), "{said}");
    let drain = async {
        let (_, id) = service.running_job(None).await;
        let mut drain = service.drain(&id);
        let told = tokio::task::spawn_blocking(move || printed(&mut drain)).await.unwrap();
        assert!(told.contains(&format!("worker '{id}' is gone")), "{told}");
        assert!(workers.remove(&id).unwrap().ended().await);
        workers.insert(id.clone(), service.worker(&id));
    };
    service.under_load("a worker is drained", drain).await;

    let restart = async {
        for id in ["a", "b"] {
            service.running_job(Some(id)).await;
            assert!(workers.remove(id).unwrap().terminate().await, "{id}");
            workers.insert(id.to_owned(), service.worker(id));
        }
    };
    let before = service.moved_jobs().await;
    let ((), moves) = service.under_load("all workers are replaced", restart).await;
    assert!(moves > 0 && service.moved_jobs().await > before);
    service.until_idle().await;
}
