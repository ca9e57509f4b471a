//! The embedded form: storage, worker and gateway in one process, one folder.

use crate::adapter_check::RowCheck;
use crate::cli::ServeArgs;
use crate::device::{self, Opened};
use crate::embedded;
use anyhow::{Context, bail};
use gateway::{Gateway, GatewayConfig};
use kernels::Device;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use storage::Storage;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use worker::Worker;
use worker::base::BaseFiles;

/// A running server.
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    /// Model name of its base.
    pub base_name: String,
    /// Its worker.
    pub worker: Worker,
    stop: oneshot::Sender<()>,
    gateway: JoinHandle<std::io::Result<()>>,
}

impl Server {
    /// Starts everything. Errors are for the person at the terminal.
    pub async fn start(args: &ServeArgs) -> anyhow::Result<Self> {
        let (files, base_name) =
            open_base(args.base_model.as_deref(), args.served_model_name.as_ref())?;
        let listener = listen(args.listen).await?;
        let address = listener.local_addr()?;
        let storage = Storage::open_embedded(&args.data_dir).await?;
        let open_access = open_access(&storage, address, &args.data_dir).await?;

        let name = base_name.clone();
        let (threads, invariant) = (args.tuning.threads, args.tuning.batch_invariant);
        let worker = match device::open(args.device, threads, invariant)? {
            Opened::Cpu(device) => start(device, files, name, args, &storage).await?,
            Opened::Cuda(device) => start(*device, files, name, args, &storage).await?,
        };
        let check = RowCheck { db: storage.db.clone() };
        let config = GatewayConfig {
            open_access,
            cors_origins: args.cors_origin.clone(),
            sweep: args.sweep.settings(),
            ..GatewayConfig::default()
        };
        let gateway = Gateway::start(storage, config, Arc::new(check)).await?;
        let (stop, stopped) = oneshot::channel();
        let shutdown = async {
            // A dropped sender also means to stop.
            let _ = stopped.await;
        };
        let gateway = tokio::spawn(gateway::serve(listener, gateway, shutdown));
        Ok(Self { address, base_name, worker, stop, gateway })
    }

    /// Stops taking requests, saves jobs, lets open requests end, ends.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        let _ = self.stop.send(());
        self.worker.save_jobs().await;
        self.gateway.await??;
        self.worker.stop().await;
        Ok(())
    }
}

async fn start<D: Device>(
    device: D,
    files: BaseFiles,
    base_name: String,
    args: &ServeArgs,
    storage: &Storage,
) -> anyhow::Result<Worker> {
    let options = args.tuning.options(&base_name, device.memory()?);
    Worker::start(device, files, options, storage.clone()).await
}

/// `loquetier serve`: until a signal, or a fault of the device.
pub async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let mut server = Server::start(&args).await?;
    println!("device memory:\n{}", server.worker.memory_plan());
    tracing::info!(
        "serving '{}' at http://{}/v1, data in {}",
        server.base_name,
        server.address,
        args.data_dir.display()
    );
    tokio::select! {
        fault = server.worker.broken() => bail!("the worker stopped: {fault}"),
        () = terminated() => {}
    }
    tracing::info!("stopping: jobs are saved");
    server.stop().await
}

/// Files and model name of the base in `folder`, or of the embedded one.
pub fn open_base(
    folder: Option<&Path>,
    name: Option<&String>,
) -> anyhow::Result<(BaseFiles, String)> {
    let Some(folder) = folder else {
        let name = name.cloned().unwrap_or_else(|| embedded::NAME.to_owned());
        return Ok((embedded::open()?, name));
    };
    let name = match name {
        Some(name) => name.clone(),
        None => folder_name(folder)?,
    };
    let files = BaseFiles::open(folder)
        .with_context(|| format!("the base in {} cannot be served", folder.display()))?;
    Ok((files, name))
}

fn folder_name(folder: &Path) -> anyhow::Result<String> {
    let full = folder
        .canonicalize()
        .with_context(|| format!("--base-model: {} cannot be opened", folder.display()))?;
    let name = full.file_name().context("--base-model: name it with --served-model-name")?;
    Ok(name.to_string_lossy().into_owned())
}

/// Listens on an address, or says why not.
pub async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            anyhow::anyhow!("{address} is in use by another program; choose another with --listen")
        }
        _ => anyhow::anyhow!("--listen: cannot listen on {address}: {error}"),
    })
}

/// Requests without a key are let in only on this machine and before the first key is made.
async fn open_access(
    storage: &Storage,
    address: SocketAddr,
    data_dir: &Path,
) -> anyhow::Result<bool> {
    if address.ip().is_loopback() {
        return Ok(true);
    }
    if !storage.db.keys().any_ever().await? {
        let folder = data_dir.display();
        bail!(
            "{address} can be reached from other machines, and there is no API key yet. Make one:\n\
             \x20 loquetier keys create --data-dir {folder}"
        );
    }
    Ok(false)
}

/// Waits for an interrupt or a termination signal.
pub async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = match signal(SignalKind::terminate()) {
        Ok(terminate) => terminate,
        Err(error) => {
            tracing::error!(%error, "no signal handler");
            return std::future::pending().await;
        }
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}
