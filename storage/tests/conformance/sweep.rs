//! The sweeper, on both databases with objects on disk, and on the shared form of both: what goes,
//! what stays, two at once, one that died, another's objects.

use std::time::Duration;

use bytes::Bytes;
use storage::Objects;
use storage::db::{AdapterRef, Duty, Idempotency, JobCreated, NewAdapter, NewFile};
use storage::objects::{ObjectKey, imported_adapter_folder};
use storage::sweep::{SweepSettings, Sweeper, Swept};

use crate::object_rig::Store;
use crate::rig::{LONG_MS, ORG, Rig, new_adapter, new_file, new_job, on_both};

on_both!(
    what_no_row_names_goes,
    young_objects_and_strange_names_stay,
    a_deleted_adapter_stays_for_its_jobs,
    expired_files_are_deleted,
    rows_past_their_time_go,
    anothers_objects_stay,
);

/// Every object is old, every round due at once.
fn hasty() -> SweepSettings {
    SweepSettings {
        period: Duration::ZERO,
        age: Duration::ZERO,
        pass_pause: Duration::ZERO,
        ..SweepSettings::default()
    }
}

fn sweeper(rig: &Rig, objects: &Objects, settings: SweepSettings) -> Sweeper {
    Sweeper::new(rig.db.clone(), objects.clone(), settings)
}

async fn put(objects: &Objects, key: &ObjectKey) {
    objects.put(key, Bytes::from_static(b"x")).await.expect("puts");
}

async fn is_there(objects: &Objects, key: &ObjectKey) -> bool {
    objects.head(key).await.expect("reads").is_some()
}

/// A file with its object.
async fn file(rig: &Rig, objects: &Objects) -> ObjectKey {
    let key = ObjectKey::File { id: rig.file(ORG).await.id };
    put(objects, &key).await;
    key
}

/// An adapter's row and objects.
async fn adapter(rig: &Rig, objects: &Objects, name: &str) -> (AdapterRef, [ObjectKey; 2]) {
    let object = imported_adapter_folder(name);
    let new = NewAdapter { object: object.clone(), ..new_adapter(&format!("ft:{name}")) };
    let row = rig.db.adapters().insert(ORG, &new).await.expect("inserts");
    let keys =
        [ObjectKey::AdapterConfig { object: object.clone() }, ObjectKey::AdapterWeights { object }];
    for key in &keys {
        put(objects, key).await;
    }
    (AdapterRef { id: row.id, model: row.model, object: row.object }, keys)
}

