//! Cold adapters: object store → host memory → engine, while everything else goes on.

use super::{Shared, lock};
use crate::adapters::{AdapterLayout, AdapterShape, peft};
use crate::engine::command::{AdapterWeights, Command, Fault, FaultKind};
use crate::train::{JobSpec, resume};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use storage::objects::ObjectKey;
use tokio::sync::mpsc::Receiver;
use tokio::time::{sleep, timeout};

/// Keys remembered without weights; a key is remembered again with every request.
const SOURCES: usize = 65_536;

/// First pause while the store is away; doubled each time.
const RETRY_FIRST: Duration = Duration::from_millis(50);
/// Longest pause between two tries.
const RETRY_LONGEST: Duration = Duration::from_secs(1);

/// Where an adapter's weights lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A folder of PEFT files.
    Adapter {
        /// The folder.
        object: String,
    },
    /// A job's resume point.
    ResumePoint(ObjectKey),
}

/// Weights in host memory, least recently used first to go, and where to find the others.
pub struct Adapters {
    state: Mutex<Cache>,
    bytes: usize,
}

#[derive(Default)]
struct Cache {
    loading: HashSet<String>,
    sources: HashMap<String, Source>,
    held: HashMap<String, Held>,
    bytes: usize,
    clock: u64,
}

struct Held {
    layout: Arc<AdapterLayout>,
    values: Arc<Vec<f32>>,
    last_used: u64,
}

impl Held {
    fn bytes(&self) -> usize {
        self.values.len() * size_of::<f32>()
    }
}

impl Adapters {
    /// An empty cache of at most `bytes`.
    pub fn new(bytes: usize) -> Self {
        Self { state: Mutex::new(Cache::default()), bytes }
    }

    /// Notes where an adapter is to be found.
    pub fn remember(&self, key: &str, source: Source) {
        let mut cache = lock(&self.state);
        if cache.sources.len() >= SOURCES && !cache.sources.contains_key(key) {
            cache.sources.clear();
        }
        cache.sources.insert(key.to_owned(), source);
    }

    /// Keys in host memory.
    pub fn keys(&self) -> Vec<String> {
        lock(&self.state).held.keys().cloned().collect()
    }

    /// Whether nobody loads this adapter yet; now the caller does.
    fn begin(&self, key: &str) -> bool {
        lock(&self.state).loading.insert(key.to_owned())
    }

    /// Nobody loads it any more.
    fn end(&self, key: &str) {
        lock(&self.state).loading.remove(key);
    }

    /// Lets go of the weights; where they lie stays known.
    pub fn drop_weights(&self, key: &str) {
        let mut cache = lock(&self.state);
        if let Some(gone) = cache.held.remove(key) {
            cache.bytes -= gone.bytes();
        }
    }

    /// Where an adapter is to be found.
    pub fn source(&self, key: &str) -> Option<Source> {
        lock(&self.state).sources.get(key).cloned()
    }

    fn get(&self, key: &str) -> Option<AdapterWeights> {
        let mut cache = lock(&self.state);
        cache.clock += 1;
        let clock = cache.clock;
        let held = cache.held.get_mut(key)?;
        held.last_used = clock;
        Some(AdapterWeights { layout: held.layout.clone(), values: held.values.clone() })
    }

    fn put(&self, key: &str, weights: &AdapterWeights) {
        let mut cache = lock(&self.state);
        cache.clock += 1;
        let (layout, values) = (weights.layout.clone(), weights.values.clone());
        let held = Held { layout, values, last_used: cache.clock };
        cache.bytes += held.bytes();
        if let Some(old) = cache.held.insert(key.to_owned(), held) {
            cache.bytes -= old.bytes();
        }
        while cache.bytes > self.bytes {
            let oldest = cache.held.iter().min_by_key(|(_, held)| held.last_used);
            let Some(oldest) = oldest.map(|(key, _)| key.clone()) else { return };
            if let Some(gone) = cache.held.remove(&oldest) {
                cache.bytes -= gone.bytes();
            }
        }
    }
}

