//! The production form: gateways and workers as processes of their own over Postgres, Redis and an
//! S3-compatible store.

#![allow(clippy::unwrap_used)]

mod common;

use common::cluster::{Gateway, loquetier, stores, worker};
use common::{chat_file, tiny_base};
use serde_json::json;

/// Two gateways, one after another two workers: a job made at one gateway is seen at the other, and
/// a stream whose worker freezes goes on at the next one without a gap or a repeat.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_and_streams_outlive_their_worker() {
    let Some(stores) = stores() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let base = tiny_base(scratch.path());

    let early = loquetier().arg("gateway").args(stores.flags()).output().unwrap();
    let complaint = String::from_utf8_lossy(&early.stderr).into_owned();
    assert!(complaint.contains("loquetier migrate"), "{complaint}");
    let key = stores.prepare();

    let first = worker(&base, &stores, &[]);
    let (a, b) = (Gateway::start(&stores, &key), Gateway::start(&stores, &key));
    let job = json!({
        "model": "tiny",
        "training_file": a.upload(chat_file(40)).await,
        "seed": 3,
        "hyperparameters": {"n_epochs": 2, "batch_size": 4},
        "lora": {"rank": 4},
    });
    let job = a.create(&job).await;
    let row = b.success(&job).await;
    let model = row["fine_tuned_model"].as_str().unwrap().to_owned();

    let calm = b.stream(&model, 300, || ()).await;
    assert!(calm.len() > 100, "{calm}");
    assert_eq!(a.stream(&model, 300, || ()).await, calm, "both gateways");
    let mut second = None;
    let moved = a.stream(&model, 300, || {
        first.signal("-STOP");
        second = Some(worker(&base, &stores, &[]));
    });
    assert_eq!(moved.await, calm, "moved to another worker");
    // What wakes again must not disturb what has moved on.
    first.signal("-CONT");
    assert_eq!(b.stream(&model, 300, || ()).await, calm, "after the first one woke");
    let stopping = second.unwrap();
    stopping.signal("-TERM");
    drop(first);
}
