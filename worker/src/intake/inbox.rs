//! What comes through the inbox: requests, cancels, nudges, and an operator's words about
//! adapters, jobs and the worker itself.

use super::adapters::Source;
use super::{Shared, lock, requests};
use crate::engine::command::{Command, Leaving};
use std::sync::Arc;
use storage::queue::Inbox;
use storage::queue::message::ToWorker;

/// Reads the inbox until this worker closes it, another takes it over, or the engine is gone. Gives
/// it back open: presence ends with it, which must not be before all that came is answered.
pub async fn run(shared: Arc<Shared>, mut inbox: Inbox) -> Inbox {
    loop {
        let message = tokio::select! {
            biased;
            () = shared.closing.notified() => return inbox,
            message = inbox.recv() => message,
        };
        let Some(message) = message else { return inbox };
        if !obey(&shared, message).await {
            return inbox;
        }
    }
}

/// False: the engine is gone.
async fn obey(shared: &Arc<Shared>, message: ToWorker) -> bool {
    match message {
        ToWorker::Place(request) => return requests::place(shared, *request).await,
        ToWorker::Cancel { request_id, attempt } => {
            return cancel(shared, &request_id, attempt).await;
        }
        ToWorker::Evict { adapter_id, hand_over } => {
            return evict(shared, adapter_id, hand_over).await;
        }
        ToWorker::JobNudge { job_id } => nudge(shared, &job_id),
        ToWorker::Load { adapter_id, object } => load(shared, adapter_id, object),
        // The job's runner saves it and lets go.
        ToWorker::MoveJob { job_id, to } => lock(&shared.runs).leave(job_id, to),
        ToWorker::Drain => shared.told_to_drain.notify_one(),
    }
    true
}

async fn cancel(shared: &Shared, request_id: &str, attempt: u32) -> bool {
    let key = lock(&shared.routes).cancel(request_id, attempt);
    match key {
        Some(key) => shared.command(Command::Cancel(key)).await,
        None => true,
    }
}

fn nudge(shared: &Shared, job_id: &str) {
    match lock(&shared.runs).get(job_id) {
        Some(running) => running.bell.notify_one(),
        None => shared.job_bell.notify_one(),
    }
}

fn load(shared: &Shared, adapter_id: String, object: String) {
    shared.adapters.remember(&adapter_id, Source::Adapter { object });
    if let Err(full) = shared.wanted.try_send(adapter_id) {
        tracing::warn!(adapter.id = full.into_inner(), "too many adapters to load at once");
    }
}

async fn evict(shared: &Shared, adapter_id: String, hand_over: bool) -> bool {
    shared.adapters.drop_weights(&adapter_id);
    if hand_over && !shared.command(Command::HandOver(Leaving::Of(adapter_id.clone()))).await {
        return false;
    }
    shared.command(Command::EvictAdapter(adapter_id)).await
}
