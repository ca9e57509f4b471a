//! Jobs and their neighbours while a store is away or frozen: the same claim goes on afterwards, to
//! the adapter of an undisturbed run, and each step is told once; what a client wants of a job
//! meanwhile is refused, or done as soon as it can be.

#![allow(clippy::unwrap_used)]

mod common;

use common::own::Own;
use common::server::Server;
use common::site::Site;
use common::stores::{Stores, server_of, through};
use common::{chat, until};
use loquetier_tests::proxy::{Proxy, Way};
use std::time::{Duration, Instant};
use storage::db::{Intent, JobStatus};

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

    for way in [Way::Shut, Way::Silent] {
        objects.set(way);
        // Two resume points fall due meanwhile.
        row = site.step(&id, row.step as u64 + 50).await;
        objects.set(Way::Open);
    }
    for (number, way) in [Way::Shut, Way::Silent].into_iter().enumerate() {
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
    objects.set(Way::Shut);
    let (message, waited) = site.refused(model).await;
    assert!(message.contains("object store does not answer"), "{message}");
    let bounds = Duration::from_secs(3)..Duration::from_secs(6);
    assert!(bounds.contains(&waited), "{waited:?}");

    let (reply, ()) = tokio::join!(site.ask(model), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        objects.set(Way::Open);
    });
    assert_eq!(reply.status, 200, "the store came back in time");
    objects.set(Way::Shut);
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

/// The server's processes stand still, connections stay open: on the same claim the job waits and
/// goes on, chats never notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_outlives_a_frozen_postgres() {
    let Some(stores) = Stores::open() else { return };
    let postgres = Own::postgres();
    let mut site = Site::over(Stores { database: postgres.url.clone(), ..stores }).await;
    site.set_epochs(2);
    let expected = site.undisturbed().await;
    let process = site.hasty("w", &site.stores);
    let id = site.gateway.create(&site.job).await;
    let attempt = site.step(&id, 20).await.attempt;

    // What the gateway knows it knows from before.
    for model in ["tiny", &id] {
        site.ask(model).await.text();
    }
    assert_eq!(site.row(&id).await.status, JobStatus::Running);
    postgres.freeze();
    let frozen = Instant::now();
    while frozen.elapsed() < Duration::from_secs(10) {
        for model in ["tiny", &id] {
            let reply = site.ask(model).await;
            assert!(!reply.text().is_empty() && reply.took < Duration::from_secs(6), "{reply:?}");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(process.log().contains("training waits: the lease may be over"), "{}", process.log());
    postgres.thaw();
    site.gateway.until_ready().await;
    site.ends_like(&id, &expected).await;
    assert_eq!(site.row(&id).await.attempt, attempt, "the same claim has gone on");
    drop(process);
}

/// What a client wants of a job while the database or Redis is away is never lost unsaid.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wishes_are_refused_or_outlive_an_outage() {
    let Some(stores) = Stores::open() else { return };
    let redis = Own::redis();
    let mut site = Site::over(Stores { redis: redis.url.clone(), ..stores }).await;
    site.set_epochs(50);
    let database = Proxy::start(server_of(&site.stores.database)).await;
    let address = through(&site.stores.database, &database.address);
    let stores = Stores { database: address, ..site.stores.clone() };
    let process = site.hasty("w", &stores);
    let behind = Server::gateway(&stores, &site.key);
    let id = site.gateway.create(&site.job).await;
    site.step(&id, 20).await;

    for way in [Way::Shut, Way::Silent] {
        database.set(way);
        for wish in ["pause", "cancel"] {
            let reply = behind.try_wish(&id, wish).await;
            let quick = reply.took < Duration::from_secs(7);
            assert!(reply.status == 503 && quick, "{way:?}, {wish}: {reply:?}");
            assert!(reply.message().contains("database"), "{way:?}, {wish}: {reply:?}");
        }
        database.set(Way::Open);
        let row = site.row(&id).await;
        let row = site.step(&id, row.step as u64 + 10).await;
        assert_eq!((row.status, row.intent), (JobStatus::Running, None), "{way:?}");
    }
    told_to_a_worker_without_rows(&site, &id, &database).await;
    told_without_redis(&site, &redis).await;
    drop((process, behind));
}

/// The gateway reaches the database, and the worker hears of the wish when it does, too.
async fn told_to_a_worker_without_rows(site: &Site, id: &str, database: &Proxy) {
    database.set(Way::Silent);
    let (paused, ()) = tokio::join!(site.gateway.wish(id, "pause"), async {
        site.until_row(id, |row| row.intent == Some(Intent::Pause)).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(site.row(id).await.status, JobStatus::Running);
        database.set(Way::Open);
    });
    assert_eq!(paused["status"], "paused");
    let before = site.row(id).await.step;
    site.gateway.wish(id, "resume").await;
    let before = site.step(id, before as u64 + 10).await.step;

    database.set(Way::Shut);
    let cancelled = site.gateway.wish(id, "cancel").await;
    assert_eq!(cancelled["status"], "cancelled");
    let events = site.gateway.events(id).await;
    database.set(Way::Open);
    lets_go(site).await;
    let row = site.row(id).await;
    assert!(row.status == JobStatus::Cancelled && row.step >= before, "{row:?}");
    assert_eq!(site.gateway.events(id).await, events, "nothing was told after the end");
}

/// A nudge is lost, and the rows are looked at.
async fn told_without_redis(site: &Site, redis: &Own) {
    let id = site.gateway.create(&site.job).await;
    let row = site.step(&id, 10).await;
    redis.end();
    let paused = site.gateway.try_wish(&id, "pause").await;
    assert!(paused.status == 200 && paused.body["status"] == "paused", "{paused:?}");
    assert!(paused.took < Duration::from_secs(6), "{paused:?}");
    redis.begin_anew();
    site.gateway.wish(&id, "resume").await;
    site.step(&id, row.step as u64 + 10).await;
    redis.freeze();
    let cancelled = site.gateway.try_wish(&id, "cancel").await;
    assert!(cancelled.status == 200 && cancelled.took < Duration::from_secs(6), "{cancelled:?}");
    assert_eq!(cancelled.body["status"], "cancelled");
    redis.thaw();
    lets_go(site).await;
    assert_eq!(site.row(&id).await.status, JobStatus::Cancelled);
}

/// Waits until the worker trains nothing.
async fn lets_go(site: &Site) {
    until("the worker lets go", async || {
        let workers = site.gateway.workers().await;
        (workers.len() == 1 && workers[0]["training_jobs"] == 0).then_some(())
    })
    .await;
}
