//! Files: tenancy, expiry, deletion while in use, idempotent upload, pages.

use storage::Error;
use storage::db::{FileDeleted, Idempotency, Inserted, NewFile, Order, Page, StatusChange};

use crate::rig::{LONG_MS, ORG, OTHER, Rig, claimant, new_file, on_both, status};

on_both!(
    a_file_is_its_organizations_alone,
    an_expired_file_is_gone,
    a_file_in_use_stays,
    the_same_key_gives_the_same_file,
    pages_neither_repeat_nor_skip,
    names_without_nul_only,
);

async fn a_file_is_its_organizations_alone(rig: Rig) {
    let file = rig.file(ORG).await;
    let files = rig.db.files();
    assert_eq!(files.get(ORG, &file.id).await.expect("reads"), Some(file.clone()));
    assert_eq!(file.filename, "Übung 1.jsonl");
    assert_eq!(files.get(OTHER, &file.id).await.expect("reads"), None);
    assert_eq!(files.delete(OTHER, &file.id).await.expect("reads"), FileDeleted::NotFound);
    let page = Page { after: Some(file.id.clone()), ..Page::first(10) };
    let foreign = files.list(OTHER, None, &page).await;
    assert!(matches!(foreign, Err(Error::UnknownCursor(id)) if id == file.id));
    assert!(files.list(OTHER, None, &Page::first(10)).await.expect("lists").rows.is_empty());

    assert_eq!(files.delete(ORG, &file.id).await.expect("deletes"), FileDeleted::Deleted);
    assert_eq!(files.delete(ORG, &file.id).await.expect("reads"), FileDeleted::NotFound);
    assert_eq!(files.get(ORG, &file.id).await.expect("reads"), None);
    assert!(matches!(files.list(ORG, None, &page).await, Err(Error::UnknownCursor(_))));
}

async fn an_expired_file_is_gone(rig: Rig) {
    let files = rig.db.files();
    let lives = NewFile { expires_after_secs: Some(3600), ..new_file() };
    let Inserted::New(row) = files.insert(ORG, &lives, None).await.expect("inserts") else {
        panic!("a new file")
    };
    assert_eq!(row.expires_at, Some(row.created_at + 3600));
    assert!(files.get(ORG, &row.id).await.expect("reads").is_some());
    let dead = NewFile { expires_after_secs: Some(-1), ..new_file() };
    files.insert(ORG, &dead, None).await.expect("inserts");
    assert_eq!(files.get(ORG, &dead.id).await.expect("reads"), None);
    assert_eq!(files.delete(ORG, &dead.id).await.expect("reads"), FileDeleted::NotFound);
    let listed = files.list(ORG, None, &Page::first(10)).await.expect("lists");
    assert_eq!(listed.rows, [row]);
}

async fn a_file_in_use_stays(rig: Rig) {
    let job = rig.job().await;
    let files = rig.db.files();
    let used = files.delete(ORG, &job.training_file).await.expect("reads");
    assert_eq!(used, FileDeleted::InUse(job.id.clone()));
    let claim = rig.db.jobs().claim_validation(&claimant("w"), LONG_MS).await.expect("claims");
    let fault = storage::db::JobError {
        code: "invalid_n_examples".to_owned(),
        message: "too few".to_owned(),
        param: Some("training_file".to_owned()),
    };
    rig.done(&claim.expect("a job"), &status(StatusChange::Failed(fault))).await;
    let unused = files.delete(ORG, &job.training_file).await.expect("deletes");
    assert_eq!(unused, FileDeleted::Deleted);
}

async fn the_same_key_gives_the_same_file(rig: Rig) {
    let files = rig.db.files();
    let key = |body: &str| Idempotency { key: "k".to_owned(), body_hash: body.to_owned() };
    let (first, second) = (new_file(), new_file());
    let Inserted::New(row) = files.insert(ORG, &first, Some(&key("a"))).await.expect("inserts")
    else {
        panic!("a new file")
    };
    let again = files.insert(ORG, &second, Some(&key("a"))).await.expect("replays");
    assert_eq!(again, Inserted::Replayed(row));
    let other = files.insert(ORG, &second, Some(&key("b"))).await.expect("refuses");
    assert_eq!(other, Inserted::KeyReused);
    let foreign = files.insert(OTHER, &new_file(), Some(&key("b"))).await.expect("inserts");
    assert!(matches!(foreign, Inserted::New(_)));
    assert_eq!(rig.count("files").await, 2);

    rig.execute("UPDATE idempotency SET expires_ms = 0").await;
    let a_day_later = files.insert(ORG, &second, Some(&key("b"))).await.expect("inserts");
    assert!(matches!(a_day_later, Inserted::New(row) if row.id == second.id));
    assert_eq!(rig.count("idempotency").await, 2, "the expired key is another's");
}

async fn pages_neither_repeat_nor_skip(rig: Rig) {
    let mut made = Vec::new();
    for number in 0..7 {
        let purpose = if number % 2 == 0 { "fine-tune" } else { "batch" };
        let file = NewFile { purpose: purpose.to_owned(), ..new_file() };
        rig.db.files().insert(ORG, &file, None).await.expect("inserts");
        made.push(file.id);
    }
    // All in one second: only the sequence number tells them apart.
    rig.execute("UPDATE files SET created_at = 1760000000").await;
    for (order, limit) in [
        (Order::Ascending, 3),
        (Order::Descending, 3),
        (Order::Descending, 7),
        (Order::Ascending, 1),
    ] {
        let mut expected = made.clone();
        if order == Order::Descending {
            expected.reverse();
        }
        assert_eq!(walk(&rig, None, order, limit).await, expected, "{order:?} by {limit}");
    }
    let even: Vec<_> = made.iter().step_by(2).cloned().collect();
    assert_eq!(walk(&rig, Some("fine-tune"), Order::Ascending, 2).await, even);
}

/// Follows pages to the end; `has_more` must be exact.
async fn walk(rig: &Rig, purpose: Option<&str>, order: Order, limit: u32) -> Vec<String> {
    let mut page = Page { after: None, limit, order };
    let mut seen = Vec::new();
    loop {
        let listing = rig.db.files().list(ORG, purpose, &page).await.expect("lists");
        assert!(!listing.rows.is_empty(), "has_more promised a row");
        assert!(!listing.has_more || listing.rows.len() == limit as usize);
        seen.extend(listing.rows.iter().map(|row| row.id.clone()));
        page.after = seen.last().cloned();
        if !listing.has_more {
            return seen;
        }
    }
}

async fn names_without_nul_only(rig: Rig) {
    let file = NewFile { filename: "a\0b".to_owned(), ..new_file() };
    let refused = rig.db.files().insert(ORG, &file, None).await;
    assert!(matches!(refused, Err(Error::NulCharacter { field: "filename" })));
}
