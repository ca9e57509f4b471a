//! Servers of a test's own, to be treated badly.

use super::process::printed;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::panic::AssertUnwindSafe;
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

    /// Ends a Redis.
    pub fn end(&self) {
        self.run("stop");
    }

    /// Starts an empty Redis where one has ended.
    pub fn begin_anew(&self) {
        assert_eq!(self.run("start"), self.url);
    }

    /// Freezes all of its processes: connections are taken, and nothing comes back.
    pub fn freeze(&self) {
        self.signal("-STOP");
    }

    /// Lets frozen processes go on.
    pub fn thaw(&self) {
        self.signal("-CONT");
    }

    /// The server comes first: one that is frozen starts no others.
    fn signal(&self, name: &str) {
        let files = ["data/postmaster.pid", "pid"].map(|file| self.folder.join(file));
        let text = files.iter().find_map(|file| std::fs::read_to_string(file).ok()).unwrap();
        let server = text.lines().next().unwrap();
        printed(Command::new("kill").args([name, server]));
        let others = Command::new("ps").args(["-o", "pid=", "--ppid", server]).output().unwrap();
        for process in String::from_utf8(others.stdout).unwrap().split_whitespace() {
            // It may have ended by itself.
            Command::new("kill").args([name, process]).output().unwrap();
        }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // After a failed test it may be away, or frozen.
        if std::thread::panicking() {
            let _ = std::panic::catch_unwind(AssertUnwindSafe(|| {
                self.thaw();
                self.end();
            }));
        } else {
            self.end();
        }
    }
}
