//! Starts a worker: the base onto the device, the engine on a thread, the tasks around it.

use crate::base::{BaseConfig, BaseFiles, BaseWeights};
use crate::engine::Engine;
use crate::engine::command::Command;
use crate::engine::gauges::Gauges;
use crate::intake::{Bounds, Shared, adapters::Adapters, jobs, lock, presence, requests};
use crate::model::Model;
use crate::options::WorkerOptions;
use crate::outlet;
use crate::plan::MemoryPlan;
use crate::text::{ChatTemplate, Text, Tokenizer};
use anyhow::{Context, bail};
use kernels::Device;
use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use storage::Storage;
use storage::db::NewBase;
use tokio::sync::{Notify, mpsc};

/// Commands that wait for the engine; it takes them all between two steps.
const COMMANDS: usize = 1024;
/// Events that wait for the outlet.
const EVENTS: usize = 1024;
/// How long a stopping worker waits for its jobs to be saved.
const DRAIN_WAIT: Duration = Duration::from_secs(20);

/// A running worker.
pub struct Worker {
    plan: MemoryPlan,
    shared: Arc<Shared>,
    engine: JoinHandle<()>,
    outlet: tokio::task::JoinHandle<Option<String>>,
    jobs: tokio::task::JoinHandle<()>,
}

impl Worker {
    /// Loads the base and starts serving. Registers the base; a base of the same name with other
    /// weights that a live worker serves is an error.
    pub async fn start<D: Device>(
        device: D,
        files: BaseFiles,
        options: WorkerOptions,
        storage: Storage,
    ) -> anyhow::Result<Self> {
        let config = files.config().clone();
        let text = text_of(&files)?;
        let fingerprint = files.fingerprint()?;
        let plan = options.plan::<D>(&config, device.memory()?)?;
        tracing::info!("memory of {}:\n{plan}", device.name());
        let sizes = plan.sizes.clone();
        let context = sizes.longest_sequence();
        register(&storage, base_row(&options, &fingerprint, context, &config)).await?;
        if options.sole {
            storage.db.jobs().release_all(&options.worker_id).await?;
        }

        let (name, numerics) = (device.name(), device.numerics());
        let bounds =
            Bounds { arena_rows: sizes.arena_rows, arena_rank_rows: sizes.arena_rank_rows };
        let (commands, command_reader) = mpsc::channel(COMMANDS);
        let (events, event_reader) = mpsc::channel(EVENTS);
        let gauges = Arc::new(Gauges::default());
        let shared = Arc::new(Shared {
            adapters: Adapters::new(options.host_cache_bytes),
            incarnation: storage::ids::incarnation(),
            base_fingerprint: fingerprint,
            device: name,
            gauges: gauges.clone(),
            routes: Mutex::default(),
            running: Mutex::new(HashMap::new()),
            job_bell: Notify::new(),
            draining: false.into(),
            options,
            storage,
            text,
            config: config.clone(),
            numerics,
            bounds,
            commands,
        });
        let engine_options = shared.options.engine();
        let (ready, loaded) = tokio::sync::oneshot::channel();
        let engine = std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
            let model = BaseWeights::load(&device, &files, sizes.max_positions)
                .map_err(anyhow::Error::from)
                .and_then(|base| Ok(Model::new(device, config, base, sizes)?));
            match model {
                Ok(model) => {
                    let engine = Engine::new(model, engine_options, command_reader, events, gauges);
                    let _ = ready.send(Ok(()));
                    engine.run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })?;
        loaded.await.context("the engine thread ended while it loaded the base")??;

        let inbox = shared.storage.queue.open_inbox(presence::of(&shared)).await?;
        let outlet = tokio::spawn(outlet::run(shared.clone(), event_reader));
        tokio::spawn(requests::run(shared.clone(), inbox));
        tokio::spawn(presence::run(shared.clone()));
        let jobs = tokio::spawn(jobs::run(shared.clone()));
        Ok(Self { plan, shared, engine, outlet, jobs })
    }

    /// Where its device memory went.
    pub fn memory_plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// Fingerprint of the base's weights and tokenizer.
    pub fn base_fingerprint(&self) -> &str {
        &self.shared.base_fingerprint
    }

    /// Waits for a fault of the device.
    pub async fn broken(&mut self) -> String {
        match (&mut self.outlet).await {
            Ok(Some(fault)) => fault,
            Ok(None) => "the engine ended".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    /// Takes no new work; jobs are saved and given back. Requests in flight go on.
    pub async fn drain(&mut self) {
        self.shared.draining.store(true, Relaxed);
        self.shared.job_bell.notify_one();
        for running in lock(&self.shared.running).values() {
            running.bell.notify_one();
        }
        if tokio::time::timeout(DRAIN_WAIT, &mut self.jobs).await.is_err() {
            tracing::warn!("not all jobs could be saved; others go on from their resume points");
        }
    }

    /// Ends the engine, and with it whatever still runs.
    pub async fn stop(self) {
        self.shared.command(Command::Shutdown).await;
        let engine = self.engine;
        if tokio::task::spawn_blocking(move || engine.join()).await.is_err() {
            tracing::error!("the engine thread did not end well");
        }
    }
}

/// Tokenizer and chat template that lie beside the weights.
fn text_of(files: &BaseFiles) -> anyhow::Result<Text> {
    let tokenizer = files.text("tokenizer.json").context("tokenizer.json is missing")?;
    let template =
        ChatTemplate::parse(files.text("tokenizer_config.json"), files.text("chat_template.jinja"));
    Ok(Text { tokenizer: Tokenizer::from_bytes(tokenizer)?, template: template? })
}

fn base_row(
    options: &WorkerOptions,
    fingerprint: &str,
    context: usize,
    config: &BaseConfig,
) -> NewBase {
    NewBase {
        name: options.base_name.clone(),
        fingerprint: fingerprint.to_owned(),
        context: context as i64,
        modules: config.dims().to_json(),
    }
}

/// Makes the base known; refuses one whose name a live worker uses for other weights.
async fn register(storage: &Storage, base: NewBase) -> anyhow::Result<()> {
    let NewBase { name, fingerprint, .. } = &base;
    let live = storage.queue.workers().await?;
    if live.iter().any(|other| other.base == *name && other.base_fingerprint != *fingerprint) {
        bail!("another worker serves the base '{name}' with other weights");
    }
    let found = storage.db.bases().upsert(&base).await?;
    if found.fingerprint_before.is_some_and(|before| before != *fingerprint) {
        tracing::warn!(base = name, "the base has other weights than before under this name");
    }
    Ok(())
}
