//! Adapters as replies show them.

use serde::Serialize;
use storage::db::AdapterRow;
use storage::queue::message::WorkerPresence;
use utoipa::ToSchema;

use crate::wire::job::FineTuningJob;

/// `adapter`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AdapterObject {
    /// `adp-…`.
    pub id: String,
    /// Always `adapter`.
    pub object: &'static str,
    /// The name requests use, `ft:…`.
    pub model: String,
    /// Base model name.
    pub base: String,
    /// LoRA rank.
    pub rank: i64,
    /// LoRA alpha.
    pub alpha: f64,
    /// Scaled by alpha/√rank.
    pub use_rslora: bool,
    /// Modules with weights.
    pub target_modules: Vec<String>,
    /// Size of the weights on a device.
    pub bytes: i64,
    /// Version within its lineage.
    pub version: i64,
    /// The job that trained it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fine_tuning_job_id: Option<String>,
    /// Nearest copy: `device`, `host` or `object_store`.
    pub residency: &'static str,
    /// Where its copies lie; in replies to operators.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workers: Option<Vec<CopyObject>>,
    /// Kept on the device.
    pub pinned: bool,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix seconds; null before its first use.
    pub last_used_at: Option<i64>,
}

impl AdapterObject {
    /// From its row and where presence says it lies.
    pub fn new(row: AdapterRow, residency: &'static str) -> AdapterObject {
        AdapterObject {
            id: row.id,
            object: "adapter",
            model: row.model,
            base: row.base,
            rank: row.rank,
            alpha: row.alpha,
            use_rslora: row.use_rslora,
            target_modules: row.target_modules,
            bytes: row.bytes,
            version: row.version,
            fine_tuning_job_id: row.job,
            residency,
            workers: None,
            pinned: row.pinned,
            created_at: row.created_at,
            last_used_at: row.last_used_at,
        }
    }

    /// With the workers that hold it.
    pub fn on(mut self, workers: &[WorkerPresence]) -> AdapterObject {
        let copies = workers.iter().flat_map(|worker| {
            let own = worker.adapters.iter().filter(|copy| copy.id == self.id);
            own.map(|copy| CopyObject {
                worker: worker.worker_id.clone(),
                residency: if copy.on_device { "device" } else { "host" },
                requests: copy.requests,
            })
        });
        self.workers = Some(copies.collect());
        self
    }
}

/// A copy of an adapter on a worker.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CopyObject {
    /// Its worker.
    pub worker: String,
    /// `device` or `host`.
    pub residency: &'static str,
    /// Sequences that read it now.
    pub requests: u32,
}

/// What was moved.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Migrated {
    /// An adapter.
    Adapter(Box<AdapterObject>),
    /// A running job.
    Job(Box<FineTuningJob>),
}
