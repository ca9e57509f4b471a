//! The only place where SQLite and Postgres differ: the database's clock, how a write transaction
//! begins, and what a fresh connection is told. Every other statement is the same text on both.

use std::time::Duration;

use sqlx::any::AnyPoolOptions;
use sqlx::{AnyConnection, Connection, Executor};
use tokio::time::timeout;

/// How long SQLite waits for another process's writer before it reports BUSY. Our transactions
/// take milliseconds; this only has to outlast a slow disk.
const BUSY_TIMEOUT_MS: u64 = 10_000;

/// Longest wait for a pooled connection to SQLite: for a reader's turn.
const SQLITE_ACQUIRE: Duration = Duration::from_secs(10);

/// For one statement on Postgres with its connection; past it the database counts as away. Longer
/// than what the server itself allows, so that a slow statement is told from a silent server.
const POSTGRES_LIMIT: Duration = Duration::from_secs(5);

/// What the server allows a statement, in milliseconds.
const SERVER_LIMIT_MS: u32 = 4_000;

/// For a connection that comes back to the pool to show that it is still good.
const RELEASE_LIMIT: Duration = Duration::from_secs(2);

/// Connections per process to SQLite: readers beside one writer; each is a thread.
const SQLITE_CONNECTIONS: u32 = 6;

/// Connections per process to Postgres: statements are short, and its default limit of 100 has
/// to carry several gateways and workers.
const POSTGRES_CONNECTIONS: u32 = 8;

/// Which database is behind the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    Sqlite,
    Postgres,
}

impl Dialect {
    /// By the address's scheme.
    pub(super) fn of_url(url: &str) -> Option<Self> {
        match url.split_once(':')?.0 {
            "sqlite" => Some(Self::Sqlite),
            "postgres" | "postgresql" => Some(Self::Postgres),
            _ => None,
        }
    }

    /// SQL expression for the database's clock in Unix milliseconds, a BIGINT.
    pub(super) fn now_ms(self) -> &'static str {
        match self {
            Self::Sqlite => "CAST(unixepoch('subsec') * 1000 AS INTEGER)",
            Self::Postgres => "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)",
        }
    }

    /// Begins a write transaction. SQLite must take its write lock here: a transaction that reads
    /// first and writes later fails with BUSY, unretried, when another wrote in between.
    pub(super) fn begin_write(self) -> &'static str {
        match self {
            Self::Sqlite => "BEGIN IMMEDIATE",
            Self::Postgres => "BEGIN ISOLATION LEVEL READ COMMITTED",
        }
    }

    /// Pool limits and the settings of each connection.
    pub(super) fn pool_options(self) -> AnyPoolOptions {
        let (connections, acquire) = match self {
            Self::Sqlite => (SQLITE_CONNECTIONS, SQLITE_ACQUIRE),
            Self::Postgres => (POSTGRES_CONNECTIONS, POSTGRES_LIMIT),
        };
        let options = AnyPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(acquire)
            .after_connect(move |connection, _| Box::pin(self.set_up(connection)));
        match self {
            Self::Sqlite => options,
            // A statement given up leaves its connection waiting for the answer; one that does not
            // come must not keep the connection's place in the pool.
            Self::Postgres => options.after_release(|connection, _| {
                Box::pin(async move {
                    let answered = timeout(RELEASE_LIMIT, connection.ping()).await;
                    Ok(matches!(answered, Ok(Ok(()))))
                })
            }),
        }
    }

    /// For one statement with its connection; none where the database is in this process.
    pub(super) fn statement_limit(self) -> Option<Duration> {
        match self {
            Self::Sqlite => None,
            Self::Postgres => Some(POSTGRES_LIMIT),
        }
    }

    /// Tells a fresh connection how long to wait and what to keep.
    pub(super) async fn set_up(self, connection: &mut AnyConnection) -> sqlx::Result<()> {
        match self {
            // FULL: what a commit promised survives a power cut too; a resume point's object is
            // deleted on the strength of it.
            Self::Sqlite => {
                let busy = format!("PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}");
                connection.execute(sqlx::AssertSqlSafe(busy)).await?;
                connection.execute("PRAGMA foreign_keys = ON").await?;
                connection.execute("PRAGMA synchronous = FULL").await?;
            }
            // A hung peer must not hold rows or connections for ever.
            Self::Postgres => {
                let limit = format!("SET statement_timeout = {SERVER_LIMIT_MS}");
                connection.execute(sqlx::AssertSqlSafe(limit)).await?;
                connection.execute("SET idle_in_transaction_session_timeout = '30s'").await?;
            }
        }
        Ok(())
    }
}
