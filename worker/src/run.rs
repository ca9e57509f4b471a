//! Starts a worker: the base onto the device, the engine on a thread, the tasks around it.

use crate::base::{BaseConfig, BaseFiles, BaseWeights};
use crate::engine::Engine;
use crate::engine::command::{Command, Leaving};
use crate::engine::gauges::Gauges;
use crate::intake::{Bounds, Shared, adapters, adapters::Adapters, drain, inbox, jobs, presence};
use crate::model::{Model, Sizes};
use crate::options::WorkerOptions;
use crate::outlet;
use crate::plan::MemoryPlan;
use crate::text::{ChatTemplate, Text, Tokenizer};
use anyhow::{Context, bail};
use kernels::Device;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use storage::Storage;
use storage::db::NewBase;
use storage::queue::Inbox;
use tokio::sync::{Notify, mpsc};

/// Commands that wait for the engine; it takes them all between two steps.
const COMMANDS: usize = 1024;
/// Events that wait for the outlet.
const EVENTS: usize = 1024;
/// Adapters that wait to be loaded before their requests come.
const WANTED: usize = 256;

/// A running worker.
pub struct Worker {
    plan: MemoryPlan,
    shared: Arc<Shared>,
    engine: JoinHandle<()>,
    outlet: Task<Option<String>>,
    inbox: Task<Inbox>,
    presence: Task<()>,
    jobs: Task<()>,
}

type Task<T> = tokio::task::JoinHandle<T>;

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
        let (wanted, wanted_reader) = mpsc::channel(WANTED);
        let gauges = Arc::new(Gauges::idle(sizes.blocks));
        let shared = Arc::new(Shared {
            adapters: Adapters::new(options.host_cache_bytes),
            incarnation: storage::ids::incarnation(),
            base_fingerprint: fingerprint,
            device: name,
            gauges: gauges.clone(),
            routes: Mutex::default(),
            runs: Mutex::default(),
            job_bell: Notify::new(),
            draining: false.into(),
            told_to_drain: Notify::new(),
            closing: Notify::new(),
            wanted,
            options,
            storage,
            text,
            config: config.clone(),
            numerics,
            bounds,
            commands,
        });
        let options = shared.options.engine();
        let run = move |model| Engine::new(model, options, command_reader, events, gauges).run();
        let engine = start_engine(device, files, config, sizes, run).await?;

        let inbox = shared.storage.queue.open_inbox(presence::of(&shared)).await?;
        tokio::spawn(adapters::preload(shared.clone(), wanted_reader));
        Ok(Self {
            plan,
            engine,
            outlet: tokio::spawn(outlet::run(shared.clone(), event_reader)),
            inbox: tokio::spawn(inbox::run(shared.clone(), inbox)),
            presence: tokio::spawn(presence::run(shared.clone())),
            jobs: tokio::spawn(jobs::run(shared.clone())),
            shared,
        })
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

    /// Waits until somebody tells this worker to drain, through its inbox.
    pub fn told_to_drain(&self) -> impl Future<Output = ()> + use<> {
        let shared = self.shared.clone();
        async move { shared.told_to_drain.notified().await }
    }

    /// Takes no new work; jobs are saved and given back. Requests in flight go on.
    pub async fn save_jobs(&mut self) {
        drain::begin(&self.shared).await;
        drain::save_jobs(&self.shared, &mut self.jobs).await;
    }

    /// The same, and requests are handed over to other workers; those that none can take yet have
    /// `grace` to end by themselves.
    pub async fn drain(&mut self, grace: Duration) {
        drain::begin(&self.shared).await;
        tokio::join!(
            drain::save_jobs(&self.shared, &mut self.jobs),
            drain::hand_over(&self.shared, grace)
        );
    }

    /// Ends the engine. Whatever still runs is handed over: presence is taken back last, when all
    /// that came is answered.
    pub async fn stop(self) {
        self.shared.closing.notify_one();
        let inbox = self.inbox.await;
        self.shared.command(Command::HandOver(Leaving::All)).await;
        self.shared.command(Command::Shutdown).await;
        let engine = self.engine;
        let ended = tokio::task::spawn_blocking(move || engine.join()).await;
        if !matches!(ended, Ok(Ok(()))) {
            tracing::error!("the engine thread did not end well");
        }
        // It ends when it has sent what the engine said last, unless a fault had ended it.
        if !self.outlet.is_finished()
            && let Err(error) = self.outlet.await
        {
            tracing::error!(%error, "not all answers were sent");
        }
        // Its next word must not come after the end of presence.
        self.presence.abort();
        let _ = self.presence.await;
        match inbox {
            Ok(inbox) => inbox.close().await,
            Err(error) => tracing::error!(%error, "the inbox was not read to its end"),
        }
    }
}

/// Puts the base on the device and runs the engine, on a thread of its own; returns once the engine
/// takes commands.
async fn start_engine<D: Device>(
    device: D,
    files: BaseFiles,
    config: BaseConfig,
    sizes: Sizes,
    run: impl FnOnce(Model<D>) + Send + 'static,
) -> anyhow::Result<JoinHandle<()>> {
    let (ready, loaded) = tokio::sync::oneshot::channel();
    let engine = std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
        let model = BaseWeights::load(&device, &files, sizes.max_positions)
            .map_err(anyhow::Error::from)
            .and_then(|base| Ok(Model::new(device, config, base, sizes)?));
        match model {
            Ok(model) => {
                let _ = ready.send(Ok(()));
                run(model);
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        }
    })?;
    loaded.await.context("the engine thread ended while it loaded the base")??;
    Ok(engine)
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
