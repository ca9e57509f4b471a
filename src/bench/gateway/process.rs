//! The gateway process of G2: one thread, one core. It ends when its standard input does.

use super::super::args::GatewayArgs;
use super::storage;
use crate::adapter_check::RowCheck;
use crate::server::listen;
use anyhow::{Context, bail};
use gateway::{Gateway, GatewayConfig};
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use tokio::sync::oneshot;

/// Said on standard output when it listens.
const READY: &str = "listening at ";

/// See the module.
pub fn serve(args: &GatewayArgs, folder: &Path) -> anyhow::Result<()> {
    let prefix = args.prefix.clone().context("--prefix")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let storage = storage(folder, &args.redis_url, prefix).await?;
        let config = GatewayConfig { open_access: true, ..GatewayConfig::default() };
        let check = Arc::new(RowCheck { db: storage.db.clone() });
        let gateway = Gateway::start(storage, config, check).await?;
        let listener = listen(([127, 0, 0, 1], 0).into()).await?;
        println!("{READY}{}", listener.local_addr()?);
        let (end, ended) = oneshot::channel::<()>();
        std::thread::spawn(move || {
            let _ = std::io::stdin().read(&mut [0]);
            drop(end);
        });
        let ended = async {
            let _ = ended.await;
        };
        gateway::serve(listener, gateway, ended).await?;
        Ok(())
    })
}

/// A running gateway process; it ends when this is dropped.
pub struct Process {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
    /// Whether it has a core of its own.
    pub pinned: bool,
}

impl Process {
    /// Starts one, on the last core where `taskset` can say so.
    pub fn start(redis_url: &str, folder: &Path, prefix: &str) -> anyhow::Result<Self> {
        let own = std::env::current_exe().context("this program's own file")?;
        let cores = std::thread::available_parallelism()?.get();
        let pinned = cores > 1 && pin(std::process::id(), &format!("0-{}", cores - 2));
        let mut command = if pinned {
            let mut command = Command::new("taskset");
            command.args(["-c", &(cores - 1).to_string()]).arg(own);
            command
        } else {
            Command::new(own)
        };
        command.args(["bench", "gateway", "--prefix", prefix, "--serve-folder"]).arg(folder);
        command.env("LOQUETIER_REDIS_URL", redis_url);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("the gateway process cannot start")?;
        let stdout = child.stdout.take().context("the gateway process has no output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let Some(address) = line.trim().strip_prefix(READY) else {
            bail!("the gateway process did not start: {line}");
        };
        Ok(Self { child, address: address.parse()?, pinned })
    }

    /// Seconds of processor time so far, where the system tells.
    pub fn cpu_seconds(&self) -> Option<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).ok()?;
        // After the name in brackets; user and system time are fields 14 and 15 of all.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks: u64 =
            fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
        Some(ticks as f64 / 100.0)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Moves a process to these cores; false where that cannot be done.
fn pin(process: u32, cores: &str) -> bool {
    let mut command = Command::new("taskset");
    command.args(["-a", "-cp", cores, &process.to_string()]);
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}
