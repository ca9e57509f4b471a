//! Keys: shown once, hashed, revoked; the end of open access is for good.

use storage::db::Role;

use crate::rig::{ORG, OTHER, Rig, on_both};

on_both!(a_key_authenticates_until_revoked, keys_are_listed_newest_first, no_secret_is_stored);

async fn a_key_authenticates_until_revoked(rig: Rig) {
    let keys = rig.db.keys();
    assert!(!keys.any_ever().await.expect("reads"));
    let (row, secret) = keys.create(ORG, Role::Operator).await.expect("creates");
    assert!(secret.starts_with("sk-") && secret.len() > 40);
    assert!(keys.any_ever().await.expect("reads"));

    let caller = keys.authenticate(&secret).await.expect("reads").expect("is valid");
    assert_eq!((caller.org.as_str(), caller.role), (ORG, Role::Operator));
    assert_eq!(caller.key_id, row.id);
    for wrong in ["", "sk-", &secret[..secret.len() - 1], &format!("{secret}x")] {
        assert_eq!(keys.authenticate(wrong).await.expect("reads"), None, "{wrong:?}");
    }

    assert!(keys.revoke(&row.id).await.expect("revokes"));
    assert_eq!(keys.authenticate(&secret).await.expect("reads"), None);
    assert!(keys.revoke(&row.id).await.expect("revoking again is no error"));
    assert!(!keys.revoke("key-nothing").await.expect("reads"));
    assert!(keys.any_ever().await.expect("reads"), "revoked keys still count");
}

async fn keys_are_listed_newest_first(rig: Rig) {
    let keys = rig.db.keys();
    let (first, _) = keys.create(ORG, Role::Member).await.expect("creates");
    let (second, _) = keys.create(OTHER, Role::Member).await.expect("creates");
    let ids = |rows: Vec<storage::db::KeyRow>| rows.into_iter().map(|r| r.id).collect::<Vec<_>>();
    assert_eq!(ids(keys.list(None).await.expect("lists")), [second.id, first.id.clone()]);
    assert_eq!(ids(keys.list(Some(ORG)).await.expect("lists")), [first.id]);
    // Another process sees the key at once.
    assert!(rig.another_process().await.keys().any_ever().await.expect("reads"));
}

async fn no_secret_is_stored(rig: Rig) {
    let (row, secret) = rig.db.keys().create(ORG, Role::Member).await.expect("creates");
    let stored: (String, String, String) =
        sqlx::query_as("SELECT lookup, secret_hash, hint FROM api_keys WHERE id = $1")
            .bind(&row.id)
            .fetch_one(&rig.raw)
            .await
            .expect("reads");
    for text in [stored.0, stored.1, stored.2, row.hint] {
        assert!(!text.contains(&secret[8..secret.len() - 8]), "{text}");
    }
}
