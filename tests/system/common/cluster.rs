//! The production form: gateways and workers as processes of their own over shared stores.

use super::process::{Process, loquetier};
use super::server::Server;
use super::stores::Stores;
use super::tiny_base;
use std::path::PathBuf;

/// What processes are started with.
pub struct Cluster {
    /// Where everything is.
    pub stores: Stores,
    /// Folder of the base.
    pub base: PathBuf,
    /// Of the one organization.
    pub key: String,
    _scratch: tempfile::TempDir,
}

impl Cluster {
    /// In new places of the environment's stores; none where it names none.
    pub fn open() -> Option<Self> {
        Stores::open().map(Self::over)
    }

    /// Over stores that nobody has used.
    pub fn over(stores: Stores) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let (base, key) = (tiny_base(scratch.path()), stores.prepare());
        Self { stores, base, key, _scratch: scratch }
    }

    /// Starts a gateway.
    pub fn gateway(&self) -> Server {
        Server::gateway(&self.stores, &self.key)
    }

    /// Starts a worker.
    pub fn worker(&self, id: &str, flags: &[&str]) -> Process {
        self.worker_by(&self.stores, id, flags)
    }

    /// Starts a worker that comes to the stores by another way.
    pub fn worker_by(&self, stores: &Stores, id: &str, flags: &[&str]) -> Process {
        let mut command = loquetier();
        command.args(["worker", "--device", "cpu", "--threads", "1"]).args(stores.flags());
        command.args(["--served-model-name", "tiny", "--worker-id", id]);
        command.arg("--base-model").arg(&self.base).args(flags);
        Process::start(&mut command, "worker for").0
    }

    /// The rows, as a process of its own sees them.
    pub async fn rows(&self) -> storage::Db {
        storage::Db::open_shared(&self.stores.database).await.unwrap()
    }
}