async fn what_no_row_names_goes(rig: Rig) {
    let store = Store::disk();
    check_orphans(&rig, &store).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_row_names_goes_from_s3_too() {
    let (Some(rig), Some(store)) = (Rig::postgres().await, Store::s3()) else { return };
    check_orphans(&rig, &store).await;
    rig.remove().await;
}

async fn check_orphans(rig: &Rig, store: &Store) {
    let objects = &store.objects;
    let mut live = vec![file(rig, objects).await, file(rig, objects).await];
    live.extend(adapter(rig, objects, "kept").await.1);
    let claim = rig.running_job("w", LONG_MS).await;
    let point = |attempt, step| ObjectKey::ResumePoint { job: claim.job.id.clone(), attempt, step };
    put(objects, &point(claim.attempt, 5)).await;
    let write = storage::db::JobWrite { resume_point: Some(5), ..Default::default() };
    rig.done(&claim, &write).await;
    live.push(point(claim.attempt, 5));

    let deleted = file(rig, objects).await;
    let ObjectKey::File { id } = &deleted else { panic!("a file") };
    rig.db.files().delete(ORG, id).await.expect("deletes");
    let mut gone = vec![
        deleted,
        ObjectKey::File { id: "file-never".to_owned() },
        ObjectKey::AdapterWeights { object: imported_adapter_folder("half") },
        point(claim.attempt - 1, 5),
        point(claim.attempt, 6),
    ];
    for key in &gone[1..] {
        put(objects, key).await;
    }
    let (dropped, keys) = adapter(rig, objects, "dropped").await;
    rig.db.adapters().delete(ORG, &dropped.id).await.expect("deletes");
    gone.extend(keys);

    // Three objects a round: the pass goes on from round to round.
    let sweeper = sweeper(rig, objects, SweepSettings { objects: 3, ..hasty() });
    // Without any grace "now" is not yet "before now".
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let (mut rounds, mut removed) = (1, 0);
    loop {
        let swept = sweeper.round().await.expect("sweeps");
        removed += swept.objects;
        if swept.pass_ended {
            break;
        }
        rounds += 1;
    }
    assert_eq!((rounds, removed), (5, gone.len()), "12 objects, and a round that finds no more");
    for key in &live {
        assert!(is_there(objects, key).await, "{key:?}");
    }
    for key in &gone {
        assert!(!is_there(objects, key).await, "{key:?}");
    }
}

async fn young_objects_and_strange_names_stay(rig: Rig) {
    let store = Store::disk();
    let young = ObjectKey::File { id: "file-young".to_owned() };
    put(&store.objects, &young).await;
    let hour = SweepSettings { age: Duration::from_secs(3600), ..hasty() };
    let sweeper = sweeper(&rig, &store.objects, hour);
    let strange = ["files/notes.txt", "adapters/imported/x/readme.md", "resume-points/a"];
    for name in strange {
        store.plant(name);
        store.backdate(name, 99 * 3600);
    }
    store.backdate("files/file-young", 3500);
    assert_eq!(sweeper.round().await.expect("sweeps").objects, 0);
    assert_eq!(store.names().await.len(), 4);
    store.backdate("files/file-young", 3700);
    assert_eq!(sweeper.round().await.expect("sweeps").objects, 1);
    assert_eq!(store.names().await.into_iter().collect::<Vec<_>>().len(), strange.len());
    assert!(!is_there(&store.objects, &young).await);
}

async fn a_deleted_adapter_stays_for_its_jobs(rig: Rig) {
    let store = Store::disk();
    let (parent, keys) = adapter(&rig, &store.objects, "parent").await;
    let training = rig.file(ORG).await.id;
    let job = storage::db::NewJob { parent: Some(parent.clone()), ..new_job(ORG, &training) };
    let created = rig.db.jobs().create(&job).await.expect("creates");
    let JobCreated::New(job) = created else { panic!("a new job") };
    rig.db.adapters().delete(ORG, &parent.id).await.expect("deletes");
    rig.execute("UPDATE adapters SET deleted_at = deleted_at - 7200").await;
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        store.backdate(&format!("{}/{name}", parent.object), 7200);
    }
    let hour = SweepSettings { age: Duration::from_secs(3600), ..hasty() };
    let sweeper = sweeper(&rig, &store.objects, hour);
    assert_eq!(sweeper.round().await.expect("sweeps").objects, 0, "a job continues from it");
    rig.db.jobs().cancel(ORG, &job.id).await.expect("cancels");
    // Deleted just now: requests under way may still fetch it.
    rig.execute("UPDATE adapters SET deleted_at = deleted_at + 7000").await;
    assert_eq!(sweeper.round().await.expect("sweeps").objects, 0, "deleted lately");
    rig.execute("UPDATE adapters SET deleted_at = deleted_at - 7000").await;
    assert_eq!(sweeper.round().await.expect("sweeps").objects, keys.len());
}

async fn expired_files_are_deleted(rig: Rig) {
    let store = Store::disk();
    let mut keys = Vec::new();
    for _ in 0..3 {
        let new = NewFile { expires_after_secs: Some(3600), ..new_file() };
        rig.db.files().insert(ORG, &new, None).await.expect("inserts");
        let key = ObjectKey::File { id: new.id };
        put(&store.objects, &key).await;
        keys.push(key);
    }
    let ObjectKey::File { id } = &keys[0] else { panic!("a file") };
    let created = rig.db.jobs().create(&new_job(ORG, id)).await.expect("creates");
    let JobCreated::New(job) = created else { panic!("a new job") };
    let day = SweepSettings { age: Duration::from_secs(86_400), rows: 1, ..hasty() };
    let sweeper = sweeper(&rig, &store.objects, day);
    assert_eq!(sweeper.round().await.expect("sweeps").files, 0, "not expired yet");
    rig.execute("UPDATE files SET expires_at = expires_at - 9000").await;
    for removed in [1, 1, 0] {
        assert_eq!(sweeper.round().await.expect("sweeps").files, removed, "one a round");
    }
    assert!(is_there(&store.objects, &keys[0]).await, "a job reads it");
    assert_eq!(rig.count("files WHERE deleted_at IS NULL").await, 1);
    rig.db.jobs().cancel(ORG, &job.id).await.expect("cancels");
    assert_eq!(sweeper.round().await.expect("sweeps").files, 1);
    assert!(store.names().await.is_empty());
}

