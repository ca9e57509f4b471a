//! Opening and migrating: many at once, folders with odd names, the folder's lock.

use sqlx::AnyPool;
use storage::db::Role;
use storage::{Db, Error, Storage};
use tokio::io::AsyncReadExt;

use crate::rig::{ORG, Rig};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_processes_open_one_folder_at_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let path = folder.path().to_owned();
        tasks.spawn(async move {
            let db = Db::open_folder(&path).await.expect("opens");
            db.keys().create(ORG, Role::Member).await.expect("creates");
            db
        });
    }
    let all = tasks.join_all().await;
    assert_eq!(all[0].keys().list(None).await.expect("lists").len(), 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_processes_open_one_postgres_at_once() {
    let Ok(server) = std::env::var("LOQUETIER_TEST_POSTGRES_URL") else { return };
    let (name, url) = Rig::new_schema(&server).await;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let url = url.clone();
        tasks.spawn(async move {
            let db = Db::open_url(&url).await.expect("opens");
            db.keys().create(ORG, Role::Member).await.expect("creates");
            db.close().await;
        });
    }
    tasks.join_all().await;
    let admin = AnyPool::connect(&url).await.expect("connects");
    let keys: i64 = sqlx::query_scalar("SELECT CAST(COUNT(*) AS BIGINT) FROM api_keys")
        .fetch_one(&admin)
        .await
        .expect("counts");
    assert_eq!(keys, 8);
    let drop = sqlx::AssertSqlSafe(format!("DROP SCHEMA {name} CASCADE"));
    sqlx::query(drop).execute(&admin).await.expect("drops");
}

#[tokio::test]
async fn sqlite_is_set_up_for_many_readers_and_durable_writes() {
    let folder = tempfile::tempdir().expect("a folder");
    let db = Db::open_folder(folder.path()).await.expect("opens");
    db.ping().await.expect("answers");
    let file = format!("sqlite://{}", folder.path().join("rows.sqlite3").display());
    let raw = AnyPool::connect(&file).await.expect("opens");
    let mode: String =
        sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&raw).await.expect("reads");
    assert_eq!(mode, "wal");
}

#[tokio::test]
async fn odd_folder_names_work() {
    let folder = tempfile::tempdir().expect("a folder");
    let odd = folder.path().join("Daten & 100% 'wahr' #1?x=y").join("tief");
    let storage = Storage::open_embedded(&odd).await.expect("opens");
    storage.db.ping().await.expect("answers");
    assert!(odd.join("rows.sqlite3").is_file());
}

#[tokio::test]
async fn a_folder_has_one_serve_and_any_number_of_keys_commands() {
    let folder = tempfile::tempdir().expect("a folder");
    let serve = Storage::open_embedded(folder.path()).await.expect("opens");
    let second = Storage::open_embedded(folder.path()).await;
    let Err(refusal @ Error::FolderInUse(_)) = second else { panic!("two serves in one folder") };
    assert!(refusal.to_string().contains(&folder.path().display().to_string()));

    let beside = Storage::open_rows(folder.path()).await.expect("opens beside");
    let (_, secret) = beside.keys().create(ORG, Role::Member).await.expect("creates");
    assert!(serve.db.keys().any_ever().await.expect("reads"));
    assert!(serve.db.keys().authenticate(&secret).await.expect("reads").is_some());

    let clone = serve.clone();
    drop(serve);
    assert!(Storage::open_embedded(folder.path()).await.is_err(), "a clone still holds it");
    drop(clone);
    Storage::open_embedded(folder.path()).await.expect("free again");
}

#[tokio::test]
async fn rows_survive_a_restart() {
    let folder = tempfile::tempdir().expect("a folder");
    let first = Storage::open_rows(folder.path()).await.expect("opens");
    let (_, secret) = first.keys().create(ORG, Role::Member).await.expect("creates");
    first.close().await;
    assert!(first.ping().await.is_err_and(|error| error.is_unavailable()));
    let second = Storage::open_rows(folder.path()).await.expect("opens again");
    assert!(second.keys().authenticate(&secret).await.expect("reads").is_some());
}

#[tokio::test]
async fn what_cannot_be_opened_is_said() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    std::fs::write(&file, "x").expect("writes");
    let not_a_folder = Storage::open_embedded(&file).await;
    assert!(matches!(not_a_folder, Err(Error::Folder { path, .. }) if path == file));
    for wrong in ["mysql://localhost/x", "sqlite://x", "nothing", ""] {
        assert!(matches!(Db::open_url(wrong).await, Err(Error::DatabaseScheme)), "{wrong}");
    }
    let garbage = folder.path().join("garbage");
    std::fs::create_dir(&garbage).expect("makes");
    std::fs::write(garbage.join("rows.sqlite3"), vec![7; 9000]).expect("writes");
    assert!(Storage::open_rows(&garbage).await.is_err());
    // Port 1 of this machine: refused at once, and known as "away".
    let away = Db::open_url("postgres://x@127.0.0.1:1/x").await.expect_err("nobody listens");
    assert!(away.is_unavailable(), "{away}");
}

/// As a balancer does that has no database behind it just now.
#[tokio::test]
async fn a_connection_closed_without_an_answer_counts_as_away() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let closing = tokio::spawn(async move {
        let (mut connection, _) = listener.accept().await.expect("a connection");
        // Read first: closing over unread bytes would be a reset, which is known to be one.
        let mut request = [0; 8];
        connection.read_exact(&mut request).await.expect("a request");
    });
    let error = Db::open_url(&format!("postgres://x@{address}/x")).await.expect_err("no answer");
    closing.await.expect("closes");
    assert!(error.is_unavailable(), "{error}");
}
