//! Jobs of the production form while workers die, freeze and wake: the end is the adapter of an
//! undisturbed run, bit for bit; and how soon a client's wishes reach the worker.

#![allow(clippy::unwrap_used)]

mod common;

use common::own::Own;
use common::process::Process;
use common::site::Site;
use common::stores::Stores;
use serde_json::json;
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_outlives_its_workers() {
    let Some(site) = Site::open().await else { return };
    let expected = site.undisturbed().await;
    let mut workers: Vec<(String, Process)> =
        ["w0", "w1", "w2"].map(|id| (id.to_owned(), site.hasty(id, &site.stores))).into();
    let id = site.gateway.create(&site.job).await;

    let row = site.step(&id, 60).await;
    let owner = row.owner.unwrap();
    workers.retain(|(worker, _)| *worker != owner);
    let killed = Instant::now();
    let next = site.until_row(&id, |now| now.attempt > row.attempt).await;
    // The lease, a poll, and some slack for a busy machine.
    assert!(killed.elapsed() < Duration::from_secs(6), "{:?}", killed.elapsed());

    let row = site.step(&id, 160).await;
    assert_eq!(row.attempt, next.attempt);
    let owner = row.owner.unwrap();
    let frozen = workers.iter().position(|(worker, _)| *worker == owner).unwrap();
    workers[frozen].1.signal("-STOP");
    let last = site.until_row(&id, |now| now.attempt > row.attempt).await;
    // What wakes again finds its lease lost: it lets go, and the other one is not disturbed.
    workers[frozen].1.signal("-CONT");
    let woken = Instant::now();
    let next = last.owner.unwrap();
    site.gateway
        .until_workers("one worker has the job", |workers| {
            let jobs = |id: &str| {
                workers.iter().find(|worker| worker["id"] == id).map(|w| w["training_jobs"].clone())
            };
            jobs(&owner) == Some(json!(0)) && jobs(&next) == Some(json!(1))
        })
        .await;
    assert!(woken.elapsed() < Duration::from_secs(5), "{:?}", woken.elapsed());
    site.ends_like(&id, &expected).await;
    assert_eq!(site.row(&id).await.attempt, last.attempt, "nobody else had to take it");
}

/// A wish of the client reaches the worker within a second: the fastest of a few tries does, and
/// none takes much longer, however busy the machine is.
fn within_a_second(what: &str, tries: &[Duration]) {
    println!("{what}: {tries:?}");
    let (least, most) = (tries.iter().min().unwrap(), tries.iter().max().unwrap());
    assert!(*least < Duration::from_secs(1) && *most < Duration::from_secs(6), "{what}: {tries:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wishes_reach_any_worker_within_a_second() {
    let Some(stores) = Stores::open() else { return };
    let redis = Own::redis();
    let mut site = Site::over(Stores { redis: redis.url.clone(), ..stores }).await;
    // Long micro-batches, one job at a time, and a lease so long that no renewal helps.
    let flags = ["--max-jobs", "1", "--micro-rows", "2048", "--lease-secs", "120"];
    let _process = site.worker("only", &flags);
    let other = site.gateway();
    site.job["hyperparameters"] = json!({"n_epochs": 50, "batch_size": 100});
    let is = async |id: &str, status: &str| {
        site.until_row(id, |row| row.status.as_str() == status).await;
    };
    let timed = async |id: &str, wish: &str, status: &str| {
        let start = Instant::now();
        tokio::join!(other.wish(id, wish), is(id, status));
        start.elapsed()
    };

    let start = Instant::now();
    let id = site.gateway.create(&site.job).await;
    is(&id, "running").await;
    let mut started = vec![start.elapsed()];
    site.step(&id, 1).await;
    let (mut paused, mut resumed) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        paused.push(timed(&id, "pause", "paused").await);
        resumed.push(timed(&id, "resume", "running").await);
    }
    within_a_second("pause", &paused);
    within_a_second("resume", &resumed);

    // Everything in Redis is lost, and the nudge with it: the rows are looked at.
    let mut forgotten = Vec::new();
    for _ in 0..2 {
        redis.end();
        redis.begin_anew();
        forgotten.push(timed(&id, "pause", "paused").await);
        timed(&id, "resume", "running").await;
    }
    within_a_second("pause after a restart of Redis", &forgotten);

    // One waits for room and is cancelled; the next one starts as soon as there is room.
    let waiting = site.gateway.create(&site.job).await;
    is(&waiting, "queued").await;
    timed(&waiting, "cancel", "cancelled").await;
    let next = site.gateway.create(&site.job).await;
    is(&next, "queued").await;
    let start = Instant::now();
    timed(&id, "cancel", "cancelled").await;
    is(&next, "running").await;
    started.push(start.elapsed());
    within_a_second("start", &started);
    let never = site.row(&waiting).await;
    assert_eq!((never.started_at, never.step), (None, 0));
}
