//! What an owner writes: events once and in order, checkpoints, resume points, the end.

use serde_json::json;
use storage::Error;
use storage::db::{
    EventType, JobError, JobStatus, JobWrite, Level, NewEvent, Page, Progress, StatusChange,
};
use storage::objects::ObjectKey;

use crate::rig::{LONG_MS, ORG, OTHER, Rig, checkpoint, metrics, on_both, status, success};

on_both!(
    events_are_unique_and_in_order,
    event_pages_follow_the_sequence,
    a_checkpoint_is_listed_once_per_step,
    only_two_resume_points_are_kept,
    success_writes_everything_at_once,
    a_taken_name_writes_nothing,
    failure_keeps_its_reason,
    progress_is_shown_while_running,
);

fn step(number: i64) -> NewEvent {
    NewEvent {
        event_type: EventType::Metrics,
        data: metrics(number),
        ..NewEvent::info("step", number, format!("Step {number}/9"))
    }
}

async fn events_are_unique_and_in_order(rig: Rig) {
    let old = rig.running_job("w", LONG_MS).await;
    let events = vec![step(1), step(2), NewEvent::info("truncated", 0, "cut \0 here")];
    rig.done(&old, &JobWrite { events: events.clone(), ..JobWrite::default() }).await;
    // Redelivered whole, then by the next attempt with one more.
    rig.done(&old, &JobWrite { events, ..JobWrite::default() }).await;
    rig.db.jobs().release(&old).await.expect("releases");
    let new = rig.claim("w2", LONG_MS).await.expect("the job");
    let again = vec![step(2), step(3), step(3)];
    rig.done(&new, &JobWrite { events: again, ..JobWrite::default() }).await;

    let rows = rig.events(&old.job.id).await;
    let seen: Vec<_> = rows.iter().map(|event| (event.kind.as_str(), event.key)).collect();
    assert_eq!(
        seen,
        [
            ("created", 0),
            ("validating", 0),
            ("validated", 0),
            ("started", 0),
            ("step", 1),
            ("step", 2),
            ("truncated", 0),
            ("step", 3)
        ]
    );
    assert!(rows.is_sorted_by(|a, b| a.sequence < b.sequence));
    assert_eq!(rows[4].data, metrics(1));
    assert_eq!(rows[4].event_type, EventType::Metrics);
    assert_eq!(rows[6].message, "cut \\u0000 here");
    assert!(rows[6].data.is_empty());
}

async fn event_pages_follow_the_sequence(rig: Rig) {
    let claim = rig.running_job("w", LONG_MS).await;
    let events = (1..=5).map(step).collect();
    rig.done(&claim, &JobWrite { events, ..JobWrite::default() }).await;
    let job = claim.job.id.as_str();
    let mut page = Page::first(2);
    let mut seen = Vec::new();
    loop {
        let listing = rig.db.events().list(ORG, job, &page).await.expect("lists");
        seen.extend(listing.rows.iter().map(|event| event.id.clone()));
        page.after = seen.last().cloned();
        if !listing.has_more {
            break;
        }
    }
    let mut expected: Vec<_> = rig.events(job).await.into_iter().map(|event| event.id).collect();
    expected.reverse();
    assert_eq!(seen, expected);
    // Another job's event is no place to continue from.
    let other = rig.job().await;
    let elsewhere = Page { after: Some(rig.events(&other.id).await.remove(0).id), ..page };
    let refused = rig.db.events().list(ORG, job, &elsewhere).await;
    assert!(matches!(refused, Err(Error::UnknownCursor(_))));
}

