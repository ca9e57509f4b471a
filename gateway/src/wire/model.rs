//! Models and workers as replies show them.

use serde::Serialize;
use storage::queue::message::WorkerPresence;
use utoipa::ToSchema;

/// `model`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ModelObject {
    /// The name requests use.
    pub id: String,
    /// Always `model`.
    pub object: &'static str,
    /// Unix seconds; the same in every reply.
    pub created: i64,
    /// `loquetier` for bases, else the organization.
    pub owned_by: String,
    /// The base of a fine-tuned model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Longest sequence in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<i64>,
}

/// A live worker. Members see counts, operators also which adapters are resident.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct WorkerObject {
    /// Stable name.
    pub id: String,
    /// Always `worker`.
    pub object: &'static str,
    /// Base model name.
    pub base: String,
    /// Fingerprint of its base's weights and tokenizer.
    pub base_fingerprint: String,
    /// Device in words.
    pub device: String,
    /// Requests waiting or running.
    pub requests: u32,
    /// KV blocks free.
    pub free_blocks: u32,
    /// KV blocks in all.
    pub total_blocks: u32,
    /// Jobs training now.
    pub training_jobs: u32,
    /// Jobs it can train at once.
    pub training_room: u32,
    /// Takes no new work.
    pub draining: bool,
    /// Adapters on the device or in host memory.
    pub resident_adapters: usize,
    /// Which they are; operators only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapters: Option<Vec<ResidentObject>>,
}

/// An adapter on a worker.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ResidentObject {
    /// `adp-…` or `ftjob-…`.
    pub id: String,
    /// Optimizer steps that a job's weights have seen; an `adp-…` id is one version itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
    /// `device` or `host`.
    pub residency: &'static str,
    /// Requests using it now.
    pub requests: u32,
}

impl WorkerObject {
    /// From presence; `whole` adds what only operators see.
    pub fn new(presence: WorkerPresence, whole: bool) -> WorkerObject {
        let resident_adapters = presence.adapters.len();
        let show = |adapter: storage::queue::message::ResidentAdapter| ResidentObject {
            id: adapter.id,
            version: adapter.version,
            residency: if adapter.on_device { "device" } else { "host" },
            requests: adapter.requests,
        };
        WorkerObject {
            id: presence.worker_id,
            object: "worker",
            base: presence.base,
            base_fingerprint: presence.base_fingerprint,
            device: presence.device,
            requests: presence.requests,
            free_blocks: presence.free_blocks,
            total_blocks: presence.total_blocks,
            training_jobs: presence.training_jobs,
            training_room: presence.training_room,
            draining: presence.draining,
            resident_adapters,
            adapters: whole.then(|| presence.adapters.into_iter().map(show).collect()),
        }
    }
}
