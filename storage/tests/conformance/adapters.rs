//! Adapters, bases, names and usage.

use serde_json::json;
use storage::Error;
use storage::db::{
    AdapterDeleted, NewBase, Order, Page, Resolved, StatusChange, UsageRow, UsageSum,
};

use crate::rig::{LONG_MS, ORG, OTHER, Rig, new_adapter, on_both, status, success};

on_both!(
    an_adapter_comes_back_as_it_was,
    an_adapter_is_its_organizations_alone,
    adapters_are_paged,
    names_resolve_to_one_thing_or_none,
    bases_keep_their_first_time,
    usage_adds_up,
);

async fn an_adapter_comes_back_as_it_was(rig: Rig) {
    let adapters = rig.db.adapters();
    let row = adapters.insert(ORG, &new_adapter("ft:a:b:c:d")).await.expect("inserts");
    assert!(row.id.starts_with("adp-"));
    assert_eq!((row.rank, row.alpha, row.use_rslora), (8, 16.5, true));
    assert_eq!(row.target_modules, ["q_proj", "v_proj"]);
    assert_eq!(
        (row.job.as_deref(), row.step, row.last_used_at, row.pinned),
        (None, None, None, false)
    );
    assert_eq!(adapters.get(ORG, &row.id).await.expect("reads"), Some(row.clone()));
    assert_eq!(adapters.get(ORG, &row.model).await.expect("reads"), Some(row.clone()));

    let pinned = adapters.set_pinned(ORG, &row.model, true).await.expect("pins");
    assert!(pinned.expect("is there").pinned);
    let unpinned = adapters.set_pinned(ORG, &row.id, false).await.expect("unpins");
    assert!(!unpinned.expect("is there").pinned);
    let uses = [(row.id.clone(), 500), ("adp-unknown".to_owned(), 1)];
    adapters.touch_used(&uses).await.expect("touches");
    adapters.touch_used(&[(row.id.clone(), 400)]).await.expect("touches");
    let used = adapters.get(ORG, &row.id).await.expect("reads").expect("is there");
    assert_eq!(used.last_used_at, Some(500), "never moved back");
}

async fn an_adapter_is_its_organizations_alone(rig: Rig) {
    let adapters = rig.db.adapters();
    let row = adapters.insert(ORG, &new_adapter("ft:mine")).await.expect("inserts");
    for name in [row.id.as_str(), "ft:mine"] {
        assert_eq!(adapters.get(OTHER, name).await.expect("reads"), None);
        assert_eq!(adapters.delete(OTHER, name).await.expect("reads"), AdapterDeleted::NotFound);
        assert_eq!(adapters.set_pinned(OTHER, name, true).await.expect("reads"), None);
    }
    assert_eq!(adapters.of_anyone(&row.id).await.expect("reads"), Some(row.clone()));
    assert_eq!(adapters.of_anyone("ft:mine").await.expect("reads"), Some(row.clone()));
    assert_eq!(rig.db.resolve(OTHER, "ft:mine").await.expect("reads"), None);
    assert!(adapters.names_of(OTHER).await.expect("lists").is_empty());

    let deleted = adapters.delete(ORG, "ft:mine").await.expect("deletes");
    assert!(matches!(deleted, AdapterDeleted::Deleted(gone) if gone.object == row.object));
    assert_eq!(adapters.delete(ORG, "ft:mine").await.expect("reads"), AdapterDeleted::NotFound);
    assert_eq!(adapters.by_model(ORG, "ft:mine").await.expect("reads"), None);
    assert_eq!(adapters.of_anyone(&row.id).await.expect("reads"), None);
    let taken = adapters.insert(ORG, &new_adapter("ft:mine")).await;
    assert!(matches!(taken, Err(Error::NameTaken(_))), "a name is never given out again");
    let nul = adapters.insert(ORG, &new_adapter("ft:\0")).await;
    assert!(matches!(nul, Err(Error::NulCharacter { field: "model" })));
}

async fn adapters_are_paged(rig: Rig) {
    let adapters = rig.db.adapters();
    for name in ["ft:1", "ft:2", "ft:3"] {
        adapters.insert(ORG, &new_adapter(name)).await.expect("inserts");
    }
    rig.execute("UPDATE adapters SET created_at = 1760000000").await;
    let first = adapters.list(ORG, &Page::first(2)).await.expect("lists");
    assert!(first.has_more);
    assert_eq!(first.rows[1].model, "ft:2");
    for cursor in [first.rows[1].id.clone(), "ft:2".to_owned()] {
        let next = Page { after: Some(cursor), ..Page::first(2) };
        let last = adapters.list(ORG, &next).await.expect("lists");
        assert_eq!((last.rows.len(), last.has_more), (1, false));
        assert_eq!(last.rows[0].model, "ft:1");
    }
    let oldest = Page { order: Order::Ascending, ..Page::first(1) };
    assert_eq!(adapters.list(ORG, &oldest).await.expect("lists").rows[0].model, "ft:1");
    let unknown = Page { after: Some("adp-no".to_owned()), ..Page::first(2) };
    assert!(matches!(adapters.list(ORG, &unknown).await, Err(Error::UnknownCursor(_))));
}