async fn a_checkpoint_is_listed_once_per_step(rig: Rig) {
    let old = rig.running_job("w", LONG_MS).await;
    let listed =
        |step, name| JobWrite { checkpoint: Some(checkpoint(step, name)), ..JobWrite::default() };
    rig.done(&old, &listed(2, "ft:base:org::AAAA1111:ckpt-step-2")).await;
    rig.db.jobs().release(&old).await.expect("releases");
    let new = rig.claim("w", LONG_MS).await.expect("the job");
    rig.done(&new, &listed(2, "ft:base:org::BBBB2222:ckpt-step-2")).await;
    rig.done(&new, &listed(4, "ft:base:org::CCCC3333:ckpt-step-4")).await;

    let job = old.job.id.as_str();
    let rows = rig.db.checkpoints().list(ORG, job, &Page::first(1)).await.expect("lists");
    assert!(rows.has_more);
    assert_eq!((rows.rows[0].step, rows.rows[0].metrics.clone()), (4, metrics(4)));
    let after = Page { after: Some(rows.rows[0].id.clone()), ..Page::first(1) };
    let next = rig.db.checkpoints().list(ORG, job, &after).await.expect("lists");
    assert!(!next.has_more);
    assert_eq!(next.rows[0].model, "ft:base:org::AAAA1111:ckpt-step-2");
    let foreign = rig.db.checkpoints().list(OTHER, job, &Page::first(9)).await.expect("lists");
    assert!(foreign.rows.is_empty());
    let names = rig.db.adapters().names_of(ORG).await.expect("lists");
    assert_eq!(names.len(), 2, "the repeated step adds no adapter");
    let adapter = rig.db.adapters().by_model(ORG, &rows.rows[0].model).await.expect("reads");
    let adapter = adapter.expect("usable as soon as listed");
    assert_eq!((adapter.job.as_deref(), adapter.step), (Some(job), Some(4)));
    let messages: Vec<_> = rig.events(job).await.into_iter().map(|event| event.message).collect();
    let announced = messages.iter().filter(|text| text.starts_with("Checkpoint created")).count();
    assert_eq!(announced, 2);
    assert!(
        messages.contains(
            &"Checkpoint created at step 2 with Snapshot ID: ft:base:org::AAAA1111:ckpt-step-2"
                .to_owned()
        )
    );
}

async fn only_two_resume_points_are_kept(rig: Rig) {
    let jobs = rig.db.jobs();
    let claim = rig.running_job("w", LONG_MS).await;
    let job = claim.job.id.clone();
    let save = |step| JobWrite { resume_point: Some(step), ..JobWrite::default() };
    let key = |attempt, step| ObjectKey::ResumePoint { job: job.clone(), attempt, step };
    let first = claim.attempt;
    assert_eq!(rig.done(&claim, &save(2)).await, []);
    assert_eq!(rig.done(&claim, &save(4)).await, []);
    assert_eq!(rig.done(&claim, &save(6)).await, [key(first, 2)]);
    assert_eq!(rig.done(&claim, &save(6)).await, [], "a redelivery deletes nothing");
    let points = jobs.resume_points(&job).await.expect("reads");
    assert_eq!(points.iter().map(|point| point.step).collect::<Vec<_>>(), [6, 4]);

    // The next attempt writes step 6 anew: its object counts, the other may go.
    jobs.release(&claim).await.expect("releases");
    let second = rig.claim("w", LONG_MS).await.expect("the job");
    assert_eq!(rig.done(&second, &save(6)).await, [key(first, 6)]);
    let points = jobs.resume_points(&job).await.expect("reads");
    assert_eq!(points[0].key(), key(second.attempt, 6));

    // Cancelled: no owner is left to delete them.
    jobs.cancel(ORG, &job).await.expect("cancels");
    assert_eq!(jobs.take_leftover_resume_points(1).await.expect("takes").len(), 1);
    assert_eq!(jobs.take_leftover_resume_points(9).await.expect("takes"), [key(second.attempt, 6)]);
    assert_eq!(jobs.take_leftover_resume_points(9).await.expect("takes"), []);
}

