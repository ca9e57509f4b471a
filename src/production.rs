//! The production form: gateways and workers are processes of their own, on any machines; Postgres,
//! Redis and an S3-compatible store are all they share.

use crate::adapter_check::RowCheck;
use crate::cli::{GatewayArgs, SharedArgs, WorkerArgs};
use crate::device::{self, Opened};
use crate::server::{listen, open_base, terminated};
use anyhow::{Context, bail};
use gateway::{Gateway, GatewayConfig};
use kernels::Device;
use std::sync::Arc;
use std::time::Duration;
use storage::objects::{Objects, S3Config, S3Limits};
use storage::queue::message::ToWorker;
use storage::queue::{Controlled, Queue, RedisOptions, RedisQueue};
use storage::{Db, Storage};
use worker::Worker;
use worker::base::BaseFiles;

/// Between two looks whether a worker that drains is gone.
const DRAIN_LOOK: Duration = Duration::from_millis(100);

/// `loquetier migrate`.
pub async fn migrate(database_url: &str) -> anyhow::Result<()> {
    let steps = Db::migrate(database_url).await.context("--database-url")?;
    println!("the schema is at step {steps}");
    Ok(())
}

/// `loquetier gateway`: until a signal.
pub async fn gateway(args: GatewayArgs) -> anyhow::Result<()> {
    let storage = open(&args.shared).await?;
    let listener = listen(args.listen).await?;
    let address = listener.local_addr()?;
    if !storage.db.keys().any_ever().await? {
        tracing::warn!("there is no API key yet: loquetier keys create --database-url …");
    }
    // A proxy may stand before a loopback address: nobody gets in without a key.
    let config = GatewayConfig {
        open_access: false,
        cors_origins: args.cors_origin,
        sweep: args.sweep.settings(),
        ..GatewayConfig::default()
    };
    let check = RowCheck { db: storage.db.clone() };
    let gateway = Gateway::start(storage, config, Arc::new(check)).await?;
    tracing::info!("gateway at http://{address}/v1");
    gateway::serve(listener, gateway, terminated()).await?;
    Ok(())
}

/// `loquetier worker`: until a signal, or a fault of the device.
pub async fn worker(args: WorkerArgs) -> anyhow::Result<()> {
    let (files, name) = open_base(args.base_model.as_deref(), args.served_model_name.as_ref())?;
    let storage = open(&args.shared).await?;
    let (threads, invariant) = (args.tuning.threads, args.tuning.batch_invariant);
    let mut worker = match device::open(args.device, threads, invariant)? {
        Opened::Cpu(device) => start(device, files, &name, &args, storage).await?,
        Opened::Cuda(device) => start(*device, files, &name, &args, storage).await?,
    };
    println!("device memory:\n{}", worker.memory_plan());
    tracing::info!("worker for '{name}'");
    let told = worker.told_to_drain();
    tokio::select! {
        fault = worker.broken() => bail!("the worker stopped: {fault}"),
        () = terminated() => {}
        () = told => {}
    }
    tracing::info!("leaving: jobs are saved, requests handed over; a second signal ends at once");
    let leave = async {
        worker.drain(Duration::from_secs(args.drain_secs)).await;
        worker.stop().await;
    };
    tokio::select! {
        () = leave => {}
        () = terminated() => {
            tracing::warn!("ending at once: leases and presence run out, streams go on elsewhere");
            // Threads at work would keep the runtime from ending.
            std::process::exit(1);
        }
    }
    tracing::info!("gone");
    Ok(())
}

/// `loquetier worker --drain`: until that worker is gone.
pub async fn drain(args: &WorkerArgs) -> anyhow::Result<()> {
    let id = args.worker_id.as_deref().context("--drain: name the worker with --worker-id")?;
    let redis = RedisOptions::default();
    let queue = RedisQueue::connect(&args.shared.redis_url, redis).await.context("--redis-url")?;
    let alive = queue.workers().await?;
    let found = alive.iter().find(|worker| worker.worker_id == id);
    let nobody = || {
        let ids: Vec<&str> = alive.iter().map(|worker| worker.worker_id.as_str()).collect();
        let ids = if ids.is_empty() { "none".to_owned() } else { ids.join(", ") };
        anyhow::anyhow!("--worker-id: no live worker '{id}'; alive: {ids}")
    };
    let incarnation = found.ok_or_else(nobody)?.incarnation.clone();
    if queue.control(id, ToWorker::Drain).await? == Controlled::Gone {
        return Err(nobody());
    }
    println!("worker '{id}' drains");
    while queue.workers().await?.iter().any(|worker| worker.incarnation == incarnation) {
        tokio::time::sleep(DRAIN_LOOK).await;
    }
    println!("worker '{id}' is gone");
    Ok(())
}

async fn start<D: Device>(
    device: D,
    files: BaseFiles,
    base_name: &str,
    args: &WorkerArgs,
    storage: Storage,
) -> anyhow::Result<Worker> {
    let mut options = args.tuning.options(base_name, device.memory()?);
    // Another process may hold leases under any name: they run out by themselves.
    options.sole = false;
    options.worker_id = match &args.worker_id {
        Some(id) => id.clone(),
        None => format!("worker-{}", storage::ids::incarnation()),
    };
    Worker::start(device, files, options, storage).await
}

async fn open(args: &SharedArgs) -> anyhow::Result<Storage> {
    let config = S3Config {
        url: args.object_store.clone(),
        endpoint: args.s3_endpoint.clone(),
        region: args.s3_region.clone(),
        environment: std::env::vars().filter(|(name, _)| name.starts_with("AWS_")).collect(),
        limits: S3Limits::default(),
    };
    let objects = Objects::open_s3(&config).context("--object-store")?;
    objects.check().await.context("--object-store")?;
    let redis = RedisOptions::default();
    Ok(Storage::open_shared(&args.database_url, &args.redis_url, redis, objects).await?)
}