async fn names_resolve_to_one_thing_or_none(rig: Rig) {
    let base = NewBase {
        name: "base".to_owned(),
        fingerprint: "fp".to_owned(),
        context: 1024,
        modules: json!({}),
    };
    rig.db.bases().upsert(&base).await.expect("registers");
    let resolve = async |name: &str| rig.db.resolve(ORG, name).await.expect("reads");
    assert!(matches!(resolve("base").await, Some(Resolved::Base(row)) if row.context == 1024));
    assert_eq!(resolve("unknown").await, None);
    assert_eq!(resolve("ftjob-unknown").await, None);

    let claim = rig.running_job("w", LONG_MS).await;
    let id = claim.job.id.clone();
    assert!(matches!(resolve(&id).await, Some(Resolved::Job(job)) if job.id == id));
    rig.done(&claim, &status(StatusChange::Paused)).await;
    assert!(matches!(resolve(&id).await, Some(Resolved::Job(_))), "paused: last published");
    rig.db.jobs().resume(ORG, &id).await.expect("resumes");
    assert!(matches!(resolve(&id).await, Some(Resolved::Job(_))), "waits to run on");
    let claim = rig.claim("w", LONG_MS).await.expect("the job");
    rig.done(&claim, &success("ft:final", 3)).await;
    for name in [id.as_str(), "ft:final"] {
        let found = resolve(name).await;
        assert!(matches!(found, Some(Resolved::Adapter(row)) if row.model == "ft:final"));
    }
    rig.db.adapters().delete(ORG, "ft:final").await.expect("deletes");
    assert_eq!(resolve("ft:final").await, None);
    assert_eq!(resolve(&id).await, None, "its model is gone");
    let job = rig.db.jobs().get(ORG, &id).await.expect("reads").expect("row");
    assert_eq!(job.fine_tuned_model.as_deref(), Some("ft:final"), "the job keeps the name");

    let queued = rig.queued_job().await;
    assert_eq!(resolve(&queued.id).await, None, "never started");
    rig.db.jobs().cancel(ORG, &queued.id).await.expect("cancels");
    assert_eq!(resolve(&queued.id).await, None);
}

async fn bases_keep_their_first_time(rig: Rig) {
    let bases = rig.db.bases();
    let base = |fingerprint: &str| NewBase {
        name: "b".to_owned(),
        fingerprint: fingerprint.to_owned(),
        context: 64,
        modules: json!({"of": fingerprint}),
    };
    let first = bases.upsert(&base("one")).await.expect("registers");
    assert_eq!(first.fingerprint_before, None);
    rig.execute("UPDATE bases SET created_at = 1000").await;
    let same = bases.upsert(&base("one")).await.expect("registers");
    assert_eq!((same.row.created_at, same.fingerprint_before.as_deref()), (1000, Some("one")));
    let changed = bases.upsert(&base("two")).await.expect("registers");
    assert_eq!(changed.fingerprint_before.as_deref(), Some("one"));
    assert_eq!(changed.row.modules, Some(json!({"of": "two"})));
    assert_eq!(bases.get("b").await.expect("reads"), Some(changed.row.clone()));
    assert_eq!(bases.list().await.expect("lists"), [changed.row]);
    assert_eq!(bases.get("c").await.expect("reads"), None);
}

async fn usage_adds_up(rig: Rig) {
    let usage = rig.db.usage();
    let row = |model: &str, hour, prompt_tokens| UsageRow {
        org: ORG.to_owned(),
        model: model.to_owned(),
        hour,
        counts: UsageSum { requests: 1, prompt_tokens, completion_tokens: 2, trained_tokens: 3 },
    };
    usage.add(&[row("b", 3600, 10), row("a", 3600, 20), row("a", 7200, 30)]).await.expect("adds");
    usage.add(&[row("a", 3600, 5)]).await.expect("adds");
    usage.add(&[]).await.expect("adds nothing");
    let sum = usage.sum(ORG, Some("a"), 3600, 7200).await.expect("sums");
    let expected =
        UsageSum { requests: 2, prompt_tokens: 25, completion_tokens: 4, trained_tokens: 6 };
    assert_eq!(sum, expected);
    assert_eq!(usage.sum(ORG, None, 0, 9000).await.expect("sums").prompt_tokens, 65);
    assert_eq!(usage.sum(OTHER, None, 0, 9000).await.expect("sums"), UsageSum::default());
}
