//! Objects on local disk and in S3: whole or absent, and never outside their folder.

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use storage::Error;
use storage::objects::{
    ObjectKey, ObjectKind, Objects, imported_adapter_folder, job_adapter_folder,
};

use crate::object_rig::{Store, on_each_store};

on_each_store!(
    an_object_comes_back_and_goes,
    keys_of_every_kind_are_listed,
    more_objects_than_a_page_are_listed,
    names_cannot_leave_the_folder,
    a_large_object_is_put_whole,
    an_upload_is_visible_only_when_finished,
    an_upload_dropped_half_way_leaves_nothing,
    readers_see_the_old_or_the_new_object_whole,
);

fn file(id: &str) -> ObjectKey {
    ObjectKey::File { id: id.to_owned() }
}

async fn names(objects: &Objects, kind: ObjectKind) -> Vec<String> {
    let entries: Vec<_> = objects.list(kind).try_collect().await.expect("lists");
    let mut names: Vec<_> = entries.into_iter().map(|entry| entry.name).collect();
    names.sort();
    names
}

async fn an_object_comes_back_and_goes(store: Store) {
    let objects = &store.objects;
    let key = file("file-a");
    assert_eq!(objects.head(&key).await.expect("reads"), None);
    let absent = objects.get(&key).await;
    assert!(matches!(absent, Err(Error::ObjectMissing(name)) if name == "files/file-a"));
    assert!(matches!(objects.get_stream(&key).await, Err(Error::ObjectMissing(_))));
    objects.put(&key, Bytes::from_static(b"one")).await.expect("puts");
    objects.put(&key, Bytes::from_static(b"three")).await.expect("replaces");
    assert_eq!(objects.get(&key).await.expect("gets"), "three");
    assert_eq!(objects.head(&key).await.expect("reads"), Some(5));
    objects.delete(&key).await.expect("deletes");
    objects.delete(&key).await.expect("is as good as deleted");
    assert_eq!(objects.head(&key).await.expect("reads"), None);
}

async fn keys_of_every_kind_are_listed(store: Store) {
    let objects = &store.objects;
    let trained = job_adapter_folder("ftjob-j", 2, 30);
    let imported = imported_adapter_folder("abc");
    for key in [
        file("file-a"),
        ObjectKey::AdapterConfig { object: trained.clone() },
        ObjectKey::AdapterWeights { object: trained },
        ObjectKey::AdapterWeights { object: imported },
        ObjectKey::ResumePoint { job: "ftjob-j".to_owned(), attempt: 2, step: 30 },
    ] {
        objects.put(&key, Bytes::from_static(b"x")).await.expect("puts");
    }
    assert_eq!(names(objects, ObjectKind::Files).await, ["files/file-a"]);
    assert_eq!(
        names(objects, ObjectKind::Adapters).await,
        [
            "adapters/ftjob-j/2-30/adapter_config.json",
            "adapters/ftjob-j/2-30/adapter_model.safetensors",
            "adapters/imported/abc/adapter_model.safetensors",
        ]
    );
    assert_eq!(names(objects, ObjectKind::ResumePoints).await, ["resume-points/ftjob-j/2-30"]);
}

async fn more_objects_than_a_page_are_listed(store: Store) {
    let objects = &store.objects;
    let ids: Vec<_> = (0..1100).map(|number| format!("file-{number:04}")).collect();
    let puts = stream::iter(&ids).map(|id| async move {
        objects.put(&file(id), Bytes::from_static(b"x")).await.expect("puts");
    });
    puts.buffer_unordered(8).collect::<()>().await;
    let listed = names(objects, ObjectKind::Files).await;
    let expected: Vec<_> = ids.iter().map(|id| format!("files/{id}")).collect();
    assert_eq!(listed, expected);
}

