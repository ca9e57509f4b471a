//! Connections to Redis: one shared by all short calls, one more for each reader that waits.
//! Every call ends within a bound; a lost connection is made again by the next one who needs it.

use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, ErrorKind, FromRedisValue, RedisError, ScriptInvocation,
    ServerErrorKind,
};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::{Error, Result};

/// Between two tries of one call.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// The way to one server.
#[derive(Debug)]
pub(super) struct Link {
    client: Client,
    shared: Arc<Mutex<Shared>>,
    /// For one call with all its tries.
    limit: Duration,
}

#[derive(Debug, Default)]
struct Shared {
    connection: Option<MultiplexedConnection>,
    /// Counts connections, so that only the one that failed is thrown away.
    number: u64,
}

impl Link {
    /// Connects to nothing yet.
    pub(super) fn new(url: &str, limit: Duration) -> Result<Self> {
        Ok(Self { client: Client::open(url)?, shared: Arc::default(), limit })
    }

    /// Runs a script until it is answered or the time is up. A try whose answer was lost is made
    /// again, so every script must come to the same when it runs twice.
    pub(super) async fn run<T: FromRedisValue>(&self, script: &ScriptInvocation<'_>) -> Result<T> {
        self.run_for(self.limit, script).await
    }

    /// [`Link::run`] with another limit.
    pub(super) async fn run_for<T: FromRedisValue>(
        &self,
        limit: Duration,
        script: &ScriptInvocation<'_>,
    ) -> Result<T> {
        let end = Instant::now() + limit;
        let (mut pause, mut before) = (FIRST_PAUSE, None);
        loop {
            let error = match timeout_at(end, self.try_once(script)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) if !is_away(&error) => return Err(error.into()),
                Ok(Err(error)) => error,
                Err(_) => {
                    // What holds the answer back may hold back the next ones too.
                    self.forget(None).await;
                    // What an earlier try was told says more.
                    let silent = || Error::QueueAway("no answer in time".to_owned());
                    return Err(before.map_or_else(silent, Error::from));
                }
            };
            if Instant::now() + pause >= end {
                return Err(error.into());
            }
            before = Some(error);
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn try_once<T: FromRedisValue>(
        &self,
        script: &ScriptInvocation<'_>,
    ) -> std::result::Result<T, RedisError> {
        let (mut connection, number) = self.shared_connection().await?;
        let answer = script.invoke_async(&mut connection).await;
        if answer.as_ref().is_err_and(is_away) {
            self.forget(Some(number)).await;
        }
        answer
    }

    async fn shared_connection(
        &self,
    ) -> std::result::Result<(MultiplexedConnection, u64), RedisError> {
        let mut shared = Arc::clone(&self.shared).lock_owned().await;
        if let Some(connection) = &shared.connection {
            return Ok((connection.clone(), shared.number));
        }
        // On a task of its own: were it given up with the call that began it, then of calls that
        // queue here each would leave the next one too little time to connect.
        let connecting = connect(self.client.clone(), self.limit, None);
        let connected = tokio::spawn(async move {
            let connection = connecting.await?;
            shared.connection = Some(connection.clone());
            shared.number += 1;
            Ok((connection, shared.number))
        });
        connected.await.unwrap_or_else(|error| Err(std::io::Error::other(error).into()))
    }

    /// Throws the shared connection away if it still is the one of this number.
    async fn forget(&self, number: Option<u64>) {
        // Whoever holds the lock is making a new one.
        let Ok(mut shared) = self.shared.try_lock() else { return };
        if number.is_none_or(|number| number == shared.number) {
            shared.connection = None;
        }
    }

    /// A connection of one's own, for commands that wait up to `wait` on the server.
    pub(super) async fn connect_reader(&self, wait: Duration) -> Result<MultiplexedConnection> {
        let connecting = connect(self.client.clone(), self.limit, Some(wait + self.limit));
        match timeout(self.limit, connecting).await {
            Ok(connection) => Ok(connection?),
            Err(_) => Err(Error::QueueAway("no connection in time".to_owned())),
        }
    }
}

async fn connect(
    client: Client,
    limit: Duration,
    answer_within: Option<Duration>,
) -> std::result::Result<MultiplexedConnection, RedisError> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(limit))
        .set_response_timeout(answer_within);
    client.get_multiplexed_async_connection_with_config(&config).await
}

/// Says once that the server is away and once that it is back, however often it is asked.
#[derive(Debug, Default)]
pub(super) struct Outage {
    noted: bool,
}

impl Outage {
    pub(super) fn failed(&mut self, what: &str, error: &Error) {
        if !std::mem::replace(&mut self.noted, true) {
            tracing::warn!(%error, "{what} failed; trying again");
        }
    }

    pub(super) fn succeeded(&mut self, what: &str) {
        if std::mem::take(&mut self.noted) {
            tracing::info!("{what} works again");
        }
    }
}

/// The server, not the question, is at fault: later it may answer.
pub(super) fn is_away(error: &RedisError) -> bool {
    use ServerErrorKind::{BusyLoading, ClusterDown, MasterDown, ReadOnly, TryAgain};
    error.is_io_error()
        || error.is_timeout()
        || error.is_connection_dropped()
        || error.is_connection_refusal()
        || matches!(
            error.kind(),
            ErrorKind::Server(BusyLoading | ClusterDown | MasterDown | ReadOnly | TryAgain)
        )
}

impl From<RedisError> for Error {
    fn from(error: RedisError) -> Self {
        if is_away(&error) { Self::QueueAway(error.to_string()) } else { Self::Queue(error) }
    }
}
