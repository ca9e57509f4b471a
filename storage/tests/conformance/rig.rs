//! A fresh database per test, and what most tests need in it.

use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Map, Value, json};
use sqlx::{AnyPool, AssertSqlSafe};
use storage::Db;
use storage::db::{
    Claim, Claimant, EventRow, FileRow, Inserted, JobCreated, JobRow, JobWrite, NewAdapter,
    NewCheckpoint, NewFile, NewJob, Page, StatusChange, Written,
};
use storage::ids::{IdKind, alphanumerics, new_id};

/// A lease no test outlives.
pub const LONG_MS: i64 = 600_000;

/// The organization most rows belong to.
pub const ORG: &str = "org-one";

/// Another one.
pub const OTHER: &str = "org-two";

/// Declares a test that runs on both databases; the body is an `async fn(Rig)`.
macro_rules! on_both {
    ($($name:ident),+ $(,)?) => { $(
        mod $name {
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn sqlite() {
                let rig = crate::rig::Rig::sqlite().await;
                super::$name(rig).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn postgres() {
                if let Some(rig) = crate::rig::Rig::postgres().await {
                    let after = rig.clone();
                    super::$name(rig).await;
                    after.remove().await;
                }
            }
        }
    )+ };
}
pub(crate) use on_both;

/// Where a test's rows are.
#[derive(Clone)]
pub struct Rig {
    /// The rows, as one process has them.
    pub db: Db,
    /// Statements of the test's own.
    pub raw: AnyPool,
    place: Place,
}

#[derive(Clone)]
enum Place {
    Folder(std::sync::Arc<tempfile::TempDir>),
    Schema { name: String, url: String },
}

static SCHEMAS: AtomicU32 = AtomicU32::new(0);

impl Rig {
    pub async fn sqlite() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let db = Db::open_folder(folder.path()).await.expect("opens");
        let file = folder.path().join("rows.sqlite3");
        let raw = AnyPool::connect(&format!("sqlite://{}", file.display())).await.expect("raw");
        Self { db, raw, place: Place::Folder(std::sync::Arc::new(folder)) }
    }

    /// None where no server was given; CI insists elsewhere that one is.
    pub async fn postgres() -> Option<Self> {
        let url = std::env::var("LOQUETIER_TEST_POSTGRES_URL").ok()?;
        let (name, url) = Self::new_schema(&url).await;
        let db = Db::open_url(&url).await.expect("opens");
        let raw = AnyPool::connect(&url).await.expect("raw");
        Some(Self { db, raw, place: Place::Schema { name, url } })
    }

    /// An empty schema and the address that uses it.
    pub async fn new_schema(server: &str) -> (String, String) {
        let number = SCHEMAS.fetch_add(1, Ordering::Relaxed);
        let name = format!("t{number}_{}", alphanumerics(12).to_lowercase());
        sqlx::any::install_default_drivers();
        let admin = AnyPool::connect(server).await.expect("the server answers");
        let create = AssertSqlSafe(format!("CREATE SCHEMA {name}"));
        sqlx::query(create).execute(&admin).await.expect("a schema");
        admin.close().await;
        let joint = if server.contains('?') { '&' } else { '?' };
        let url = format!("{server}{joint}options=-c%20search_path%3D{name}");
        (name, url)
    }

    /// The same rows as another process sees them.
    pub async fn another_process(&self) -> Db {
        match &self.place {
            Place::Folder(folder) => Db::open_folder(folder.path()).await.expect("opens again"),
            Place::Schema { url, .. } => Db::open_url(url).await.expect("opens again"),
        }
    }

    /// Folder of the rows in SQLite.
    pub fn folder(&self) -> Option<&std::path::Path> {
        match &self.place {
            Place::Folder(folder) => Some(folder.path()),
            Place::Schema { .. } => None,
        }
    }

    /// Address of the rows in Postgres.
    pub fn url(&self) -> &str {
        match &self.place {
            Place::Folder(_) => panic!("SQLite has no server"),
            Place::Schema { url, .. } => url,
        }
    }

    /// Runs a statement of the test's own.
    pub async fn execute(&self, statement: &'static str) {
        sqlx::query(statement).execute(&self.raw).await.expect(statement);
    }

    /// Counts rows.
    pub async fn count(&self, what: &str) -> i64 {
        let statement = AssertSqlSafe(format!("SELECT CAST(COUNT(*) AS BIGINT) FROM {what}"));
        sqlx::query_scalar(statement).fetch_one(&self.raw).await.expect("a count")
    }

    /// Ends all connections and drops the schema.
    pub async fn remove(self) {
        self.db.close().await;
        if let Place::Schema { name, .. } = &self.place {
            let drop = AssertSqlSafe(format!("DROP SCHEMA {name} CASCADE"));
            sqlx::query(drop).execute(&self.raw).await.expect("drops the schema");
        }
        self.raw.close().await;
    }

    pub async fn file(&self, org: &str) -> FileRow {
        match self.db.files().insert(org, &new_file(), None).await.expect("inserts") {
            Inserted::New(row) => row,
            other => panic!("unexpected {other:?}"),
        }
    }

    /// A new job of [`ORG`] on its own file.
    pub async fn job(&self) -> JobRow {
        let file = self.file(ORG).await;
        match self.db.jobs().create(&new_job(ORG, &file.id)).await.expect("creates") {
            JobCreated::New(row) => row,
            other => panic!("unexpected {other:?}"),
        }
    }

    /// A job whose files have been validated.
    pub async fn queued_job(&self) -> JobRow {
        let job = self.job().await;
        let jobs = self.db.jobs();
        let claim = jobs.claim_validation(&claimant("v"), LONG_MS).await.expect("claims");
        let claim = claim.expect("a job to validate");
        assert_eq!(claim.job.id, job.id);
        self.done(&claim, &status(StatusChange::Queued)).await;
        jobs.get(ORG, &job.id).await.expect("reads").expect("is there")
    }

    /// A job that a worker trains.
    pub async fn running_job(&self, worker: &str, lease_ms: i64) -> Claim {
        self.queued_job().await;
        self.claim(worker, lease_ms).await.expect("a job to train")
    }

    pub async fn claim(&self, worker: &str, lease_ms: i64) -> Option<Claim> {
        self.db.jobs().claim_training(&claimant(worker), lease_ms).await.expect("claims")
    }

    /// A write that must not be lost; returns what is to be deleted.
    pub async fn done(&self, claim: &Claim, write: &JobWrite) -> Vec<storage::objects::ObjectKey> {
        match self.db.jobs().write(claim, write).await.expect("writes") {
            Written::Done { pruned } => pruned,
            Written::Lost => panic!("the claim was lost"),
        }
    }

    /// All events of a job of [`ORG`], oldest first.
    pub async fn events(&self, job: &str) -> Vec<EventRow> {
        let page = Page { order: storage::db::Order::Ascending, ..Page::first(1000) };
        self.db.events().list(ORG, job, &page).await.expect("lists").rows
    }
}

