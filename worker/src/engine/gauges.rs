//! What others may know of the engine without asking it: counters it keeps up to date.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// A resident adapter as presence tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResidentGauge {
    /// Its key in the registry.
    pub key: String,
    /// Sequences that read it.
    pub readers: u32,
    /// Where it is what a job has published: after so many steps.
    pub version: Option<usize>,
    /// It goes with its last reader; nobody else gets it.
    pub leaving: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Gauges {
    /// Requests queued or running.
    pub requests: AtomicUsize,
    /// Free KV blocks.
    pub free_blocks: AtomicUsize,
    /// All KV blocks.
    pub total_blocks: AtomicUsize,
    /// Jobs that hold training memory.
    pub training_jobs: AtomicUsize,
    /// Steps so far.
    pub steps: AtomicU64,
    /// Prompt and generated rows so far.
    pub inference_rows: AtomicU64,
    /// Training rows that went forward so far.
    pub training_rows: AtomicU64,
    /// Sequences displaced for want of blocks.
    pub displaced: AtomicU64,
    residents: Mutex<Vec<ResidentGauge>>,
}

impl Gauges {
    /// Of an engine that has not begun, with so many KV blocks: all are free. Presence is told
    /// from it before the engine's thread runs.
    pub fn idle(blocks: usize) -> Self {
        Self { free_blocks: blocks.into(), total_blocks: blocks.into(), ..Self::default() }
    }

    /// Adapters on the device.
    pub fn residents(&self) -> Vec<ResidentGauge> {
        self.residents.lock().map(|list| list.clone()).unwrap_or_default()
    }

    /// Replaces the list of adapters on the device.
    pub fn set_residents(&self, list: Vec<ResidentGauge>) {
        if let Ok(mut residents) = self.residents.lock() {
            *residents = list;
        }
    }

    /// Adds to a counter.
    pub fn count(counter: &AtomicU64, by: usize) {
        counter.fetch_add(by as u64, Relaxed);
    }
}
