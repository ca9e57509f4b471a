//! One gateway process: its storage, its open requests, its caches and background tasks.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use storage::Storage;
use storage::db::Resolved;
use storage::ids::incarnation;
use storage::queue::message::{Request, Target};
use storage::sweep::Sweeper;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::auth::KeyRing;
use crate::config::GatewayConfig;
use crate::error::{ApiError, ApiResult};
use crate::import::AdapterCheck;
use crate::ledger::Ledger;
use crate::limits::Limiter;
use crate::names::Names;
use crate::relay::Relay;
use crate::wire::generation::Bounds;

/// How often accounts are written; a crash loses at most this much of them.
const FLUSH_PERIOD: Duration = Duration::from_secs(5);

/// Everything the routes share.
pub struct Gateway {
    config: GatewayConfig,
    storage: Storage,
    keys: KeyRing,
    names: Names,
    limiter: Limiter,
    ledger: Arc<Ledger>,
    relay: Arc<Relay>,
    adapter_check: Arc<dyn AdapterCheck>,
    /// Inference requests that may still begin.
    pub(crate) request_room: Arc<Semaphore>,
    /// Uploads that may still begin.
    pub(crate) upload_room: Arc<Semaphore>,
    /// Aborted when the gateway is dropped.
    _tasks: Mutex<JoinSet<()>>,
}

impl Gateway {
    /// Announces a gateway and starts its background tasks. `adapter_check` judges imported
    /// adapters, which needs a base's dimensions.
    pub async fn start(
        storage: Storage,
        config: GatewayConfig,
        adapter_check: Arc<dyn AdapterCheck>,
    ) -> storage::Result<Arc<Gateway>> {
        let gateway_id = incarnation();
        let messages = storage.queue.gateway_tokens(&gateway_id).await?;
        let queue = Arc::clone(&storage.queue);
        let relay = Arc::new(Relay::new(gateway_id, queue, config.stream_buffer_messages));
        let ledger = Arc::new(Ledger::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(Arc::clone(&relay).run(messages));
        tasks.spawn(keep_accounts(Arc::clone(&ledger), storage.clone()));
        let (db, objects) = (storage.db.clone(), storage.objects.clone());
        tasks.spawn(Sweeper::new(db, objects, config.sweep.clone()).run());
        crate::metrics::install();
        Ok(Arc::new(Gateway {
            keys: KeyRing::new(config.open_access),
            names: Names::default(),
            limiter: Limiter::new(config.rate_limits),
            request_room: Arc::new(Semaphore::new(config.requests_max)),
            upload_room: Arc::new(Semaphore::new(config.uploads_max)),
            _tasks: Mutex::new(tasks),
            config,
            storage,
            ledger,
            relay,
            adapter_check,
        }))
    }

    /// Its bounds.
    pub fn config(&self) -> &GatewayConfig {
        &self.config
    }

    /// Rows, queue and objects.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Inference requests open at the moment.
    pub fn open_requests(&self) -> usize {
        self.relay.open_requests()
    }

    pub(crate) fn relay(&self) -> &Arc<Relay> {
        &self.relay
    }

    pub(crate) fn keys(&self) -> &KeyRing {
        &self.keys
    }

    pub(crate) fn limiter(&self) -> &Limiter {
        &self.limiter
    }

    pub(crate) fn adapter_check(&self) -> &Arc<dyn AdapterCheck> {
        &self.adapter_check
    }

    pub(crate) fn bounds(&self) -> Bounds {
        Bounds { choices: self.config.choices_max }
    }

    /// Writes down what one request used.
    pub(crate) fn account(
        &self,
        request: &Request,
        model: &str,
        prompt_tokens: u64,
        completion_tokens: u64,
    ) {
        self.limiter.charge(&request.org, prompt_tokens + completion_tokens);
        self.ledger.add(&request.org, model, prompt_tokens, completion_tokens);
        if let Target::Adapter { adapter_id, .. } = &request.target {
            self.ledger.used(adapter_id);
        }
        crate::metrics::tokens(&request.target, prompt_tokens, completion_tokens);
    }

    /// Writes all accounts now, before the process ends.
    pub async fn flush(&self) {
        self.ledger.flush(&self.storage).await;
    }

    /// [`Gateway::resolve`] for inference, which goes on while the database is away.
    pub(crate) async fn resolve_for_inference(
        &self,
        org: &str,
        model: &str,
    ) -> ApiResult<Resolved> {
        if model.contains('\0') {
            return Err(ApiError::model_not_found(model));
        }
        self.names.resolve(&self.storage.db, org, model).await
    }

    /// [`Gateway::resolve_for_inference`], None where it is a 404; of a name that can be stored.
    pub(crate) async fn look_up(
        &self,
        org: &str,
        model: &str,
    ) -> storage::Result<Option<Resolved>> {
        self.names.look_up(&self.storage.db, org, model).await
    }

    /// What a model name means for an organization; 404 where it means nothing.
    pub(crate) async fn resolve(&self, org: &str, model: &str) -> ApiResult<Resolved> {
        // Names with U+0000 cannot be stored, so none exists.
        if model.contains('\0') {
            return Err(ApiError::model_not_found(model));
        }
        let resolved = self.storage.db.resolve(org, model).await?;
        resolved.ok_or_else(|| ApiError::model_not_found(model))
    }
}

async fn keep_accounts(ledger: Arc<Ledger>, storage: Storage) {
    let mut period = tokio::time::interval(FLUSH_PERIOD);
    loop {
        period.tick().await;
        ledger.flush(&storage).await;
        crate::metrics::upkeep();
    }
}
