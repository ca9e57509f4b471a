//! Rows in SQLite or Postgres through one set of statements (sqlx `Any`, `$1` placeholders;
//! BIGINT, DOUBLE PRECISION and TEXT columns; 0/1 for booleans, JSON as text).
//!
//! Policy: writes run in short transactions begun by [`Db::begin`]; times that decide anything
//! (leases, expiry) are the database's own clock; list order is a `sequences` number drawn inside
//! the inserting transaction, whose row lock makes number order and commit order the same, so a
//! page never misses a row that commits late. Knows no HTTP, no queue and no object bytes.

mod adapters;
mod bases;
mod checkpoints;
mod dialect;
mod duties;
mod events;
mod files;
mod idempotency;
mod jobs;
mod keys;
mod leftovers;
mod migrations;
mod page;
mod reach;
mod resolve;
mod row;
mod usage;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rand::RngExt;
use sqlx::{Any, AnyConnection, AssertSqlSafe, Connection, Transaction};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

pub use adapters::{AdapterDeleted, AdapterName, AdapterRow, Adapters, NewAdapter};
pub use bases::{BaseRow, Bases, NewBase, Upserted};
pub use checkpoints::{CheckpointRow, Checkpoints, NewCheckpoint};
pub use duties::{Duties, Duty, Shift};
pub use events::{EventRow, EventType, Events, Level, NewEvent, event_kind};
pub use files::{FileDeleted, FileRow, Files, NewFile};
pub use idempotency::{Idempotency, Inserted};
pub use jobs::{
    AdapterRef, By, Claim, Claimant, Held, Intent, JobCreated, JobError, JobRow, JobStatus,
    JobWrite, Jobs, MetadataFilter, NewJob, Progress, Renewed, ResumePointRow, StatusChange,
    Transition, Written, may_change,
};
pub use keys::{Caller, KeyRow, Keys, Role};
pub use leftovers::Leftovers;
pub use page::{Listing, Order, Page};
pub use resolve::Resolved;
pub use usage::{Usage, UsageRow, UsageSum};

use crate::error::{Error, Result};
use dialect::Dialect;
pub(crate) use reach::is_away;
use reach::{Bounded, Reach};

/// Name of the SQLite file inside the data folder.
const ROWS_FILE: &str = "rows.sqlite3";

/// Held while a process creates or migrates the SQLite file: switching to WAL and creating tables
/// cannot be retried by SQLite's own busy handler.
const OPENING_FILE: &str = "rows.opening";

/// Within which a database must let a starting process in.
const FIRST_CONNECTION: Duration = Duration::from_secs(15);

/// Runs of one transaction before its collision with others is reported.
const TRANSACTION_RUNS: u32 = 8;

/// The rows. Cheap to clone; all clones share one pool.
#[derive(Clone, Debug)]
pub struct Db {
    pool: Reach,
    dialect: Dialect,
    /// One writer at a time in this process on SQLite: writers queue here in order instead of
    /// polling the file lock. Other processes are handled by the busy timeout.
    writers: Option<Arc<Semaphore>>,
}

impl Db {
    /// Opens (creating and migrating it if need be) the SQLite file in a data folder. Takes no
    /// lock that outlives the call, so `keys create` may run beside `serve`.
    pub async fn open_folder(folder: &Path) -> Result<Self> {
        let opening = crate::folder::lock_while_opening(&folder.join(OPENING_FILE)).await?;
        let url = sqlite_url(&folder.join(ROWS_FILE))?;
        let mut first = Self::first_connection(&url).await?;
        Dialect::Sqlite.set_up(&mut first).await?;
        sqlx::query("PRAGMA journal_mode = WAL").execute(&mut first).await?;
        let mut transaction = first.begin_with(Dialect::Sqlite.begin_write()).await?;
        migrations::run(&mut transaction).await?;
        transaction.commit().await?;
        let db = Self::pooled(Dialect::Sqlite, &url)?;
        // Closed only once the pool holds the file: the last connection to close cleans up, which
        // would keep the next one waiting.
        db.ping().await?;
        first.close().await?;
        drop(opening);
        Ok(db)
    }

    /// Opens and migrates the database at `postgres://…`; sqlx's advisory lock lets any number of
    /// processes start at once.
    pub async fn open_url(url: &str) -> Result<Self> {
        if Dialect::of_url(url) != Some(Dialect::Postgres) {
            return Err(Error::DatabaseScheme);
        }
        let mut first = Self::first_connection(url).await?;
        migrations::run(&mut first).await?;
        first.close().await?;
        Self::pooled(Dialect::Postgres, url)
    }

    /// Brings the database at `postgres://…` up to date; the number of its last step.
    pub async fn migrate(url: &str) -> Result<i64> {
        Self::open_url(url).await?;
        Ok(migrations::last())
    }

    /// Opens a database that [`Db::migrate`] has brought up to date: processes that start together
    /// must not change the schema under each other. [`Error::SchemaBehind`] where steps are
    /// missing; steps of a newer release are no hindrance, they only add.
    pub async fn open_shared(url: &str) -> Result<Self> {
        if Dialect::of_url(url) != Some(Dialect::Postgres) {
            return Err(Error::DatabaseScheme);
        }
        let mut first = Self::first_connection(url).await?;
        migrations::check(&mut first).await?;
        first.close().await?;
        Self::pooled(Dialect::Postgres, url)
    }

    /// A connection outside the pool: a pool retries for seconds and then only says "timed out",
    /// where this says at once what is wrong.
    async fn first_connection(url: &str) -> Result<AnyConnection> {
        sqlx::any::install_default_drivers();
        match timeout(FIRST_CONNECTION, AnyConnection::connect(url)).await {
            Ok(connection) => Ok(connection?),
            Err(_) => Err(Error::Database(sqlx::Error::PoolTimedOut)),
        }
    }

