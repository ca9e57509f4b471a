//! The way to the database, every wait on it bounded. A database that refuses, breaks off or stays
//! silent counts as away: from then on calls fail at once, so that nobody queues behind it, until
//! a probe in the background has been answered.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryFutureExt, TryStreamExt, stream};
use sqlx::Transaction;
use sqlx::any::{AnyQueryResult, AnyRow, AnyStatement, AnyTypeInfo};
use sqlx::{Any, AnyConnection, AnyPool, Connection, Either, Execute, Executor, SqlStr};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::error::{Error, Result};

/// For one probe with its connection.
const PROBE_LIMIT: Duration = Duration::from_secs(1);

/// Between two probes.
const PROBE_PAUSE: Duration = Duration::from_millis(200);

/// How long a call waits for a probe under way: a single broken connection is not an outage.
const PROBE_GRACE: Duration = Duration::from_millis(50);

/// The pool, and whether the database answers as far as this process knows.
#[derive(Clone, Debug)]
pub(super) struct Reach {
    pool: AnyPool,
    /// For one statement with its connection; none: a database in this process, never away.
    limit: Option<Duration>,
    away: Arc<watch::Sender<bool>>,
}

impl Reach {
    pub(super) fn new(pool: AnyPool, limit: Option<Duration>) -> Self {
        Self { pool, limit, away: Arc::new(watch::Sender::new(false)) }
    }

    /// Begins a transaction.
    pub(super) async fn begin(
        &self,
        statement: &'static str,
    ) -> sqlx::Result<Transaction<'static, Any>> {
        self.bounded(self.pool.begin_with(statement)).await
    }

    /// Ends a transaction.
    pub(super) async fn commit(&self, transaction: Transaction<'static, Any>) -> sqlx::Result<()> {
        self.bounded(transaction.commit()).await
    }

    /// A connection outside the pool's own methods, its statements bounded likewise.
    pub(super) fn over<'c>(&'c self, connection: &'c mut AnyConnection) -> Bounded<'c> {
        Bounded { connection, reach: self }
    }

    /// Does some reading within a limit of its own.
    pub(super) async fn within<T>(
        &self,
        limit: Duration,
        reading: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        if self.limit.is_none() {
            return reading.await;
        }
        match timeout(limit, reading).await {
            Ok(outcome) => outcome,
            Err(_) => {
                self.note_away(&silent());
                Err(Error::Database(silent()))
            }
        }
    }

    pub(super) async fn close(&self) {
        self.pool.close().await;
    }

    async fn bounded<T>(&self, work: impl Future<Output = sqlx::Result<T>>) -> sqlx::Result<T> {
        let Some(limit) = self.limit else { return work.await };
        if *self.away.borrow() {
            let mut news = self.away.subscribe();
            // The sender is this one's own, so only the time can run out.
            timeout(PROBE_GRACE, news.wait_for(|away| !away)).await.map_err(|_| silent())?.ok();
        }
        let outcome = timeout(limit, work).await.unwrap_or_else(|_| Err(silent()));
        if let Err(error) = &outcome
            && is_away(error)
        {
            self.note_away(error);
        }
        outcome
    }

    fn note_away(&self, error: &sqlx::Error) {
        if !self.away.send_replace(true) {
            tracing::warn!(%error, "the database is away");
            tokio::spawn(probe(self.pool.clone(), Arc::downgrade(&self.away)));
        }
    }
}

/// Asks until the database answers, or nobody is left who wants to know.
async fn probe(pool: AnyPool, away: std::sync::Weak<watch::Sender<bool>>) {
    let began = Instant::now();
    let ping = async || {
        let mut connection = pool.acquire().await?;
        connection.ping().await
    };
    while !matches!(timeout(PROBE_LIMIT, ping()).await, Ok(Ok(()))) {
        if pool.is_closed() || away.strong_count() == 0 {
            return;
        }
        sleep(PROBE_PAUSE).await;
    }
    let away_secs = began.elapsed().as_secs_f64();
    tracing::info!(away_secs, "the database answers again");
    if let Some(away) = away.upgrade() {
        away.send_replace(false);
    }
}

fn silent() -> sqlx::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the database does not answer").into()
}

/// The database, not the question, is at fault.
pub(crate) fn is_away(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed
        // Not an answer of a database: a proxy or a balancer that has none behind it just now.
        | sqlx::Error::Protocol(_) => true,
        // Class 08: connection trouble; 57P: the server is stopping or starting; 53300: full.
        sqlx::Error::Database(database) => database.code().is_some_and(|code| {
            code.starts_with("08") || code.starts_with("57P") || code == "53300"
        }),
        _ => false,
    }
}

type Step = Either<AnyQueryResult, AnyRow>;

/// A connection whose statements are bounded.
#[derive(Debug)]
pub(super) struct Bounded<'c> {
    connection: &'c mut AnyConnection,
    reach: &'c Reach,
}

// Results are collected before they are handed on: every statement of ours has a small one, and
// only a whole statement can be bounded.

impl<'c> Executor<'c> for Bounded<'c> {
    type Database = Any;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, sqlx::Result<Step>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Any>,
    {
        let Self { connection, reach } = self;
        let steps = async move {
            reach.bounded(connection.fetch_many(query).try_collect::<Vec<_>>()).await
        };
        in_turn(steps)
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, sqlx::Result<Option<AnyRow>>>
    where
        'c: 'e,
        E: 'q + Execute<'q, Any>,
    {
        let Self { connection, reach } = self;
        async move { reach.bounded(connection.fetch_optional(query)).await }.boxed()
    }

    fn prepare_with<'e>(
        self,
        text: SqlStr,
        parameters: &'e [AnyTypeInfo],
    ) -> BoxFuture<'e, sqlx::Result<AnyStatement>>
    where
        'c: 'e,
    {
        let Self { connection, reach } = self;
        async move { reach.bounded(connection.prepare_with(text, parameters)).await }.boxed()
    }
}

impl<'p> Executor<'p> for &'p Reach {
    type Database = Any;

    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, sqlx::Result<Step>>
    where
        'p: 'e,
        E: 'q + Execute<'q, Any>,
    {
        let steps = async move {
            let work = async {
                let mut connection = self.pool.acquire().await?;
                connection.fetch_many(query).try_collect::<Vec<_>>().await
            };
            self.bounded(work).await
        };
        in_turn(steps)
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, sqlx::Result<Option<AnyRow>>>
    where
        'p: 'e,
        E: 'q + Execute<'q, Any>,
    {
        let work = async move { self.pool.acquire().await?.fetch_optional(query).await };
        async move { self.bounded(work).await }.boxed()
    }

    fn prepare_with<'e>(
        self,
        text: SqlStr,
        parameters: &'e [AnyTypeInfo],
    ) -> BoxFuture<'e, sqlx::Result<AnyStatement>>
    where
        'p: 'e,
    {
        let work = async move { self.pool.acquire().await?.prepare_with(text, parameters).await };
        async move { self.bounded(work).await }.boxed()
    }
}

fn in_turn<'e>(
    steps: impl Future<Output = sqlx::Result<Vec<Step>>> + Send + 'e,
) -> BoxStream<'e, sqlx::Result<Step>> {
    steps.map_ok(|steps| stream::iter(steps.into_iter().map(Ok))).try_flatten_stream().boxed()
}
