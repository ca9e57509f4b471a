//! Duties: one process at a time, again after a while, onward from where the last one stopped.

use std::time::Duration;

use storage::db::{Duty, Shift};

use crate::rig::{LONG_MS, Rig, on_both};

on_both!(one_at_a_time, a_dead_holder_is_followed, what_is_due_is_due_once);

async fn take(rig: &Rig, owner: &str, lease_ms: i64) -> Option<Shift> {
    rig.db.duties().take(Duty::Objects, owner, lease_ms).await.expect("takes")
}

async fn one_at_a_time(rig: Rig) {
    let held = take(&rig, "one", LONG_MS).await.expect("is due");
    assert_eq!(held.place, None);
    assert_eq!(take(&rig, "two", LONG_MS).await, None);
    assert_eq!(take(&rig, "one", LONG_MS).await, None, "not even its own");
    let other = rig.db.duties().take(Duty::Rows, "two", LONG_MS).await.expect("takes");
    assert!(other.is_some(), "another duty");
    assert!(rig.db.duties().leave(&held, Some("files/file-a"), 0).await.expect("leaves"));
    let next = take(&rig, "two", LONG_MS).await.expect("is due again");
    assert_eq!(next.place.as_deref(), Some("files/file-a"));
}

async fn a_dead_holder_is_followed(rig: Rig) {
    let begun = take(&rig, "one", LONG_MS).await.expect("is due");
    assert!(rig.db.duties().leave(&begun, Some("files/file-a"), 0).await.expect("leaves"));
    let dead = take(&rig, "one", 1).await.expect("is due");
    tokio::time::sleep(Duration::from_millis(20)).await;
    let next = take(&rig, "two", LONG_MS).await.expect("the lease has run out");
    assert_eq!(next.place.as_deref(), Some("files/file-a"), "nothing was passed over");
    // What wakes again changes nothing.
    assert!(!rig.db.duties().leave(&dead, None, LONG_MS).await.expect("is refused"));
    assert!(rig.db.duties().leave(&next, None, LONG_MS).await.expect("leaves"));
    assert_eq!(take(&rig, "one", LONG_MS).await, None, "not due yet");
}

async fn what_is_due_is_due_once(rig: Rig) {
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..12 {
        let db = rig.another_process().await;
        tasks.spawn(async move {
            let owner = format!("owner-{number}");
            db.duties().take(Duty::Objects, &owner, LONG_MS).await.expect("takes")
        });
    }
    let taken = tasks.join_all().await.into_iter().flatten().count();
    assert_eq!(taken, 1);
}
