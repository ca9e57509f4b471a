//! The production form: gateways and workers as processes of their own over Postgres, Redis and an
//! S3-compatible store; what a worker that drains leaves to others.

#![allow(clippy::unwrap_used)]

mod common;

use common::cluster::Cluster;
use common::process::{complaint, loquetier, printed};
use common::site::Site;
use common::stores::Stores;
use common::{chat, chat_file};
use futures::future::join_all;
use serde_json::{Value, json};
use std::process::Command;
use std::time::{Duration, Instant};
use storage::db::{JobRow, JobStatus};

/// Two gateways, one after another two workers: a job made at one gateway is seen at the other, and
/// a stream whose worker freezes goes on at the next one without a gap or a repeat.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_and_streams_outlive_their_worker() {
    let Some(stores) = Stores::open() else { return };
    let early = complaint(loquetier().arg("gateway").args(stores.flags()));
    assert!(early.contains("loquetier migrate"), "{early}");

    let cluster = Cluster::over(stores);
    let first = cluster.worker("first", &[]);
    let (a, b) = (cluster.gateway(), cluster.gateway());
    let job = json!({
        "model": "tiny",
        "training_file": a.upload(chat_file(40)).await,
        "seed": 3,
        "hyperparameters": {"n_epochs": 2, "batch_size": 4},
        "lora": {"rank": 4},
    });
    let job = a.create(&job).await;
    let row = b.success(&job).await;
    let chat = chat(row["fine_tuned_model"].as_str().unwrap(), 300);

    let calm = b.stream(&chat, || ()).await;
    assert!(calm.len() > 100, "{calm}");
    assert_eq!(a.stream(&chat, || ()).await, calm, "both gateways");
    let mut second = None;
    let moved = a.stream(&chat, || {
        first.signal("-STOP");
        second = Some(cluster.worker("second", &[]));
    });
    assert_eq!(moved.await, calm, "moved to another worker");
    // What wakes again must not disturb what has moved on.
    first.signal("-CONT");
    assert_eq!(b.stream(&chat, || ()).await, calm, "after the first one woke");
    assert!(second.unwrap().terminate().await, "a signal ends it well");
}

/// A training file that takes long to check.
fn long_file() -> String {
    let line = |n: usize| {
        let words = (0..3000).map(|m| ((n + 7) * (m + 3) * 7919 % 100_003).to_string());
        let question = words.collect::<Vec<_>>().join(" ");
        let messages = json!([
            {"role": "user", "content": question},
            {"role": "assistant", "content": "Many."},
        ]);
        json!({"messages": messages}).to_string() + "\n"
    };
    (0..800).map(line).collect()
}

/// A check of files is left at once, whether its worker drains or its job is cancelled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_a_check_of_files() {
    let Some(site) = Site::open().await else { return };
    // No lease runs out while this test does.
    let flags = ["--lease-secs", "120"];
    let mut job = site.job.clone();
    job["training_file"] = json!(site.gateway.upload(long_file()).await);
    let mut leaving = site.worker("leaving", &flags);
    let id = site.gateway.create(&job).await;
    let is_at = |owner: &str| {
        let owner = owner.to_owned();
        move |row: &JobRow| row.owner.as_ref() == Some(&owner)
    };
    site.until_row(&id, is_at("leaving")).await;

    let told = Instant::now();
    assert!(leaving.terminate().await);
    assert!(told.elapsed() < Duration::from_secs(3), "{:?}", told.elapsed());
    let row = site.row(&id).await;
    assert_eq!((row.status, row.owner, row.attempt), (JobStatus::ValidatingFiles, None, 1));
    let question = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/system/fruitless_claims.sql");
    let fruitless = printed(Command::new("psql").args([&site.stores.database, "-Atf", question]));
    assert_eq!(fruitless, "0", "it was nobody's fault");

    let _next = site.worker("next", &flags);
    let row = site.until_row(&id, is_at("next")).await;
    assert_eq!((row.status, row.attempt), (JobStatus::ValidatingFiles, 2));
    // Only one job is checked at a time.
    let other = site.gateway.create(&site.job).await;
    site.gateway.wish(&id, "cancel").await;
    let cancelled = Instant::now();
    site.until_row(&other, |row| row.status == JobStatus::Running).await;
    assert!(cancelled.elapsed() < Duration::from_secs(4), "{:?}", cancelled.elapsed());
}

/// Whether the worker that leaves is there and says so.
fn tells(workers: &[Value], field: &str, value: impl Into<Value>) -> bool {
    let worker = workers.iter().find(|worker| worker["id"] == "leaving");
    worker.is_some_and(|worker| worker[field] == value.into())
}

/// A worker that drains and is held by open streams claims no job, neither its own that it has just
/// given back nor one that waits; the next worker takes them all, and the streams.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draining_worker_claims_nothing() {
    let Some(mut site) = Site::open().await else { return };
    site.set_epochs(50);
    let gateway = &site.gateway;
    let flags = ["--lease-secs", "120", "--max-jobs", "1"];
    let mut leaving = site.worker("leaving", &flags);
    let trained = gateway.create(&site.job).await;
    site.step(&trained, 1).await;
    let waiting = gateway.create(&site.job).await;
    site.until_row(&waiting, |row| row.status == JobStatus::Queued).await;

    let chat = chat("tiny", 1800);
    let streams = join_all((0..8).map(|_| gateway.stream(&chat, || ())));
    let drain = async {
        gateway.until_workers("streams are open", |all| tells(all, "requests", 8)).await;
        leaving.signal("-TERM");
        gateway.until_workers("it drains", |all| tells(all, "draining", true)).await;
        let new = gateway.create(&site.job).await;
        site.until_row(&trained, |row| row.owner.is_none()).await;
        // Several times the pause between two looks for jobs.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let workers = gateway.workers().await;
        assert!(!tells(&workers, "requests", 0), "streams hold it: {workers:?}");
        let mut now = Vec::new();
        for id in [&trained, &waiting, &new] {
            let row = site.row(id).await;
            now.push((row.status, row.owner, row.attempt));
        }
        let expected =
            [(JobStatus::Running, 2), (JobStatus::Queued, 1), (JobStatus::ValidatingFiles, 0)];
        assert_eq!(now, expected.map(|(status, attempt)| (status, None, attempt)));
        let next = site.worker("next", &["--lease-secs", "120"]);
        for id in [&trained, &waiting, &new] {
            site.until_row(id, |row| {
                row.status == JobStatus::Running && row.owner.as_deref() == Some("next")
            })
            .await;
        }
        assert!(leaving.ended().await);
        next
    };
    let (texts, mut next) = tokio::join!(streams, drain);
    assert!(texts[0].len() > 1000 && texts.iter().all(|text| *text == texts[0]));

    // A pause is no less obeyed for the drain, with nobody there to go on.
    site.step(&trained, 1).await;
    site.rows.jobs().request_pause("org-local", &trained).await.unwrap();
    assert!(next.terminate().await);
    let rows = [site.row(&trained).await, site.row(&waiting).await];
    let left = rows.map(|row| (row.status, row.owner));
    assert_eq!(left, [(JobStatus::Paused, None), (JobStatus::Running, None)]);
}
