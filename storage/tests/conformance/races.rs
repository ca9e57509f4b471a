//! Several at once: the outcome is one of the orders, and no collision reaches a caller.

use std::collections::HashSet;
use std::time::Duration;

use storage::db::{
    FileDeleted, Idempotency, JobCreated, JobStatus, JobWrite, MetadataFilter, NewEvent, NewJob,
    Page, Transition, UsageRow, UsageSum, Written,
};

use crate::rig::{LONG_MS, ORG, Rig, new_adapter, new_file, new_job, on_both, success};

on_both!(
    cancel_against_success,
    one_key_makes_one_job,
    deletion_against_creation,
    crossing_file_locks_are_sorted_out,
    two_processes_write_without_busy,
    a_write_cut_short_leaves_nothing,
    a_list_read_while_it_grows_skips_nothing,
);

async fn cancel_against_success(rig: Rig) {
    let other = rig.another_process().await;
    for round in 0..8 {
        let claim = rig.running_job("w", LONG_MS).await;
        let id = claim.job.id.clone();
        let name = format!("ft:{round}");
        let write = success(&name, 3);
        let writer = rig.db.clone();
        let (jobs, other_jobs) = (writer.jobs(), other.jobs());
        let (written, cancelled) =
            tokio::join!(jobs.write(&claim, &write), other_jobs.cancel(ORG, &id));
        let job = rig.db.jobs().get(ORG, &id).await.expect("reads").expect("row");
        let adapter = rig.db.adapters().by_model(ORG, &name).await.expect("reads");
        match (written.expect("writes"), cancelled.expect("cancels")) {
            (Written::Done { .. }, Transition::Refused(JobStatus::Succeeded)) => {
                assert!(job.status == JobStatus::Succeeded && adapter.is_some());
            }
            (Written::Lost, Transition::Done(_)) => {
                assert!(job.status == JobStatus::Cancelled && adapter.is_none());
            }
            both => panic!("both or neither won: {both:?}"),
        }
    }
}

