//! Real processes over a tiny base, for whole-system tests: the embedded form, and the production
//! form over the stores that `./dev test` names.

// Each test binary uses a part of this.
#![allow(dead_code, unused_imports, clippy::unwrap_used)]

pub mod client;
pub mod cluster;
mod inputs;
pub mod own;
pub mod process;
pub mod server;
pub mod site;
pub mod stores;

pub use inputs::{chat, chat_file, tiny_base};
use std::time::{Duration, Instant};

/// Longest wait for anything.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks at what is waited for.
const LOOK: Duration = Duration::from_millis(10);

/// Looks until there is what is waited for. A look that takes too long says what it saw itself.
pub async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "still not: {what}");
        tokio::time::sleep(LOOK).await;
    }
}

/// Whether a worker trains nothing and holds nothing for a request.
pub fn is_idle(worker: &serde_json::Value) -> bool {
    worker["requests"] == 0
        && worker["training_jobs"] == 0
        && worker["free_blocks"] == worker["total_blocks"]
}
