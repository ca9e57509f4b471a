//! A process that answers HTTP, and a client of it.

use super::client::Client;
use super::process::{Process, loquetier};
use super::stores::Stores;
use std::ops::Deref;
use std::path::Path;

/// See the module.
pub struct Server {
    /// For signals and its log.
    pub process: Process,
    client: Client,
}

impl Server {
    /// Starts `loquetier serve` on a free port.
    pub fn embedded(base: &Path, data: &Path, flags: &[&str]) -> Self {
        let mut command = loquetier();
        command.args(["serve", "--device", "cpu", "--served-model-name", "tiny"]);
        command.args(["--listen", "127.0.0.1:0", "--log", "info"]);
        command.arg("--base-model").arg(base).arg("--data-dir").arg(data).args(flags);
        let (process, rest) = Process::start(&mut command, " at http://");
        let address = rest.split([',', ' ']).next().unwrap();
        Self { process, client: Client::new(format!("http://{address}"), None) }
    }

    /// Starts `loquetier gateway` on a free port.
    pub fn gateway(stores: &Stores, key: &str) -> Self {
        let mut command = loquetier();
        command.args(["gateway", "--listen", "127.0.0.1:0"]).args(stores.flags());
        let (process, root) = Process::start(&mut command, "gateway at ");
        Self { process, client: Client::new(root, Some(key)) }
    }
}

impl Deref for Server {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}
