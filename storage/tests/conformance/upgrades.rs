//! A database that a newer release has changed: what was only added is no hindrance, what was taken
//! away is said.

use storage::{Db, Error};

use crate::rig::{ORG, Rig, on_both};

on_both!(what_was_added_is_no_hindrance, what_was_taken_away_is_said);

/// Takes a step of a later release.
async fn upgrade(rig: &Rig) {
    rig.execute(
        "INSERT INTO _sqlx_migrations
             (version, description, installed_on, success, checksum, execution_time)
         SELECT 9000, 'later', installed_on, success, checksum, execution_time
         FROM _sqlx_migrations WHERE version = 1",
    )
    .await;
    rig.execute("CREATE TABLE later (name TEXT)").await;
    rig.execute("ALTER TABLE files ADD COLUMN later TEXT").await;
}

/// As each kind of process opens it.
async fn open(rig: &Rig) -> Vec<storage::Result<Db>> {
    match rig.folder() {
        Some(folder) => vec![Db::open_folder(folder).await],
        None => vec![Db::open_shared(rig.url()).await, Db::open_url(rig.url()).await],
    }
}

async fn what_was_added_is_no_hindrance(rig: Rig) {
    let before = rig.file(ORG).await;
    upgrade(&rig).await;
    for opened in open(&rig).await {
        let db = opened.expect("opens");
        assert_eq!(db.files().get(ORG, &before.id).await.expect("reads"), Some(before.clone()));
        db.close().await;
    }
    // Processes that run on while another upgrades.
    let after = rig.file(ORG).await;
    assert_eq!(rig.db.files().get(ORG, &after.id).await.expect("reads"), Some(after));
    assert!(rig.count("_sqlx_migrations").await >= 3, "no step was undone");
}

async fn what_was_taken_away_is_said(rig: Rig) {
    upgrade(&rig).await;
    rig.execute("UPDATE settings SET value = '9000' WHERE name = 'compatible_since'").await;
    for opened in open(&rig).await {
        let Err(error) = opened else { panic!("an old release on a new schema") };
        assert!(matches!(error, Error::SchemaAhead { needed: 9000, .. }), "{error}");
        assert!(error.to_string().contains("upgrade"), "{error}");
    }
}
