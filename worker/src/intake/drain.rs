//! How a worker leaves: it takes no new work, has its jobs saved and left to others, and hands its
//! requests over to workers that can go on with them.

use super::adapters::Source;
use super::{Shared, lock, presence};
use crate::engine::command::{Command, Leaving};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use storage::queue::message::{PROTOCOL_VERSION, ToWorker, WorkerPresence};

/// Between two looks at what is left.
const LOOK: Duration = Duration::from_millis(50);
/// How long a stopping worker waits for its jobs to be saved.
const SAVE_WAIT: Duration = Duration::from_secs(20);
/// How long the engine may take to let go of the last requests.
const LAST_WAIT: Duration = Duration::from_secs(5);

/// Takes no new work, and tells so at once.
pub async fn begin(shared: &Shared) {
    shared.draining.store(true, Relaxed);
    if let Err(error) = shared.storage.queue.refresh(presence::of(shared)).await {
        tracing::warn!(%error, "telling that this worker drains failed");
    }
    shared.job_bell.notify_one();
    for (_, running) in lock(&shared.runs).iter() {
        running.bell.notify_one();
    }
}

/// Waits until all jobs are saved and given back. `taking`: the task that claims jobs.
pub async fn save_jobs(shared: &Shared, taking: &mut tokio::task::JoinHandle<()>) {
    let saved = async {
        if !taking.is_finished()
            && let Err(error) = taking.await
        {
            tracing::error!(%error, "the task that claims jobs did not end well");
        }
        while !lock(&shared.runs).is_empty() {
            tokio::time::sleep(LOOK).await;
        }
    };
    if tokio::time::timeout(SAVE_WAIT, saved).await.is_err() {
        tracing::warn!("not all jobs were saved in time; their leases run out");
    }
}

/// Waits until no request is left here. Those that another worker can go on with are handed over
/// as soon as there is one; the others may end by themselves within `grace`.
pub async fn hand_over(shared: &Shared, grace: Duration) {
    let deadline = Instant::now() + grace;
    let mut announced = false;
    loop {
        let successors = successors(shared).await;
        if !announced && !successors.is_empty() {
            announced = true;
            announce(shared, &successors).await;
        }
        let now = Instant::now();
        if lock(&shared.routes).is_empty() || now >= deadline + LAST_WAIT {
            return;
        }
        let leaving = match successors.is_empty() {
            _ if now >= deadline => Some(Leaving::All),
            true => None,
            false => Some(Leaving::Movable),
        };
        if let Some(leaving) = leaving
            && !shared.command(Command::HandOver(leaving)).await
        {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Live workers that go on with what runs here, the least loaded first.
async fn successors(shared: &Shared) -> Vec<WorkerPresence> {
    let mut workers = match shared.storage.queue.workers().await {
        Ok(workers) => workers,
        Err(error) => {
            tracing::warn!(%error, "presence could not be read");
            return Vec::new();
        }
    };
    workers.retain(|worker| {
        worker.worker_id != shared.options.worker_id
            && worker.base == shared.options.base_name
            && worker.base_fingerprint == shared.base_fingerprint
            && worker.protocol.contains(&PROTOCOL_VERSION)
            && !worker.draining
    });
    workers.sort_by_key(|worker| worker.requests);
    workers
}

/// Has adapters that only this worker holds loaded by others, in turn.
async fn announce(shared: &Shared, successors: &[WorkerPresence]) {
    let held = |key: &str| successors.iter().any(|other| other.holds(key));
    let mut targets = successors.iter().cycle();
    for resident in shared.gauges.residents() {
        let source = shared.adapters.source(&resident.key);
        let Some(Source::Adapter { object }) = source.filter(|_| !held(&resident.key)) else {
            continue;
        };
        let Some(target) = targets.next() else { return };
        let load = ToWorker::Load { adapter_id: resident.key, object };
        if let Err(error) = shared.storage.queue.control(&target.worker_id, load).await {
            tracing::warn!(%error, "a worker could not be told to load an adapter");
            return;
        }
    }
}
