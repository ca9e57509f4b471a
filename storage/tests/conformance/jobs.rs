//! Jobs as the API sees them: creation, lists, cancel, pause, resume.

use serde_json::{Map, Value, json};
use storage::Error;
use storage::db::{
    Idempotency, Intent, JobCreated, JobStatus, MetadataFilter, NewJob, Page, Renewed,
    StatusChange, Transition,
};

use crate::rig::{LONG_MS, ORG, OTHER, Rig, new_job, on_both, status};

on_both!(
    a_new_job_is_validating_with_two_events,
    a_job_is_its_organizations_alone,
    the_same_key_gives_the_same_job,
    a_job_needs_its_files,
    jobs_are_filtered_by_metadata,
    cancel_ends_any_unfinished_job,
    pause_and_resume,
    terminal_jobs_never_change,
    nul_never_reaches_the_rows,
);

async fn a_new_job_is_validating_with_two_events(rig: Rig) {
    let (training, validation) = (rig.file(ORG).await, rig.file(ORG).await);
    let mut request = new_job(ORG, &training.id);
    request.validation_file = Some(validation.id.clone());
    request.metadata = Some(Map::from_iter([("b".into(), json!("2")), ("a".into(), json!(""))]));
    let JobCreated::New(job) = rig.db.jobs().create(&request).await.expect("creates") else {
        panic!("a new job")
    };
    assert_eq!(job.status, JobStatus::ValidatingFiles);
    assert_eq!((job.seed, job.attempt, job.step), (42, 0, 0));
    assert_eq!(job.request, request.request);
    let keys: Vec<_> = job.metadata.iter().flatten().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys, ["b", "a"], "metadata keeps the client's order");
    assert_eq!(rig.db.jobs().get(ORG, &job.id).await.expect("reads"), Some(job.clone()));
    let messages: Vec<_> = rig.events(&job.id).await.into_iter().map(|e| e.message).collect();
    assert_eq!(
        messages,
        [
            format!("Created fine-tuning job: {}", job.id),
            format!(
                "Validating training file: {} and validation file: {}",
                training.id, validation.id
            ),
        ]
    );
}

async fn a_job_is_its_organizations_alone(rig: Rig) {
    let job = rig.job().await;
    let jobs = rig.db.jobs();
    assert_eq!(jobs.get(OTHER, &job.id).await.expect("reads"), None);
    assert_eq!(jobs.of_anyone(&job.id).await.expect("reads"), Some(job.clone()));
    assert_eq!(jobs.of_anyone("ftjob-x").await.expect("reads"), None);
    assert_eq!(jobs.cancel(OTHER, &job.id).await.expect("reads"), Transition::NotFound);
    assert_eq!(jobs.request_pause(OTHER, &job.id).await.expect("reads"), Transition::NotFound);
    assert_eq!(jobs.resume(OTHER, &job.id).await.expect("reads"), Transition::NotFound);
    let all = MetadataFilter::default();
    let listing = jobs.list(OTHER, &Page::first(10), &all).await.expect("lists");
    assert!(listing.rows.is_empty() && !listing.has_more);
    let after = Page { after: Some(job.id.clone()), ..Page::first(10) };
    assert!(matches!(jobs.list(OTHER, &after, &all).await, Err(Error::UnknownCursor(_))));
    let page = Page::first(10);
    let events = rig.db.events().list(OTHER, &job.id, &page).await.expect("lists");
    assert!(events.rows.is_empty());
    let event = rig.events(&job.id).await.remove(0);
    let after = Page { after: Some(event.id), ..Page::first(10) };
    let foreign = rig.db.events().list(OTHER, &job.id, &after).await;
    assert!(matches!(foreign, Err(Error::UnknownCursor(_))));
    assert_eq!(rig.db.resolve(OTHER, &job.id).await.expect("reads"), None);
    // A foreign file is no file.
    let foreign = rig.db.jobs().create(&new_job(OTHER, &job.training_file)).await;
    assert_eq!(foreign.expect("reads"), JobCreated::FileMissing("training_file"));
}