    fn pooled(dialect: Dialect, url: &str) -> Result<Self> {
        let pool = dialect.pool_options().connect_lazy(url)?;
        let pool = Reach::new(pool, dialect.statement_limit());
        let writers = (dialect == Dialect::Sqlite).then(|| Arc::new(Semaphore::new(1)));
        Ok(Self { pool, dialect, writers })
    }

    /// Base models ever served.
    pub fn bases(&self) -> Bases<'_> {
        Bases { db: self }
    }

    /// API keys.
    pub fn keys(&self) -> Keys<'_> {
        Keys { db: self }
    }

    /// Uploaded and result files.
    pub fn files(&self) -> Files<'_> {
        Files { db: self }
    }

    /// Fine-tuning jobs, their claims and resume points.
    pub fn jobs(&self) -> Jobs<'_> {
        Jobs { db: self }
    }

    /// What happened to each job.
    pub fn events(&self) -> Events<'_> {
        Events { db: self }
    }

    /// Listed checkpoints of each job.
    pub fn checkpoints(&self) -> Checkpoints<'_> {
        Checkpoints { db: self }
    }

    /// Adapters, imported or trained.
    pub fn adapters(&self) -> Adapters<'_> {
        Adapters { db: self }
    }

    /// Token counts per organization, model and hour.
    pub fn usage(&self) -> Usage<'_> {
        Usage { db: self }
    }

    /// What one process at a time does for all.
    pub fn duties(&self) -> Duties<'_> {
        Duties { db: self }
    }

    /// What nobody needs any more.
    pub fn leftovers(&self) -> Leftovers<'_> {
        Leftovers { db: self }
    }

    /// Does some reading within `limit` in place of the usual bound of each statement; past it the
    /// database counts as away. A database in this process needs no bound.
    pub async fn within<T>(
        &self,
        limit: Duration,
        reading: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        self.pool.within(limit, reading).await
    }

    /// One round trip: the database answers.
    pub async fn ping(&self) -> Result<()> {
        sqlx::query("SELECT 1").execute(&self.pool).await?;
        Ok(())
    }

    /// Ends all connections; later calls fail.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// Begins a write transaction; dropped without `commit`, nothing of it remains.
    async fn begin(&self) -> Result<Write> {
        let turn = match &self.writers {
            None => None,
            // The semaphore is never closed, so a failed acquire means nothing here.
            Some(writers) => Arc::clone(writers).acquire_owned().await.ok(),
        };
        let transaction = self.pool.begin(self.dialect.begin_write()).await?;
        let reach = self.pool.clone();
        Ok(Write { transaction, reach, dialect: self.dialect, _turn: turn })
    }

    /// The clock expression for statements outside a [`Write`].
    fn now_ms(&self) -> &'static str {
        self.dialect.now_ms()
    }
}

/// A write transaction under way.
struct Write {
    transaction: Transaction<'static, Any>,
    reach: Reach,
    dialect: Dialect,
    _turn: Option<OwnedSemaphorePermit>,
}

impl Write {
    fn connection(&mut self) -> Bounded<'_> {
        self.reach.over(&mut self.transaction)
    }

    fn now_ms(&self) -> &'static str {
        self.dialect.now_ms()
    }

    /// The next list number of `name`; its row stays locked until commit, so numbers become
    /// visible in order.
    async fn next_sequence(&mut self, name: &'static str) -> Result<i64> {
        let number = sqlx::query_scalar(
            "UPDATE sequences SET value = value + 1 WHERE name = $1 RETURNING value",
        )
        .bind(name)
        .fetch_one(self.connection())
        .await?;
        Ok(number)
    }

    async fn commit(self) -> Result<()> {
        self.reach.commit(self.transaction).await?;
        Ok(())
    }
}

/// Decides whether a failed transaction runs again.
struct Patience {
    runs: u32,
}

impl Patience {
    fn new() -> Self {
        Self { runs: 0 }
    }

    /// True after a short random pause if `error` was a collision and runs are left.
    async fn again(&mut self, error: &Error) -> bool {
        self.runs += 1;
        if !error.is_transient() || self.runs >= TRANSACTION_RUNS {
            return false;
        }
        let pause_ms = rand::rng().random_range(1..=10 << self.runs.min(5));
        tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        true
    }
}

/// Runs a transaction (an expression that begins and commits its own) until it does not collide.
macro_rules! patiently {
    ($transaction:expr) => {{
        let mut patience = crate::db::Patience::new();
        loop {
            match $transaction.await {
                Err(error) if patience.again(&error).await => continue,
                outcome => break outcome,
            }
        }
    }};
}
use patiently;

/// A statement put together from constants of this crate; values are always bound.
fn sql(text: String) -> AssertSqlSafe<String> {
    AssertSqlSafe(text)
}

/// Refuses what Postgres cannot store as text.
fn without_nul(field: &'static str, text: &str) -> Result<()> {
    if text.contains('\0') { Err(Error::NulCharacter { field }) } else { Ok(()) }
}

/// The address of a file, percent-encoded so that any folder name works.
fn sqlite_url(file: &Path) -> Result<String> {
    let text = file.to_str().ok_or_else(|| Error::Folder {
        path: file.to_owned(),
        source: std::io::Error::other("the path is not valid UTF-8"),
    })?;
    let encoded: String = text
        .bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect();
    Ok(format!("sqlite://{encoded}?mode=rwc"))
}
