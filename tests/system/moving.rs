//! What an operator may do to workers under open streams and running jobs, without a client
//! noticing: move an adapter, move a job, drain a worker, restart all of them in turn.

#![allow(clippy::unwrap_used)]

mod common;

use common::processes::{Gateway, Process, loquetier, stores, worker};
use common::{PATIENCE, chat_file, tiny_base};
use futures::future::join_all;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use storage::Db;
use storage::db::{MetadataFilter, Page};

/// Tokens of a stream: enough that it is still open when something happens to it.
const TOKENS: usize = 1200;

/// Jobs at once.
const JOBS: usize = 3;

/// A running service, and what its clients shall see.
struct Site {
    stores: Vec<String>,
    base: PathBuf,
    gateway: Gateway,
    /// A job and the weights that an undisturbed worker makes of it.
    job: Value,
    adapter: Vec<u8>,
    /// Fields of requests with the texts that an undisturbed worker answers.
    answers: Vec<(Value, String)>,
}

impl Site {
    fn new(stores: Vec<String>, base: PathBuf) -> Self {
        let database = &stores[..2];
        assert!(loquetier().arg("migrate").args(database).status().unwrap().success());
        let key = loquetier().args(["keys", "create", "--operator"]).args(database).output();
        let key = String::from_utf8(key.unwrap().stdout).unwrap().trim().to_owned();
        let gateway = Gateway::start(&stores, &key);
        Self { stores, base, gateway, job: Value::Null, adapter: Vec::new(), answers: Vec::new() }
    }

    fn worker(&self, id: &str) -> Process {
        worker(id, &self.base, &self.stores)
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
        let job = self.gateway.create_job(&self.job).await;
        let row = self.gateway.succeeded(&job).await;
        self.adapter = self.weights(&row).await;
        let model = row["fine_tuned_model"].as_str().unwrap();
        for fields in [
            json!({"model": model, "max_tokens": TOKENS, "temperature": 0}),
            json!({"model": model, "max_tokens": TOKENS, "temperature": 1, "seed": 5}),
            json!({"model": "tiny", "max_tokens": TOKENS, "temperature": 1, "seed": 6}),
        ] {
            let text = self.gateway.stream(&fields, || ()).await;
            assert!(text.len() > TOKENS / 2, "{text}");
            self.answers.push((fields, text));
        }
        model.to_owned()
    }