async fn a_large_object_is_put_whole(store: Store) {
    let objects = &store.objects;
    let bytes: Vec<u8> =
        (0..20_000_003_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let bytes = Bytes::from(bytes);
    objects.put(&file("file-large"), bytes.clone()).await.expect("puts");
    assert_eq!(objects.head(&file("file-large")).await.expect("reads"), Some(20_000_003));
    assert!(objects.get(&file("file-large")).await.expect("gets") == bytes);
    assert_eq!(store.kept().await, 1);
}

async fn names_cannot_leave_the_folder(store: Store) {
    let objects = &store.objects;
    for bad in
        ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "a//b", "a\\b", "ü", "a\0b", "a#1"]
    {
        for key in [file(bad), ObjectKey::AdapterConfig { object: bad.to_owned() }] {
            let refused = objects.put(&key, Bytes::new()).await;
            let fine = bad == "a/b";
            assert!(fine || matches!(refused, Err(Error::ObjectName(_))), "{bad:?}");
        }
    }
}

async fn an_upload_is_visible_only_when_finished(store: Store) {
    let objects = &store.objects;
    let key = file("file-up");
    let chunk = Bytes::from(vec![7_u8; 3 << 20]);
    let mut writer = objects.writer(&key).await.expect("begins");
    for _ in 0..7 {
        writer.write(chunk.clone()).await.expect("writes");
        assert_eq!(objects.head(&key).await.expect("reads"), None);
    }
    assert!(names(objects, ObjectKind::Files).await.is_empty());
    assert_eq!(writer.bytes(), 21 << 20);
    assert_eq!(writer.finish().await.expect("finishes"), 21 << 20);
    let (bytes, stream) = objects.get_stream(&key).await.expect("reads");
    let read: Vec<Bytes> = stream.try_collect().await.expect("reads");
    assert_eq!(bytes, 21 << 20);
    assert!(read.concat().iter().all(|byte| *byte == 7));
    assert_eq!(read.concat().len(), 21 << 20);
    assert_eq!(store.kept().await, 1);

    let empty = objects.writer(&file("file-empty")).await.expect("begins");
    assert_eq!(empty.finish().await.expect("finishes"), 0);
    assert_eq!(objects.get(&file("file-empty")).await.expect("gets"), "");
}

async fn an_upload_dropped_half_way_leaves_nothing(store: Store) {
    let objects = &store.objects;
    objects.put(&file("file-old"), Bytes::from_static(b"old")).await.expect("puts");
    for (id, drop_it) in [("file-new", true), ("file-old", true), ("file-new", false)] {
        let mut writer = objects.writer(&file(id)).await.expect("begins");
        for _ in 0..3 {
            writer.write(Bytes::from(vec![1; 4 << 20])).await.expect("writes");
        }
        if drop_it {
            drop(writer);
        } else {
            writer.abort().await.expect("aborts");
        }
    }
    // Dropping cleans up in the background.
    for _ in 0..100 {
        if store.kept().await == 1 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(store.kept().await, 1);
    assert_eq!(objects.head(&file("file-new")).await.expect("reads"), None);
    assert_eq!(objects.get(&file("file-old")).await.expect("gets"), "old");
}

#[tokio::test]
async fn what_a_killed_process_left_is_removed_at_the_next_start() {
    let store = Store::disk();
    let objects = &store.objects;
    objects.put(&file("file-a"), Bytes::from_static(b"x")).await.expect("puts");
    let mut writer = objects.writer(&file("file-b")).await.expect("begins");
    writer.write(Bytes::from(vec![1; 9 << 20])).await.expect("writes");
    // The process ends here: no destructor runs.
    std::mem::forget(writer);
    assert_eq!(store.kept().await, 2);
    let again = store.open_again();
    assert_eq!(store.kept().await, 1);
    assert_eq!(names(&again, ObjectKind::Files).await, ["files/file-a"]);
}

async fn readers_see_the_old_or_the_new_object_whole(store: Store) {
    let objects = &store.objects;
    let key = file("file-a");
    objects.put(&key, Bytes::from(vec![0; 1 << 20])).await.expect("puts");
    let writer = objects.clone();
    let writing = tokio::spawn(async move {
        for round in 1..20_u8 {
            writer.put(&file("file-a"), Bytes::from(vec![round; 1 << 20])).await.expect("puts");
        }
    });
    while !writing.is_finished() {
        let bytes = objects.get(&key).await.expect("gets");
        assert_eq!(bytes.len(), 1 << 20);
        assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    }
    writing.await.expect("wrote");
}
