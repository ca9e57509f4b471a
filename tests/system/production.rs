//! The production form: gateways and workers as processes of their own over Postgres, Redis and an
//! S3-compatible store.

#![allow(clippy::unwrap_used)]

mod common;

use common::cluster::Cluster;
use common::process::{complaint, loquetier};
use common::stores::Stores;
use common::{chat, chat_file};
use serde_json::json;

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