    /// Asks everything at once, over and over until `stop`, and holds every text to the undisturbed
    /// one; how many streams that were.
    async fn clients(&self, stop: &AtomicBool) -> usize {
        let one = async |(fields, expected): &(Value, String)| {
            let mut streams = 0;
            while !stop.load(Relaxed) {
                let text = self.gateway.stream(fields, || ()).await;
                assert!(text == *expected, "{fields}:\n{text}\n{expected}");
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
                let job = self.gateway.create_job(&self.job).await;
                let row = self.gateway.succeeded(&job).await;
                assert!(self.weights(&row).await == self.adapter, "{job} came to something else");
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
        let workers = self.gateway.get("/workers").await;
        let holds = |worker: &&Value| {
            worker["adapters"].as_array().unwrap().iter().any(|copy| copy["id"] == id)
        };
        let workers = workers["data"].as_array().unwrap();
        let ids = workers.iter().filter(holds).map(|worker| worker["id"].as_str().unwrap());
        ids.map(str::to_owned).collect()
    }

    /// Jobs that more than one worker has trained: to check the files is a claim, too.
    async fn moved_jobs(&self) -> usize {
        let db = Db::open_shared(&self.stores[1]).await.unwrap();
        let (page, all) = (Page::first(1000), MetadataFilter::default());
        let jobs = db.jobs().list("org-local", &page, &all).await.unwrap().rows;
        db.close().await;
        jobs.iter().filter(|job| job.attempt > 2).count()
    }

    /// A job that trains at the moment, and where: anywhere, or on this worker.
    async fn running_job(&self, on: Option<&str>) -> (String, String) {
        let start = Instant::now();
        loop {
            for worker in self.gateway.get("/workers").await["data"].as_array().unwrap() {
                let id = worker["id"].as_str().unwrap();
                let copies = worker["adapters"].as_array().unwrap();
                let job = copies.iter().filter_map(|copy| copy["id"].as_str());
                let job = job.filter(|_| on.is_none_or(|on| on == id));
                if let Some(job) = job.into_iter().find(|id| id.starts_with("ftjob-")) {
                    return (job.to_owned(), id.to_owned());
                }
            }
            assert!(start.elapsed() < PATIENCE, "nobody trains on {on:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until no worker holds anything for a request.
    async fn until_idle(&self) {
        let start = Instant::now();
        loop {
            let workers = self.gateway.get("/workers").await;
            let idle = |worker: &Value| {
                worker["requests"] == 0 && worker["free_blocks"] == worker["total_blocks"]
            };
            if workers["data"].as_array().unwrap().iter().all(idle) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{workers}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Moves some job that runs; those that end just now are passed over.
    async fn migrate_a_job(&self) {
        let start = Instant::now();
        loop {
            let (job, _) = self.running_job(None).await;
            let reply = self.gateway.try_post(&format!("/adapters/{job}/migrate")).await;
            if reply["id"] == job && reply["status"] == "running" {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{reply}");
        }
    }

    async fn migrate(&self, id: &str, to: &str) -> Value {
        let path = format!("/adapters/{id}/migrate");
        self.gateway.post(&path, &json!({"to": to})).await.json().await.unwrap()
    }

    /// Weights of the adapter that a job has made.
    async fn weights(&self, job: &Value) -> Vec<u8> {
        let model = job["fine_tuned_model"].as_str().unwrap();
        file_of_tar(&self.gateway.bytes(&format!("/adapters/{model}/content")).await)
    }

    /// What `loquetier worker --drain` prints, or complains of.
    async fn drain(&self, id: &str) -> Result<String, String> {
        let mut command = loquetier();
        command.args(["worker", "--drain", "--worker-id", id]).args(&self.stores);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }
}

/// The adapter's weights in an exported archive.
fn file_of_tar(archive: &[u8]) -> Vec<u8> {
    let mut rest = archive;
    while rest.len() > 512 {
        let (header, after) = rest.split_at(512);
        let octal = std::str::from_utf8(&header[124..135]).unwrap();
        let size = usize::from_str_radix(octal.trim_matches(['\0', ' ']), 8).unwrap();
        if header.starts_with(b"adapter_model.safetensors") {
            return after[..size].to_vec();
        }
        rest = &after[size.next_multiple_of(512)..];
    }
    panic!("no weights in the archive");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_notice_no_move_no_drain_and_no_restart() {
    let Some(stores) = stores() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let mut service = Site::new(stores, tiny_base(scratch.path()));
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

    let complaint = service.drain("nobody").await.unwrap_err();
    assert!(complaint.contains("no live worker 'nobody'; alive: a, b"), "{complaint}");
    let drain = async {
        let (_, id) = service.running_job(None).await;
        let told = service.drain(&id).await.unwrap();
        assert!(told.contains(&format!("worker '{id}' is gone")), "{told}");
        assert!(workers.remove(&id).unwrap().ended().await);
        workers.insert(id.clone(), service.worker(&id));
    };
    service.under_load("a worker is drained", drain).await;

    let restart = async {
        for id in ["a", "b"] {
            service.running_job(Some(id)).await;
            let old = workers.remove(id).unwrap();
            old.signal("-TERM");
            assert!(old.ended().await, "{id}");
            workers.insert(id.to_owned(), service.worker(id));
        }
    };
    let before = service.moved_jobs().await;
    let ((), moves) = service.under_load("all workers are replaced", restart).await;
    assert!(moves > 0 && service.moved_jobs().await > before);
    service.until_idle().await;
}