/// Why weights cannot be had.
#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error("nothing is known of this adapter")]
    Unknown,
    #[error("the object store does not answer")]
    Away,
    #[error(transparent)]
    Storage(#[from] storage::Error),
    #[error(transparent)]
    Peft(#[from] peft::PeftError),
    #[error(transparent)]
    Resume(#[from] resume::ResumeFault),
    #[error("its shape does not fit: {0}")]
    Shape(#[from] crate::adapters::ShapeError),
}

/// Answers [`crate::engine::command::Event::NeedAdapter`]. While the store is away it is asked
/// again for a while; only what waits for this adapter waits with it.
pub async fn serve(shared: Arc<Shared>, key: String) {
    if !shared.adapters.begin(&key) {
        return;
    }
    let wait = shared.options.cold_wait;
    let loaded = timeout(wait, load_patiently(&shared, &key)).await;
    // Before the answer: who asks after it finds nothing under way.
    shared.adapters.end(&key);
    let command = match loaded.unwrap_or(Err(LoadError::Away)) {
        Ok(weights) => Command::AdapterReady(key, weights),
        Err(error) => {
            tracing::warn!(adapter.id = key, %error, "an adapter could not be loaded");
            let (kind, message) = match error {
                LoadError::Away => {
                    let message = format!(
                        "the weights of '{key}' cannot be loaded now: the object store does not \
                         answer; try again later"
                    );
                    (FaultKind::Unavailable, message)
                }
                _ => {
                    (FaultKind::Overloaded, format!("the weights of '{key}' cannot be loaded now"))
                }
            };
            let fault = Fault { kind, message, param: None };
            Command::AdapterFailed(key, fault)
        }
    };
    shared.command(command).await;
}

async fn load_patiently(shared: &Shared, key: &str) -> Result<AdapterWeights, LoadError> {
    let mut pause = RETRY_FIRST;
    loop {
        match load(shared, key).await {
            Err(LoadError::Storage(error)) if error.is_unavailable() => {
                tracing::debug!(adapter.id = key, %error, "an adapter is still to be loaded");
            }
            loaded => return loaded,
        }
        sleep(pause).await;
        pause = (pause * 2).min(RETRY_LONGEST);
    }
}

/// Brings adapters onto the device before their requests come, one after the other.
pub async fn preload(shared: Arc<Shared>, mut keys: Receiver<String>) {
    while let Some(key) = keys.recv().await {
        match load(&shared, &key).await {
            Ok(weights) => {
                if !shared.command(Command::Preload(key, weights)).await {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(adapter.id = key, %error, "not loaded before its requests");
            }
        }
    }
}

async fn load(shared: &Shared, key: &str) -> Result<AdapterWeights, LoadError> {
    if let Some(weights) = shared.adapters.get(key) {
        return Ok(weights);
    }
    let weights = match shared.adapters.source(key).ok_or(LoadError::Unknown)? {
        Source::Adapter { object } => read_adapter(shared, &object).await?,
        Source::ResumePoint(object) => {
            let bytes = shared.storage.objects.get(&object).await?;
            let saved = resume::decode_params(&bytes)?;
            let layout = Arc::new(layout_of(shared, &saved.spec)?);
            AdapterWeights { layout, values: Arc::new(saved.params) }
        }
    };
    shared.adapters.put(key, &weights);
    Ok(weights)
}

async fn read_adapter(shared: &Shared, object: &str) -> Result<AdapterWeights, LoadError> {
    let objects = &shared.storage.objects;
    let config = objects.get(&ObjectKey::AdapterConfig { object: object.to_owned() }).await?;
    let weights = objects.get(&ObjectKey::AdapterWeights { object: object.to_owned() }).await?;
    let dims = shared.config.dims();
    let read = peft::read(&config, &weights, &dims, &shared.options.base_name)?;
    let layout = Arc::new(AdapterLayout::new(&dims, &read.shape));
    Ok(AdapterWeights { layout, values: Arc::new(read.values) })
}

/// The adapter a job continues from.
pub async fn read_parent(shared: &Shared, object: &str) -> anyhow::Result<AdapterWeights> {
    Ok(read_adapter(shared, object).await?)
}

/// Layout of the adapter that a job trains.
pub fn layout_of(
    shared: &Shared,
    spec: &JobSpec,
) -> Result<AdapterLayout, crate::adapters::ShapeError> {
    let lora = &spec.lora;
    let shape = AdapterShape::new(lora.rank, lora.alpha, lora.use_rslora, lora.targets.clone())?;
    Ok(AdapterLayout::new(&shared.config.dims(), &shape))
}