async fn success_writes_everything_at_once(rig: Rig) {
    let claim = rig.running_job("w", LONG_MS).await;
    let name = "ft:base:org:mine:abcd1234";
    rig.done(&claim, &JobWrite { resume_point: Some(5), ..JobWrite::default() }).await;
    // An earlier attempt may have listed an ordinary checkpoint at the last step.
    let before = JobWrite { checkpoint: Some(checkpoint(9, "ft:old")), ..JobWrite::default() };
    rig.done(&claim, &before).await;
    let mut last = success(name, 9);
    last.events.push(step(9));
    assert_eq!(rig.done(&claim, &last).await.len(), 1, "the resume point may go");

    let job = rig.db.jobs().get(ORG, &claim.job.id).await.expect("reads").expect("row");
    assert_eq!(job.status, JobStatus::Succeeded);
    assert_eq!(job.fine_tuned_model.as_deref(), Some(name));
    assert_eq!((job.trained_tokens, job.owner, job.error), (Some(999), None, None));
    assert!(job.finished_at.is_some() && job.estimated_finish.is_none());
    let file = rig.db.files().get(ORG, &job.result_files[0]).await.expect("reads").expect("file");
    assert_eq!(
        (file.filename.as_str(), file.purpose.as_str()),
        ("step_metrics.csv", "fine-tune-results")
    );
    let adapter = rig.db.adapters().by_model(ORG, name).await.expect("reads").expect("adapter");
    assert_eq!(adapter.job.as_deref(), Some(job.id.as_str()));
    let listed = rig.db.checkpoints().list(ORG, &job.id, &Page::first(9)).await.expect("lists");
    assert_eq!((listed.rows.len(), listed.rows[0].model.as_str()), (1, name));
    let kinds: Vec<_> = rig.events(&job.id).await.into_iter().map(|event| event.kind).collect();
    assert_eq!(kinds[kinds.len() - 3..], ["step", "model", "completed"]);
}

async fn a_taken_name_writes_nothing(rig: Rig) {
    rig.db.adapters().insert(OTHER, &crate::rig::new_adapter("ft:taken")).await.expect("inserts");
    let claim = rig.running_job("w", LONG_MS).await;
    let before = rig.count("events").await;
    let refused = rig.db.jobs().write(&claim, &success("ft:taken", 3)).await;
    assert!(matches!(refused, Err(Error::NameTaken(name)) if name == "ft:taken"));
    let job = rig.db.jobs().get(ORG, &claim.job.id).await.expect("reads").expect("row");
    assert_eq!((job.status, job.fine_tuned_model), (JobStatus::Running, None));
    assert_eq!(rig.count("events").await, before);
    assert_eq!(rig.count("checkpoints").await, 0);
    rig.done(&claim, &success("ft:free", 3)).await;
}

async fn failure_keeps_its_reason(rig: Rig) {
    let claim = rig.running_job("w", LONG_MS).await;
    let error = JobError {
        code: "invalid_training_file".to_owned(),
        message: "bad \0 line".to_owned(),
        param: None,
    };
    rig.done(&claim, &status(StatusChange::Failed(error))).await;
    let job = rig.db.jobs().get(ORG, &claim.job.id).await.expect("reads").expect("row");
    assert_eq!(job.status, JobStatus::Failed);
    assert!(job.finished_at.is_some());
    let shown = job.error.expect("an error");
    assert_eq!(
        (shown.code.as_str(), shown.message.as_str()),
        ("invalid_training_file", "bad \\u0000 line")
    );
    let last = rig.events(&job.id).await.pop().expect("events");
    assert_eq!((last.kind.as_str(), last.level), ("failed", Level::Error));
    assert_eq!(rig.claim("w", LONG_MS).await, None);
}

async fn progress_is_shown_while_running(rig: Rig) {
    let claim = rig.running_job("w", LONG_MS).await;
    let progress = |step, estimated_finish| JobWrite {
        progress: Some(Progress { step, total_steps: 9, estimated_finish }),
        ..JobWrite::default()
    };
    rig.done(&claim, &progress(3, Some(1_900_000_000))).await;
    rig.done(&claim, &progress(4, None)).await;
    let get =
        || async { rig.db.jobs().get(ORG, &claim.job.id).await.expect("reads").expect("row") };
    let job = get().await;
    assert_eq!((job.step, job.total_steps), (4, Some(9)));
    assert_eq!(job.estimated_finish, Some(1_900_000_000), "kept when it cannot be told");
    rig.done(&claim, &status(StatusChange::Paused)).await;
    let job = get().await;
    assert_eq!((job.step, job.estimated_finish), (4, None));
    assert_eq!(job.request, json!({"method": {"type": "supervised"}}));
}
