//! What others may know of this worker, told at short intervals.

use super::{Shared, lock};
use crate::engine::command::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use storage::queue::message::{PROTOCOL_VERSION, ResidentAdapter, WorkerPresence};

/// How often presence is told; gateways choose a worker by it.
const REFRESH: Duration = Duration::from_millis(250);

/// The worker as it is now.
pub fn of(shared: &Shared) -> WorkerPresence {
    let gauges = &shared.gauges;
    let draining = shared.draining.load(Relaxed);
    let on_device = gauges.residents();
    let mut adapters: Vec<ResidentAdapter> = on_device
        .iter()
        .filter(|resident| !resident.key.contains('#'))
        .map(|resident| ResidentAdapter {
            id: resident.key.clone(),
            on_device: true,
            requests: resident.readers,
        })
        .collect();
    let running = lock(&shared.running);
    let live = running.iter().filter(|(_, running)| running.live);
    adapters.extend(live.map(|(id, _)| {
        ResidentAdapter {
            id: id.clone(),
            on_device: true,
            requests: on_device
                .iter()
                .filter(|resident| resident.key.split_once('#').is_some_and(|(job, _)| job == id))
                .map(|resident| resident.readers)
                .sum(),
        }
    }));
    let jobs = running.len();
    drop(running);
    for key in shared.adapters.keys() {
        if !adapters.iter().any(|adapter| adapter.id == key) {
            adapters.push(ResidentAdapter { id: key, on_device: false, requests: 0 });
        }
    }
    WorkerPresence {
        worker_id: shared.options.worker_id.clone(),
        incarnation: shared.incarnation.clone(),
        protocol: vec![PROTOCOL_VERSION],
        base: shared.options.base_name.clone(),
        base_fingerprint: shared.base_fingerprint.clone(),
        device: shared.device.clone(),
        adapters,
        requests: lock(&shared.routes).len() as u32,
        free_blocks: gauges.free_blocks.load(Relaxed) as u32,
        total_blocks: gauges.total_blocks.load(Relaxed) as u32,
        training_jobs: jobs as u32,
        training_room: shared.options.max_jobs.saturating_sub(jobs) as u32,
        draining,
    }
}

/// Tells presence until the engine is gone.
pub async fn run(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(REFRESH);
    loop {
        ticks.tick().await;
        if let Err(error) = shared.storage.queue.refresh(of(&shared)).await {
            tracing::warn!(%error, "telling presence failed");
        }
        drop_lost_gateways(&shared).await;
        if shared.commands.is_closed() {
            return;
        }
    }
}

/// Ends the requests of gateways that are gone.
async fn drop_lost_gateways(shared: &Shared) {
    // Requests that come while the question is under way are of gateways it may not have seen.
    let mark = lock(&shared.routes).mark();
    let Ok(alive) = shared.storage.queue.gateways().await else { return };
    let lost: Vec<String> = lock(&shared.routes)
        .gateways()
        .into_iter()
        .filter(|gateway| !alive.contains(gateway))
        .collect();
    for gateway in lost {
        let keys = lock(&shared.routes).drop_gateway(&gateway, mark);
        for key in keys {
            shared.command(Command::Cancel(key)).await;
        }
    }
}