async fn the_same_key_gives_the_same_job(rig: Rig) {
    let file = rig.file(ORG).await;
    let jobs = rig.db.jobs();
    let request = |body: &str| NewJob {
        idempotency: Some(Idempotency { key: "k".to_owned(), body_hash: body.to_owned() }),
        ..new_job(ORG, &file.id)
    };
    let JobCreated::New(first) = jobs.create(&request("a")).await.expect("creates") else {
        panic!("a new job")
    };
    // The first reply comes again even though the job has moved on.
    jobs.cancel(ORG, &first.id).await.expect("cancels");
    let again = jobs.create(&request("a")).await.expect("replays");
    assert_eq!(again, JobCreated::Replayed(first));
    assert_eq!(jobs.create(&request("b")).await.expect("refuses"), JobCreated::KeyReused);
    assert_eq!(rig.count("jobs").await, 1);
}

async fn a_job_needs_its_files(rig: Rig) {
    let file = rig.file(ORG).await;
    let jobs = rig.db.jobs();
    let unknown = jobs.create(&new_job(ORG, "file-unknown")).await.expect("reads");
    assert_eq!(unknown, JobCreated::FileMissing("training_file"));
    let mut request = new_job(ORG, &file.id);
    request.validation_file = Some("file-unknown".to_owned());
    let unknown = jobs.create(&request).await.expect("reads");
    assert_eq!(unknown, JobCreated::FileMissing("validation_file"));
    rig.db.files().delete(ORG, &file.id).await.expect("deletes");
    let deleted = jobs.create(&new_job(ORG, &file.id)).await.expect("reads");
    assert_eq!(deleted, JobCreated::FileMissing("training_file"));
    assert_eq!(rig.count("jobs").await, 0);
}

async fn jobs_are_filtered_by_metadata(rig: Rig) {
    let file = rig.file(ORG).await;
    let mut ids = Vec::new();
    for metadata in
        [Some(json!({"team": "x", "run": "1"})), Some(json!({"team": "x", "run": ""})), None]
    {
        let metadata = metadata.and_then(|value| value.as_object().cloned());
        let request = NewJob { metadata, ..new_job(ORG, &file.id) };
        let JobCreated::New(job) = rig.db.jobs().create(&request).await.expect("creates") else {
            panic!("a new job")
        };
        ids.push(job.id);
    }
    let pairs = |pairs: &[(&str, &str)]| MetadataFilter {
        pairs: pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        absent: false,
    };
    let absent = MetadataFilter { absent: true, ..MetadataFilter::default() };
    for (filter, expected) in [
        (MetadataFilter::default(), vec![2, 1, 0]),
        (pairs(&[("team", "x")]), vec![1, 0]),
        (pairs(&[("team", "x"), ("run", "1")]), vec![0]),
        (pairs(&[("run", "")]), vec![1]),
        (pairs(&[("team", "y")]), vec![]),
        (absent, vec![2]),
    ] {
        let listing = rig.db.jobs().list(ORG, &Page::first(10), &filter).await.expect("lists");
        let found: Vec<_> = listing.rows.into_iter().map(|job| job.id).collect();
        let expected: Vec<_> = expected.into_iter().map(|at: usize| ids[at].clone()).collect();
        assert_eq!(found, expected, "{filter:?}");
    }
    let filter = pairs(&[("team", "x")]);
    let first = rig.db.jobs().list(ORG, &Page::first(1), &filter).await.expect("lists");
    assert!(first.has_more);
    let next = Page { after: Some(first.rows[0].id.clone()), ..Page::first(1) };
    let last = rig.db.jobs().list(ORG, &next, &filter).await.expect("lists");
    assert!(!last.has_more && last.rows[0].id == ids[0]);
}

async fn cancel_ends_any_unfinished_job(rig: Rig) {
    let jobs = rig.db.jobs();
    let validating = rig.job().await;
    let Transition::Done(row) = jobs.cancel(ORG, &validating.id).await.expect("cancels") else {
        panic!("cancelled")
    };
    assert_eq!(row.status, JobStatus::Cancelled);
    assert!(row.finished_at.is_some());

    let claim = rig.running_job("w", LONG_MS).await;
    let cancelled = jobs.cancel(ORG, &claim.job.id).await.expect("cancels");
    assert!(matches!(cancelled, Transition::Done(_)));
    assert_eq!(jobs.renew(&claim, LONG_MS).await.expect("reads"), Renewed::Lost);
    let again = jobs.cancel(ORG, &claim.job.id).await.expect("reads");
    assert_eq!(again, Transition::Refused(JobStatus::Cancelled));
    let last = rig.events(&claim.job.id).await.pop().expect("events");
    assert_eq!(last.kind, "cancelled");
    assert_eq!(rig.claim("w2", LONG_MS).await, None);
    assert_eq!(jobs.cancel(ORG, "ftjob-no").await.expect("reads"), Transition::NotFound);
}

