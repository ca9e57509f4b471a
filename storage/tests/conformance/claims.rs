//! Leases and fencing: one owner at a time, takeover after a lapse, the old owner writes nothing.

use std::collections::HashSet;
use std::time::Duration;

use storage::db::{
    Claim, Claimant, Intent, JobStatus, JobWrite, NewEvent, Progress, Renewed, StatusChange,
    Transition, Written,
};

use crate::rig::{LONG_MS, ORG, Rig, checkpoint, claimant, on_both, status, success};

on_both!(
    the_oldest_job_of_the_base_is_claimed,
    each_job_gets_exactly_one_owner,
    a_lapsed_lease_is_taken_over,
    a_lapsed_lease_nobody_took_is_renewed,
    a_released_job_is_free_at_once,
    validation_is_claimed_apart,
    a_job_that_ends_its_workers_fails,
    only_claims_without_progress_count,
    a_worker_finds_what_it_holds,
);

/// Longer than the short leases here, shorter than patience.
async fn lapse() {
    tokio::time::sleep(Duration::from_millis(30)).await;
}

async fn the_oldest_job_of_the_base_is_claimed(rig: Rig) {
    let first = rig.queued_job().await;
    let second = rig.queued_job().await;
    let jobs = rig.db.jobs();
    for other in [
        Claimant { base: "another".to_owned(), ..claimant("w") },
        Claimant { base_fingerprint: "other weights".to_owned(), ..claimant("w") },
    ] {
        assert_eq!(jobs.claim_training(&other, LONG_MS).await.expect("reads"), None);
    }
    let claim = rig.claim("w", LONG_MS).await.expect("a job");
    assert_eq!(claim.job.id, first.id);
    assert_eq!(claim.job.status, JobStatus::Running);
    assert_eq!(claim.job.owner.as_deref(), Some("w"));
    assert!(claim.job.started_at.is_some());
    assert_eq!(rig.claim("w", LONG_MS).await.expect("a job").job.id, second.id);
    assert_eq!(rig.claim("w", LONG_MS).await, None);
}

async fn each_job_gets_exactly_one_owner(rig: Rig) {
    const JOBS: usize = 12;
    for _ in 0..JOBS {
        rig.queued_job().await;
    }
    let other = rig.another_process().await;
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..8 {
        let db = if number % 2 == 0 { rig.db.clone() } else { other.clone() };
        tasks.spawn(async move {
            let me = claimant(&format!("w{number}"));
            let mut mine = Vec::new();
            while let Some(claim) = db.jobs().claim_training(&me, LONG_MS).await.expect("claims") {
                mine.push(claim);
            }
            mine
        });
    }
    let claims: Vec<_> = tasks.join_all().await.into_iter().flatten().collect();
    let ids: HashSet<_> = claims.iter().map(|claim| claim.job.id.clone()).collect();
    assert_eq!((claims.len(), ids.len()), (JOBS, JOBS));
    for claim in &claims {
        let row = rig.db.jobs().get(ORG, &claim.job.id).await.expect("reads").expect("row");
        assert_eq!((row.owner, row.attempt), (Some(claim.owner.clone()), claim.attempt));
    }
}

async fn a_lapsed_lease_is_taken_over(rig: Rig) {
    let jobs = rig.db.jobs();
    let old = rig.running_job("old", 5).await;
    lapse().await;
    let new = rig.claim("new", LONG_MS).await.expect("the lapsed job");
    assert_eq!((new.job.id.as_str(), new.attempt), (old.job.id.as_str(), old.attempt + 1));
    assert_eq!(rig.claim("third", LONG_MS).await, None);

    let before = rig.count("events").await;
    let event = NewEvent::info("step", 1, "Step 1/2");
    for write in [
        JobWrite { events: vec![event], resume_point: Some(1), ..JobWrite::default() },
        JobWrite { checkpoint: Some(checkpoint(1, "ft:a")), ..JobWrite::default() },
        status(StatusChange::Paused),
        success("ft:b", 2),
        JobWrite::default(),
    ] {
        assert_eq!(jobs.write(&old, &write).await.expect("reads"), Written::Lost);
    }
    assert_eq!(jobs.renew(&old, LONG_MS).await.expect("reads"), Renewed::Lost);
    jobs.release(&old).await.expect("is harmless");
    assert_eq!(rig.count("events").await, before);
    assert_eq!(rig.count("adapters").await + rig.count("resume_points").await, 0);
    let kept = jobs.renew(&new, LONG_MS).await.expect("renews");
    assert!(matches!(kept, Renewed::Kept { .. }));
}