pub fn new_file() -> NewFile {
    NewFile {
        id: new_id(IdKind::File),
        filename: "Übung 1.jsonl".to_owned(),
        purpose: "fine-tune".to_owned(),
        bytes: 1234,
        expires_after_secs: None,
    }
}

pub fn new_job(org: &str, training_file: &str) -> NewJob {
    NewJob {
        org: org.to_owned(),
        model: "base".to_owned(),
        base: "base".to_owned(),
        base_fingerprint: "fp".to_owned(),
        parent: None,
        training_file: training_file.to_owned(),
        validation_file: None,
        suffix: Some("mine".to_owned()),
        seed: 42,
        request: json!({"method": {"type": "supervised"}}),
        metadata: None,
        idempotency: None,
    }
}

pub fn claimant(worker: &str) -> Claimant {
    Claimant {
        worker: worker.to_owned(),
        base: "base".to_owned(),
        base_fingerprint: "fp".to_owned(),
    }
}

pub fn status(change: StatusChange) -> JobWrite {
    JobWrite { status: Some(change), ..JobWrite::default() }
}

pub fn new_adapter(model: &str) -> NewAdapter {
    NewAdapter {
        model: model.to_owned(),
        kind: "lora".to_owned(),
        base: "base".to_owned(),
        base_fingerprint: "fp".to_owned(),
        rank: 8,
        alpha: 16.5,
        use_rslora: true,
        target_modules: vec!["q_proj".to_owned(), "v_proj".to_owned()],
        bytes: 4096,
        version: 1,
        object: "adapters/imported/x".to_owned(),
    }
}

pub fn checkpoint(step: i64, model: &str) -> NewCheckpoint {
    NewCheckpoint { step, metrics: metrics(step), adapter: new_adapter(model) }
}

pub fn metrics(step: i64) -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("step".to_owned(), json!(step));
    map.insert("train_loss".to_owned(), json!(0.25));
    map
}

pub fn success(model: &str, step: i64) -> JobWrite {
    status(StatusChange::Succeeded {
        checkpoint: Box::new(checkpoint(step, model)),
        result_file: NewFile {
            purpose: "fine-tune-results".to_owned(),
            filename: "step_metrics.csv".to_owned(),
            ..new_file()
        },
        trained_tokens: 999,
    })
}