async fn pause_and_resume(rig: Rig) {
    let jobs = rig.db.jobs();
    let queued = rig.queued_job().await;
    let refused = jobs.request_pause(ORG, &queued.id).await.expect("reads");
    assert_eq!(refused, Transition::Refused(JobStatus::Queued));
    let claim = rig.claim("w", LONG_MS).await.expect("a job");
    let kept = jobs.renew(&claim, LONG_MS).await.expect("renews");
    assert_eq!(kept, Renewed::Kept { intent: None });

    for _ in 0..2 {
        let asked = jobs.request_pause(ORG, &queued.id).await.expect("asks");
        assert!(matches!(asked, Transition::Done(row) if row.status == JobStatus::Running));
    }
    let kept = jobs.renew(&claim, LONG_MS).await.expect("renews");
    assert_eq!(kept, Renewed::Kept { intent: Some(Intent::Pause) });
    let refused = jobs.resume(ORG, &queued.id).await.expect("reads");
    assert_eq!(refused, Transition::Refused(JobStatus::Running));

    let mut pause = status(StatusChange::Paused);
    pause.resume_point = Some(7);
    rig.done(&claim, &pause).await;
    let paused = jobs.get(ORG, &queued.id).await.expect("reads").expect("is there");
    assert_eq!((paused.status, paused.intent, paused.owner), (JobStatus::Paused, None, None));
    assert_eq!(rig.claim("w", LONG_MS).await, None, "a paused job is not taken");

    let resumed = jobs.resume(ORG, &queued.id).await.expect("resumes");
    assert!(matches!(resumed, Transition::Done(row) if row.status == JobStatus::Queued));
    let second = rig.claim("w", LONG_MS).await.expect("the job again");
    assert_eq!(second.attempt, claim.attempt + 1);
    assert_eq!(second.job.intent, None);
    assert_eq!(second.job.started_at, claim.job.started_at);
    let kinds: Vec<_> = rig.events(&queued.id).await.into_iter().map(|e| e.kind).collect();
    assert_eq!(
        kinds,
        ["created", "validating", "validated", "started", "paused", "resumed"],
        "started once"
    );
}

async fn terminal_jobs_never_change(rig: Rig) {
    let jobs = rig.db.jobs();
    let claim = rig.running_job("w", LONG_MS).await;
    rig.done(&claim, &crate::rig::success("ft:base:org:mine:abcd1234", 3)).await;
    let before = jobs.get(ORG, &claim.job.id).await.expect("reads").expect("is there");
    assert_eq!(before.status, JobStatus::Succeeded);
    let refused = Transition::Refused(JobStatus::Succeeded);
    assert_eq!(jobs.cancel(ORG, &before.id).await.expect("reads"), refused);
    assert_eq!(jobs.request_pause(ORG, &before.id).await.expect("reads"), refused);
    assert_eq!(jobs.resume(ORG, &before.id).await.expect("reads"), refused);
    jobs.release(&claim).await.expect("is harmless");
    assert_eq!(jobs.get(ORG, &before.id).await.expect("reads"), Some(before));
}

async fn nul_never_reaches_the_rows(rig: Rig) {
    let file = rig.file(ORG).await;
    let with = |change: fn(&mut NewJob)| {
        let mut request = new_job(ORG, &file.id);
        change(&mut request);
        request
    };
    let requests = [
        ("suffix", with(|job| job.suffix = Some("a\0".to_owned()))),
        ("model", with(|job| job.model = "\0".to_owned())),
        ("metadata", with(|job| job.metadata = metadata("k\0", "v"))),
        ("metadata", with(|job| job.metadata = metadata("k", "\0v"))),
    ];
    for (name, request) in requests {
        let refused = rig.db.jobs().create(&request).await;
        assert!(matches!(refused, Err(Error::NulCharacter { field }) if field == name), "{name}");
    }
    // Inside JSON it is an escape and comes back as it was.
    let request = with(|job| job.request = json!({"x": "a\0b"}));
    let JobCreated::New(job) = rig.db.jobs().create(&request).await.expect("creates") else {
        panic!("a new job")
    };
    assert_eq!(job.request, json!({"x": "a\0b"}));
}

fn metadata(name: &str, value: &str) -> Option<Map<String, Value>> {
    Some(Map::from_iter([(name.to_owned(), json!(value))]))
}