async fn one_key_makes_one_job(rig: Rig) {
    let file = rig.file(ORG).await;
    let other = rig.another_process().await;
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..10 {
        let db = if number % 2 == 0 { rig.db.clone() } else { other.clone() };
        let idempotency = Some(Idempotency { key: "k".to_owned(), body_hash: "h".to_owned() });
        let request = NewJob { idempotency, ..new_job(ORG, &file.id) };
        tasks.spawn(async move { db.jobs().create(&request).await.expect("creates") });
    }
    let mut made = 0;
    let mut ids = HashSet::new();
    for outcome in tasks.join_all().await {
        match outcome {
            JobCreated::New(job) => {
                made += 1;
                ids.insert(job.id);
            }
            JobCreated::Replayed(job) => {
                ids.insert(job.id);
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    assert_eq!((made, ids.len(), rig.count("jobs").await), (1, 1, 1));
}

async fn deletion_against_creation(rig: Rig) {
    let other = rig.another_process().await;
    for _ in 0..12 {
        let file = rig.file(ORG).await;
        let request = new_job(ORG, &file.id);
        let (jobs, files) = (rig.db.jobs(), other.files());
        let (created, deleted) = tokio::join!(jobs.create(&request), files.delete(ORG, &file.id));
        match (created.expect("creates"), deleted.expect("deletes")) {
            (JobCreated::New(job), FileDeleted::InUse(user)) => assert_eq!(job.id, user),
            (JobCreated::FileMissing("training_file"), FileDeleted::Deleted) => {}
            both => panic!("a job without its file, or neither: {both:?}"),
        }
    }
}

async fn crossing_file_locks_are_sorted_out(rig: Rig) {
    let (one, two) = (rig.file(ORG).await.id, rig.file(ORG).await.id);
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..16 {
        let (training, validation) = if number % 2 == 0 { (&one, &two) } else { (&two, &one) };
        let mut request = new_job(ORG, training);
        request.validation_file = Some(validation.clone());
        let db = rig.db.clone();
        tasks.spawn(async move { db.jobs().create(&request).await.expect("creates") });
    }
    assert!(tasks.join_all().await.iter().all(|made| matches!(made, JobCreated::New(_))));
}

async fn two_processes_write_without_busy(rig: Rig) {
    let claim = rig.running_job("w", LONG_MS).await;
    let other = rig.another_process().await;
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8_i64 {
        let db = if task % 2 == 0 { rig.db.clone() } else { other.clone() };
        let claim = claim.clone();
        tasks.spawn(async move {
            for number in 0..8 {
                let file = new_file();
                db.files().insert(ORG, &file, None).await.expect("a file");
                let adapter = new_adapter(&format!("ft:{task}:{number}"));
                db.adapters().insert(ORG, &adapter).await.expect("an adapter");
                let event = NewEvent::info("step", task * 100 + number, "a step");
                let write = JobWrite { events: vec![event], ..JobWrite::default() };
                db.jobs().write(&claim, &write).await.expect("an event");
                let counts = UsageSum { requests: 1, ..UsageSum::default() };
                let row = UsageRow { org: ORG.to_owned(), model: "m".to_owned(), hour: 0, counts };
                db.usage().add(&[row]).await.expect("usage");
                db.files().get(ORG, &file.id).await.expect("reads").expect("is there");
            }
        });
    }
    tasks.join_all().await;
    assert_eq!(rig.count("adapters").await, 64);
    assert_eq!(rig.count("events WHERE kind = 'step'").await, 64);
    assert_eq!(rig.db.usage().sum(ORG, None, 0, 1).await.expect("sums").requests, 64);
    let listed = rig.db.files().list(ORG, None, &Page::first(1000)).await.expect("lists");
    assert_eq!(listed.rows.len(), 65);
}

async fn a_write_cut_short_leaves_nothing(rig: Rig) {
    let file = rig.file(ORG).await;
    for delay in 0..30 {
        let (db, request) = (rig.db.clone(), new_job(ORG, &file.id));
        let task = tokio::spawn(async move { db.jobs().create(&request).await });
        tokio::time::sleep(Duration::from_micros(delay * 150)).await;
        task.abort();
        let _ = task.await;
    }
    // The next writer is not held up, and every job there has its number and its events.
    let created = rig.db.jobs().create(&new_job(ORG, &file.id)).await.expect("creates");
    assert!(matches!(created, JobCreated::New(_)));
    let jobs = rig.count("jobs").await;
    assert_eq!(rig.count("events").await, 2 * jobs);
    let sequence: i64 = sqlx::query_scalar("SELECT value FROM sequences WHERE name = 'jobs'")
        .fetch_one(&rig.raw)
        .await
        .expect("reads");
    assert_eq!(sequence, jobs);
}

async fn a_list_read_while_it_grows_skips_nothing(rig: Rig) {
    let file = rig.file(ORG).await;
    let other = rig.another_process().await;
    let mut writers = tokio::task::JoinSet::new();
    for number in 0..4 {
        let db = if number % 2 == 0 { rig.db.clone() } else { other.clone() };
        let request = new_job(ORG, &file.id);
        writers.spawn(async move {
            for _ in 0..6 {
                db.jobs().create(&request).await.expect("creates");
            }
        });
    }
    // Oldest first, following the end: what commits later must come after the cursor.
    let all = MetadataFilter::default();
    let mut page = Page { order: storage::db::Order::Ascending, ..Page::first(100) };
    let mut seen = Vec::new();
    while seen.len() < 24 {
        let rows = rig.db.jobs().list(ORG, &page, &all).await.expect("lists").rows;
        seen.extend(rows.into_iter().map(|job| job.id));
        page.after = seen.last().cloned();
        if writers.is_empty() {
            break;
        }
        while writers.try_join_next().is_some() {}
    }
    let rest = rig.db.jobs().list(ORG, &page, &all).await.expect("lists").rows;
    seen.extend(rest.into_iter().map(|job| job.id));
    assert_eq!(seen.len(), 24);
    assert_eq!(seen.iter().collect::<HashSet<_>>().len(), 24);
}
