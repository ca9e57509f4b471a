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
    let running = lock(&shared.runs).len();
    WorkerPresence {
        worker_id: shared.options.worker_id.clone(),
        incarnation: shared.incarnation.clone(),
        protocol: vec![PROTOCOL_VERSION],
        base: shared.options.base_name.clone(),
        base_fingerprint: shared.base_fingerprint.clone(),
        device: shared.device.clone(),
        adapters: residents(shared),
        requests: lock(&shared.routes).len() as u32,
        free_blocks: gauges.free_blocks.load(Relaxed) as u32,
        total_blocks: gauges.total_blocks.load(Relaxed) as u32,
        training_jobs: running as u32,
        training_room: shared.options.max_jobs.saturating_sub(running) as u32,
        draining: shared.draining.load(Relaxed),
    }
}

/// Adapters and jobs' weights here, each version once, on the device before host memory. One that
/// goes with its last reader is not told: nobody else gets it.
fn residents(shared: &Shared) -> Vec<ResidentAdapter> {
    let on_device = shared.gauges.residents();
    let plain =
        on_device.iter().filter(|resident| !resident.leaving && !resident.key.contains('#'));
    let mut adapters: Vec<ResidentAdapter> =
        plain.map(|resident| named(&resident.key, true, resident.readers)).collect();
    let runs = lock(&shared.runs);
    for (id, _) in runs.iter().filter(|(_, running)| running.live) {
        let parts = on_device
            .iter()
            .filter(|resident| resident.key.split_once('#').is_some_and(|(job, _)| job == id));
        let version = parts.clone().find_map(|resident| resident.version);
        adapters.push(ResidentAdapter {
            id: id.clone(),
            version: version.map(|step| step as u64),
            on_device: true,
            requests: parts.map(|resident| resident.readers).sum(),
        });
    }
    drop(runs);
    for key in shared.adapters.keys() {
        let copy = named(&key, false, 0);
        let known =
            |other: &ResidentAdapter| (&other.id, other.version) == (&copy.id, copy.version);
        if !adapters.iter().any(known) {
            adapters.push(copy);
        }
    }
    adapters
}

/// A saved state of a job is kept under `JOB@STEP`.
fn named(key: &str, on_device: bool, requests: u32) -> ResidentAdapter {
    let saved = key.split_once('@').and_then(|(job, step)| Some((job, step.parse().ok()?)));
    let (id, version) = saved.map_or((key, None), |(job, step)| (job, Some(step)));
    ResidentAdapter { id: id.to_owned(), version, on_device, requests }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_state_is_told_as_a_version_of_its_job() {
        let told = |key| {
            let copy = named(key, true, 2);
            assert_eq!((copy.on_device, copy.requests), (true, 2));
            (copy.id, copy.version)
        };
        assert_eq!(told("ftjob-1@12"), ("ftjob-1".to_owned(), Some(12)));
        assert_eq!(told("adp-1"), ("adp-1".to_owned(), None));
    }
}
