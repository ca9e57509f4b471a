//! Servers of a test's own, to be treated badly.

use super::process::printed;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use tempfile::TempDir;

/// A private Redis or Postgres; stopped when dropped.
pub struct Own {
    script: &'static str,
    folder: PathBuf,
    /// Where it is.
    pub url: String,
    _scratch: TempDir,
}

impl Own {
    /// Starts a Redis.
    pub fn redis() -> Self {
        Self::start(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/redis.sh"))
    }

    /// Starts a Postgres.
    pub fn postgres() -> Self {
        Self::start(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/postgres.sh"))
    }

    fn start(script: &'static str) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        // The user that Postgres runs as must be able to pass through.
        std::fs::set_permissions(scratch.path(), Permissions::from_mode(0o711)).unwrap();
        let folder = scratch.path().join("own");
        let mut own = Self { script, folder, url: String::new(), _scratch: scratch };
        own.url = own.run("start");
        own
    }

    fn run(&self, what: &str) -> String {
        printed(Command::new(self.script).arg(what).arg(&self.folder))
    }

    /// Ends a Redis, and starts an empty one at the same address.
    pub fn restart_empty(&self) {
        self.run("stop");
        assert_eq!(self.run("start"), self.url);
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.run("stop");
    }
}
