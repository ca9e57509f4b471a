//! What an operator may do to workers under open streams and a running job, without a client
//! noticing: move an adapter, move a job, drain a worker, restart all of them in turn.

#![allow(clippy::unwrap_used)]

mod common;

use common::processes::{Gateway, Process, loquetier, stores, worker};
use common::{PATIENCE, chat_file, tiny_base};
use futures::future::join_all;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Tokens of a stream: enough that it is still open when something happens to it.
const TOKENS: usize = 1200;

/// Enough that a job that gives way to open streams is still running when all workers were replaced.
const EPOCHS: usize = 30;

/// The service, and what its clients shall see.
struct Service {
    stores: Vec<String>,
    base: PathBuf,
    gateway: Gateway,
    /// Fields of requests with the texts that an undisturbed worker answers.
    answers: Vec<(Value, String)>,
}

impl Service {
    fn new(stores: Vec<String>, base: PathBuf) -> Self {
        let database = &stores[..2];
        assert!(loquetier().arg("migrate").args(database).status().unwrap().success());
        let key = loquetier().args(["keys", "create", "--operator"]).args(database).output();
        let key = String::from_utf8(key.unwrap().stdout).unwrap().trim().to_owned();
        let gateway = Gateway::start(&stores, &key);
        Self { stores, base, gateway, answers: Vec::new() }
    }

    /// A worker that trains little while somebody chats.
    fn worker(&self, id: &str) -> Process {
        let training = ["--slo-tpot-ms", "1"].map(str::to_owned);
        worker(id, &self.base, &[&self.stores[..], &training[..]].concat())
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

    /// Does something while clients ask.
    async fn under_load<T>(&self, work: impl Future<Output = T>) -> T {
        let stop = Arc::new(AtomicBool::new(false));
        let before = self.replacements().await;
        let work = async {
            // The streams shall be open.
            tokio::time::sleep(Duration::from_millis(300)).await;
            let done = work.await;
            stop.store(true, Relaxed);
            done
        };
        let (done, streams) = tokio::join!(work, self.clients(&stop));
        let moved = self.replacements().await - before;
        println!("{streams} streams, {moved} moves");
        assert!(moved > 0, "no stream was moved");
        done
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

    /// Waits until one worker alone trains a job: which.
    async fn trainer(&self, job: &str) -> String {
        let start = Instant::now();
        loop {
            if let [holder] = &self.holders(job).await[..] {
                return holder.clone();
            }
            assert!(start.elapsed() < PATIENCE, "nobody trains {job}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn trained_by(&self, job: &str, worker: &str) {
        let start = Instant::now();
        while self.trainer(job).await != worker {
            assert!(start.elapsed() < PATIENCE, "{job} does not come to {worker}");
            tokio::time::sleep(Duration::from_millis(50)).await;
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

async fn job(gateway: &Gateway) -> Value {
    json!({
        "model": "tiny",
        "training_file": gateway.upload(chat_file(60)).await,
        "seed": 3,
        "hyperparameters": {"n_epochs": EPOCHS, "batch_size": 2},
        "lora": {"rank": 4},
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_notice_no_move_no_drain_and_no_restart() {
    let Some(stores) = stores() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let mut service = Service::new(stores, tiny_base(scratch.path()));
    let a = service.worker("a");
    let spec = job(&service.gateway).await;
    let start = Instant::now();
    let calm = service.gateway.succeeded(&service.gateway.create_job(&spec).await).await;
    println!("the undisturbed job: {:?}", start.elapsed());
    let expected = service.weights(&calm).await;
    let model = calm["fine_tuned_model"].as_str().unwrap();
    for fields in [
        json!({"model": model, "max_tokens": TOKENS, "temperature": 0}),
        json!({"model": model, "max_tokens": TOKENS, "temperature": 1, "seed": 5}),
        json!({"model": "tiny", "max_tokens": TOKENS, "temperature": 1, "seed": 6}),
    ] {
        let start = Instant::now();
        let text = service.gateway.stream(&fields, || ()).await;
        println!("an undisturbed stream: {:?}", start.elapsed());
        assert!(text.len() > TOKENS / 2, "{text}");
        service.answers.push((fields, text));
    }
    let adapter = service.gateway.get(&format!("/adapters/{model}")).await;
    let adapter = adapter["id"].as_str().unwrap();

    let b = service.worker("b");
    let moved = service.under_load(service.migrate(adapter, "b")).await;
    assert_eq!(moved["residency"], "device", "{moved}");
    assert_eq!(service.holders(adapter).await, ["b"]);

    // A job moves to `b`, which is drained then; so it goes on at `a`.
    let complaint = service.drain("nobody").await.unwrap_err();
    assert!(complaint.contains("no live worker 'nobody'; alive: a, b"), "{complaint}");
    let job = service.gateway.create_job(&spec).await;
    if service.trainer(&job).await == "a" {
        assert_eq!(service.migrate(&job, "b").await["id"], job);
    }
    service.trained_by(&job, "b").await;
    let told = service.under_load(service.drain("b")).await.unwrap();
    assert!(told.contains("worker 'b' is gone"), "{told}");
    assert!(b.ended().await);
    service.trained_by(&job, "a").await;

    // Every worker is replaced, one after the other.
    let b = service.worker("b");
    let (a, b) = service
        .under_load(async {
            let mut fresh = Vec::new();
            for (id, old) in [("a", a), ("b", b)] {
                old.signal("-TERM");
                assert!(old.ended().await);
                fresh.push(service.worker(id));
            }
            (fresh.remove(0), fresh.remove(0))
        })
        .await;
    let done = service.gateway.get(&format!("/fine_tuning/jobs/{job}")).await;
    assert_eq!(done["status"], "running", "the job was to outlast it all: {done}");
    let done = service.gateway.succeeded(&job).await;
    assert!(service.weights(&done).await == expected, "the adapters differ");
    for worker in service.gateway.get("/workers").await["data"].as_array().unwrap() {
        assert_eq!((&worker["requests"], &worker["draining"]), (&json!(0), &json!(false)));
        assert_eq!(worker["free_blocks"], worker["total_blocks"], "{worker}");
    }
    drop((a, b));
}