async fn a_lapsed_lease_nobody_took_is_renewed(rig: Rig) {
    let jobs = rig.db.jobs();
    let claim = rig.running_job("w", 5).await;
    lapse().await;
    let kept = jobs.renew(&claim, LONG_MS).await.expect("renews");
    assert!(matches!(kept, Renewed::Kept { .. }));
    assert_eq!(rig.claim("other", LONG_MS).await, None);
    rig.done(&claim, &JobWrite::default()).await;
}

async fn a_released_job_is_free_at_once(rig: Rig) {
    let claim = rig.running_job("w", LONG_MS).await;
    rig.db.jobs().release(&claim).await.expect("releases");
    let row = rig.db.jobs().get(ORG, &claim.job.id).await.expect("reads").expect("row");
    assert_eq!((row.status, row.owner), (JobStatus::Running, None));
    assert_eq!(
        rig.db.jobs().write(&claim, &JobWrite::default()).await.expect("reads"),
        Written::Lost
    );
    // The same worker, started again, is another attempt.
    let again = rig.claim("w", LONG_MS).await.expect("the released job");
    assert_eq!(again.attempt, claim.attempt + 1);
    // Same name, but the number tells them apart.
    let jobs = rig.db.jobs();
    let stale = jobs.write(&claim, &success("ft:stale", 3)).await.expect("reads");
    assert_eq!(stale, Written::Lost);
    assert_eq!(jobs.renew(&claim, LONG_MS).await.expect("reads"), Renewed::Lost);
    jobs.release(&claim).await.expect("is harmless");
    assert_eq!(rig.claim("other", LONG_MS).await, None, "the new claim still holds");
}

async fn validation_is_claimed_apart(rig: Rig) {
    let jobs = rig.db.jobs();
    let job = rig.job().await;
    assert_eq!(rig.claim("w", LONG_MS).await, None, "not validated yet");
    let me = claimant("w");
    let first = jobs.claim_validation(&me, 5).await.expect("claims").expect("a job");
    assert_eq!((first.job.id.as_str(), first.job.started_at), (job.id.as_str(), None));
    lapse().await;
    let second = jobs.claim_validation(&me, LONG_MS).await.expect("claims").expect("again");
    assert_eq!(second.attempt, first.attempt + 1);
    assert_eq!(jobs.claim_validation(&me, LONG_MS).await.expect("reads"), None);
    let queued = status(StatusChange::Queued);
    assert_eq!(jobs.write(&first, &queued).await.expect("reads"), Written::Lost);
    // Only what the table allows: nothing succeeds out of validation.
    assert_eq!(jobs.write(&second, &success("ft:x", 1)).await.expect("reads"), Written::Lost);
    let mut resolved = queued;
    resolved.resolved = Some(serde_json::json!({"n_epochs": 3}));
    rig.done(&second, &resolved).await;
    let claim = rig.claim("w", LONG_MS).await.expect("queued now");
    assert_eq!(claim.job.resolved, Some(serde_json::json!({"n_epochs": 3})));
}

/// A worker takes the job, perhaps gets as far as `step`, and dies.
async fn claimed_and_lost(rig: &Rig, worker: &str, step: Option<i64>) -> Option<Claim> {
    let claim = rig.claim(worker, 5).await?;
    if let Some(step) = step {
        let progress = Some(Progress { step, total_steps: 9, estimated_finish: None });
        rig.done(&claim, &JobWrite { progress, ..JobWrite::default() }).await;
    }
    lapse().await;
    Some(claim)
}

