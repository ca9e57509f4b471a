//! A Redis of one test's own, which it may stop, kill and restart.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use storage::queue::{RedisOptions, RedisQueue};

use crate::queue_rig::{fresh, redis_url, until};

/// Keeps nothing: a restart loses everything. Listens on a Unix socket, so that no port can be
/// taken.
pub struct Server {
    folder: tempfile::TempDir,
    process: Child,
}

impl Server {
    /// None where the tests were given no Redis at all.
    pub async fn start() -> Option<Self> {
        redis_url()?;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let process = launch(folder.path());
        let server = Self { folder, process };
        server.answers().await;
        Some(server)
    }

    pub fn url(&self) -> String {
        format!("redis+unix://{}/socket", self.folder.path().display())
    }

    /// A client that gives up soon and whose presence ends soon.
    pub fn options(&self) -> RedisOptions {
        RedisOptions {
            presence_expiry: Duration::from_millis(600),
            call_limit: Duration::from_millis(500),
            ..fresh()
        }
    }

    pub async fn queue(&self, options: &RedisOptions) -> RedisQueue {
        RedisQueue::connect(&self.url(), options.clone()).await.expect("connects")
    }

    pub fn kill(&mut self) {
        self.process.kill().expect("is killed");
        self.process.wait().expect("ends");
    }

    pub async fn start_again(&mut self) {
        self.process = launch(self.folder.path());
        self.answers().await;
    }

    /// Sends a signal: STOP holds every answer back, CONT lets them go.
    pub fn signal(&self, name: &str) {
        let id = self.process.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &id]).status().expect("kill runs");
        assert!(sent.success());
    }

    /// Runs a command of the test's own.
    pub async fn command<T: redis::FromRedisValue>(&self, words: &[&str]) -> T {
        self.try_command(words).await.expect("answers")
    }

    async fn try_command<T: redis::FromRedisValue>(&self, words: &[&str]) -> redis::RedisResult<T> {
        let client = redis::Client::open(self.url())?;
        let mut connection = client.get_multiplexed_async_connection().await?;
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]).query_async(&mut connection).await
    }

    async fn answers(&self) {
        until("the server answers", async || self.try_command::<String>(&["PING"]).await.is_ok())
            .await;
    }
}

fn launch(folder: &Path) -> Child {
    Command::new("redis-server")
        .args(["--port", "0", "--unixsocket", "socket", "--save", "", "--appendonly", "no"])
        .current_dir(folder)
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server is installed where the tests have a Redis")
}

impl Drop for Server {
    fn drop(&mut self) {
        // Ended already where the test killed it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
