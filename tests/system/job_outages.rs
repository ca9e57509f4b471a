//! A job and its neighbours while Postgres or the object store is away from their worker: the same
//! claim goes on afterwards, to the adapter of an undisturbed run, and each step is told once.

#![allow(clippy::unwrap_used)]

mod common;

use common::chat;
use common::proxy::{Proxy, Way};
use common::site::Site;
use common::stores::{Stores, server_of, through};
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_outlives_outages_of_its_stores() {
    let Some(site) = Site::open().await else { return };
    let expected = site.undisturbed().await;
    let database = Proxy::start(server_of(&site.stores.database)).await;
    let objects = Proxy::start(server_of(&site.stores.endpoint)).await;
    let stores = Stores {
        database: through(&site.stores.database, &database.address),
        endpoint: through(&site.stores.endpoint, &objects.address),
        ..site.stores.clone()
    };
    let process = site.hasty("w", &stores);
    let id = site.gateway.create(&site.job).await;
    let mut row = site.step(&id, 30).await;
    let attempt = row.attempt;

    for way in [Way::Closed, Way::Silent] {
        objects.set(way);
        // Two resume points fall due meanwhile.
        row = site.step(&id, row.step as u64 + 50).await;
        objects.set(Way::Open);
    }
    for (number, way) in [Way::Closed, Way::Silent].into_iter().enumerate() {
        database.set(way);
        // Longer than the lease; chats go on meanwhile.
        let away = Instant::now();
        for model in ["tiny", &id] {
            assert!(!site.gateway.stream(&chat(model, 40), || ()).await.is_empty());
        }
        tokio::time::sleep(Duration::from_secs(3).saturating_sub(away.elapsed())).await;
        let waits = process.log().matches("training waits: the lease may be over").count();
        assert_eq!(waits, number + 1, "{}", process.log());
        database.set(Way::Open);
        row = site.step(&id, row.step as u64 + 20).await;
        assert_eq!(row.attempt, attempt, "the same claim goes on");
    }
    site.ends_like(&id, &expected).await;
    cold_adapters_wait_for_the_store(&site, &id, &objects).await;
    paused_jobs_need_the_rows(&site, &database).await;
    drop(process);
}

/// Requests on weights that no worker has wait a while for the store, others do not.
async fn cold_adapters_wait_for_the_store(site: &Site, job: &str, objects: &Proxy) {
    let row = site.gateway.job(job).await;
    let model = row["fine_tuned_model"].as_str().unwrap();
    objects.set(Way::Closed);
    let (message, waited) = site.refused(model).await;
    assert!(message.contains("object store does not answer"), "{message}");
    let bounds = Duration::from_secs(3)..Duration::from_secs(6);
    assert!(bounds.contains(&waited), "{waited:?}");

    let (reply, ()) = tokio::join!(site.ask(model), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        objects.set(Way::Open);
    });
    assert_eq!(reply.status, 200, "the store came back in time");
    objects.set(Way::Closed);
    assert_eq!(site.ask(model).await.status, 200, "what is here needs no store");
    objects.set(Way::Open);
}

/// Which state a paused job answers with is in the rows: without them it does not, and at once.
async fn paused_jobs_need_the_rows(site: &Site, database: &Proxy) {
    let id = site.gateway.create(&site.job).await;
    site.step(&id, 20).await;
    site.gateway.wish(&id, "pause").await;
    site.gateway.wait_for(&id, &["paused"]).await;
    assert_eq!(site.ask(&id).await.status, 200);
    database.set(Way::Silent);
    let (message, waited) = site.refused(&id).await;
    assert!(message.contains("state cannot be read now"), "{message}");
    assert!(waited < Duration::from_secs(3), "{waited:?}");
    database.set(Way::Open);
    site.gateway.wish(&id, "cancel").await;
}