async fn a_job_that_ends_its_workers_fails(rig: Rig) {
    let job = rig.queued_job().await;
    let other = rig.queued_job().await;
    let mut last = None;
    // The first one gets to step 4, the ones after it no further.
    for (worker, step) in [("a", Some(4)), ("b", Some(4)), ("c", None), ("d", Some(3))] {
        last = claimed_and_lost(&rig, worker, step).await;
        assert_eq!(last.as_ref().map(|claim| claim.job.id.as_str()), Some(job.id.as_str()));
    }
    // The next one is spared, and goes on with the job behind it.
    assert_eq!(rig.claim("e", LONG_MS).await.expect("the other job").job.id, other.id);
    let row = rig.db.jobs().get(ORG, &job.id).await.expect("reads").expect("row");
    assert_eq!((row.status, row.owner), (JobStatus::Failed, None));
    assert!(row.finished_at.is_some());
    let error = row.error.expect("says why");
    assert_eq!(error.code, "worker_lost");
    assert!(error.message.contains("training was tried 3 times"), "{}", error.message);
    let events = rig.events(&job.id).await;
    assert_eq!(events.last().map(|event| event.message.clone()), Some(error.message));
    // The last one was only slow, and comes too late.
    let last = last.expect("a claim");
    assert_eq!(rig.db.jobs().renew(&last, LONG_MS).await.expect("reads"), Renewed::Lost);
    let late = rig.db.jobs().write(&last, &success("ft:late", 9)).await.expect("reads");
    assert_eq!(late, Written::Lost);

    let unchecked = rig.job().await;
    let me = claimant("v");
    for _ in 0..3 {
        let claim = rig.db.jobs().claim_validation(&me, 5).await.expect("claims");
        assert_eq!(claim.expect("a job").job.id, unchecked.id);
        lapse().await;
    }
    assert_eq!(rig.db.jobs().claim_validation(&me, 5).await.expect("reads"), None);
    let row = rig.db.jobs().get(ORG, &unchecked.id).await.expect("reads").expect("row");
    assert_eq!(row.status, JobStatus::Failed);
    assert!(row.error.expect("says why").message.contains("checking its files"));
}

async fn only_claims_without_progress_count(rig: Rig) {
    let job = rig.queued_job().await;
    // Two lost, a step further, two lost, a step further …
    for (round, step) in
        [None, None, Some(1), None, None, Some(2), Some(2), Some(1)].iter().enumerate()
    {
        let claim = claimed_and_lost(&rig, "w", *step).await;
        assert!(claim.is_some(), "claim {round}");
    }
    // Given back is not lost, however often.
    for _ in 0..5 {
        let claim = rig.claim("w", LONG_MS).await.expect("a job");
        rig.db.jobs().release(&claim).await.expect("releases");
    }
    // A pause starts anew.
    let claim = rig.claim("w", LONG_MS).await.expect("a job");
    rig.done(&claim, &status(StatusChange::Paused)).await;
    let resumed = rig.db.jobs().resume(ORG, &job.id).await.expect("resumes");
    assert!(matches!(resumed, Transition::Done(_)));
    for round in 0..3 {
        assert!(claimed_and_lost(&rig, "w", Some(2)).await.is_some(), "claim {round}");
    }
    assert_eq!(rig.claim("w", LONG_MS).await, None);
}

async fn a_worker_finds_what_it_holds(rig: Rig) {
    let jobs = rig.db.jobs();
    let first = rig.running_job("w", LONG_MS).await;
    let second = rig.running_job("w", LONG_MS).await;
    rig.running_job("another", LONG_MS).await;
    jobs.request_pause(ORG, &second.job.id).await.expect("asks");
    let held = async || {
        let mut held = jobs.held_by("w").await.expect("reads");
        held.sort_by_key(|held| held.intent.is_some());
        held.into_iter().map(|held| (held.id, held.attempt, held.intent)).collect::<Vec<_>>()
    };
    let second = (second.job.id.clone(), second.attempt, Some(Intent::Pause));
    let kept = (first.job.id.clone(), first.attempt, None);
    assert_eq!(held().await, [kept, second.clone()]);
    jobs.cancel(ORG, &first.job.id).await.expect("cancels");
    assert_eq!(held().await, [second]);
    assert_eq!(jobs.held_by("nobody").await.expect("reads"), []);
}