async fn rows_past_their_time_go(rig: Rig) {
    let store = Store::disk();
    for number in 0..5 {
        let key = Idempotency { key: format!("k{number}"), body_hash: "h".to_owned() };
        rig.db.files().insert(ORG, &new_file(), Some(&key)).await.expect("inserts");
    }
    rig.execute("UPDATE idempotency SET expires_ms = 5 WHERE idempotency_key <> 'k0'").await;
    rig.execute("UPDATE idempotency SET expires_ms = 4 WHERE idempotency_key = 'k1'").await;
    let claim = rig.running_job("w", LONG_MS).await;
    let point =
        ObjectKey::ResumePoint { job: claim.job.id.clone(), attempt: claim.attempt, step: 5 };
    put(&store.objects, &point).await;
    let write = storage::db::JobWrite { resume_point: Some(5), ..Default::default() };
    rig.done(&claim, &write).await;

    let day = SweepSettings { age: Duration::from_secs(86_400), rows: 1, ..hasty() };
    let sweeper = sweeper(&rig, &store.objects, day);
    let swept = sweeper.round().await.expect("sweeps");
    assert_eq!(swept, Swept { idempotency: 1, pass_ended: true, ..Swept::default() });
    assert!(is_there(&store.objects, &point).await, "the job runs");
    rig.db.jobs().cancel(ORG, &claim.job.id).await.expect("cancels");
    let swept = sweeper.round().await.expect("sweeps");
    assert_eq!((swept.idempotency, swept.resume_points), (3, 1), "those of one time go together");
    assert_eq!(rig.count("idempotency").await, 1);
    assert!(!is_there(&store.objects, &point).await);
}

async fn anothers_objects_stay(rig: Rig) {
    let store = Store::disk();
    put(&store.objects, &ObjectKey::File { id: "file-a".to_owned() }).await;
    store.backdate("files/file-a", 7200);
    assert!(store.objects.belongs_to("another database").await.expect("asks"));
    assert!(!store.objects.belongs_to("a third one").await.expect("asks"));
    let sweeper = sweeper(&rig, &store.objects, hasty());
    assert_eq!(sweeper.round().await.expect("sweeps").objects, 0);
    assert_eq!(store.names().await.len(), 1);
}

/// Of two that sweep at once each object is removed by one; one that died is followed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_sweepers_share_the_work() {
    let (Some(rig), Some(store)) = (Rig::postgres().await, Store::s3()) else { return };
    for number in 0..40 {
        put(&store.objects, &ObjectKey::File { id: format!("file-{number}") }).await;
    }
    let kept = file(&rig, &store.objects).await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let dead = rig.db.duties().take(Duty::Objects, "dead", 300).await.expect("takes");
    assert!(dead.is_some());
    let settings = SweepSettings { objects: 7, lease: Duration::from_secs(5), ..hasty() };
    let sweepers = [
        Sweeper::new(rig.db.clone(), store.objects.clone(), settings.clone()),
        Sweeper::new(rig.another_process().await, store.open_again(), settings),
    ];
    let sweep = async |sweeper: &Sweeper| {
        let mut removed = 0;
        while store.names().await.len() > 1 {
            removed += sweeper.round().await.expect("sweeps").objects;
        }
        removed
    };
    let all = futures::future::join(sweep(&sweepers[0]), sweep(&sweepers[1]));
    let (one, two) = tokio::time::timeout(Duration::from_secs(30), all).await.expect("ends");
    assert_eq!(one + two, 40);
    assert!(is_there(&store.objects, &kept).await);
    rig.remove().await;
}

/// What a killed process has begun to upload is ended, once it was seen in two passes; others'
/// uploads in the bucket are not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn uploads_of_the_dead_are_ended() {
    let (Some(rig), Some(store), Some(other)) = (Rig::postgres().await, Store::s3(), Store::s3())
    else {
        return;
    };
    let key = ObjectKey::File { id: "file-a".to_owned() };
    for store in [&store, &other] {
        let mut writer = store.objects.writer(&key).await.expect("begins");
        writer.write(vec![7; 9 << 20].into()).await.expect("writes");
        // As a kill does: neither finished nor given up.
        std::mem::forget(writer);
        assert_eq!(store.objects.unfinished_uploads().await.expect("lists").len(), 1);
    }
    let sweeper = sweeper(&rig, &store.objects, hasty());
    let first = sweeper.round().await.expect("sweeps");
    assert_eq!((first.uploads, first.pass_ended), (0, true), "seen once");
    assert_eq!(sweeper.round().await.expect("sweeps").uploads, 1);
    assert_eq!(store.kept().await, 0);
    assert_eq!(other.kept().await, 1);
    assert_eq!(
        sweeper.round().await.expect("sweeps"),
        Swept { pass_ended: true, ..Swept::default() }
    );
    rig.remove().await;
}
