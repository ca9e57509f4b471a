//! Adapters of the simulated world: where their weights lie, how workers come by them, and
//! operators' words about where they and jobs are to be. The worker's part is the glue that
//! `intake/adapters.rs` and `intake/inbox.rs` have, over virtual time.

use std::collections::{BTreeMap, BTreeSet};

use storage::objects::ObjectKey;
use storage::queue::message::{Refusal, RefusalKind, ResidentAdapter, Target, ToWorker, Update};

use crate::engine::mix;
use crate::owner::Run;
use crate::plan::{Health, Server, Word};
use crate::world::{Answer, Broken, Op, Party, Tag, World, note};

/// Adapters that there are.
pub const ADAPTERS: usize = 3;

/// How long a worker asks the store for weights that requests wait for. Shorter and longer than
/// the store is away.
const COLD: u64 = 700;

/// One try, for requests that are to come.
const PRELOAD: u64 = 100;

/// What its weights are, as a number.
fn version(adapter: usize) -> u64 {
    1 + mix(&[adapter as u64]) % 1000
}

pub fn id(adapter: usize) -> String {
    format!("adp-{adapter}")
}

fn object(adapter_id: &str) -> String {
    format!("adapters/{adapter_id}")
}

fn key(object: &str) -> ObjectKey {
    ObjectKey::AdapterWeights { object: object.to_owned() }
}

pub fn target(adapter: usize) -> Target {
    let adapter_id = id(adapter);
    Target::Adapter { model: format!("ft:{adapter}"), object: object(&adapter_id), adapter_id }
}

/// The one version that answers to a target; none: whichever is live.
pub fn true_version(target: &Target) -> Option<u64> {
    match target {
        Target::Base => Some(0),
        Target::Adapter { adapter_id, .. } => {
            (0..ADAPTERS).find(|adapter| id(*adapter) == *adapter_id).map(version)
        }
        Target::Job { .. } => None,
    }
}

/// Weights in a worker's memory.
#[derive(Default)]
pub struct Weights {
    held: BTreeMap<String, u64>,
    /// Of these, requests wait for the load under way.
    loading: BTreeSet<String>,
}

impl Weights {
    pub fn version(&self, adapter_id: &str) -> Option<u64> {
        self.held.get(adapter_id).copied()
    }

    pub fn told(&self) -> Vec<ResidentAdapter> {
        let told = |id: &String| ResidentAdapter {
            id: id.clone(),
            version: None,
            on_device: true,
            requests: 0,
        };
        self.held.keys().map(told).collect()
    }
}

impl Run {
    fn leave(&mut self) {
        self.pausing = true;
        self.leaving = true;
    }
}

impl World {
    pub fn store_adapters(&mut self) {
        for adapter in 0..ADAPTERS {
            self.objects.insert(key(&object(&id(adapter))), version(adapter).to_string());
        }
    }

    /// Reads weights that a request waits for, once for all who do.
    pub fn load_adapter(&mut self, worker: usize, adapter_id: &str, object: &str) {
        if self.workers[worker].weights.loading.insert(adapter_id.to_owned()) {
            let op = Op::Get(key(object));
            self.call(Party::Worker(worker), COLD, op, Tag::Cold(adapter_id.to_owned()));
        }
    }

    /// Reads weights before their requests come.
    pub fn preload_adapter(&mut self, worker: usize, adapter_id: &str, object: &str) {
        let op = Op::Get(key(object));
        self.call(Party::Worker(worker), PRELOAD, op, Tag::Preload(adapter_id.to_owned()));
    }

    /// Weights have come, or will not; what waits for them goes on or ends.
    pub fn adapter_read(&mut self, index: usize, adapter_id: &str, answer: &Answer, cold: bool) {
        let worker = &mut self.workers[index];
        if cold {
            worker.weights.loading.remove(adapter_id);
        }
        if let Answer::Object(Some(stored)) = answer {
            let version = stored.parse().unwrap_or(0);
            worker.weights.held.insert(adapter_id.to_owned(), version);
            return worker.engine.warm(adapter_id, version);
        }
        if matches!(answer, Answer::Object(None)) {
            return self.violate(format!("the weights of {adapter_id} are gone"));
        }
        note!(self, "w{index} cannot read {adapter_id}");
        if cold && self.broken != Broken::ColdWaits {
            let message = "its weights cannot be read".to_owned();
            let refusal = Refusal { kind: RefusalKind::Unavailable, message, param: None };
            let failed = self.workers[index].engine.end_cold(adapter_id);
            let failed = failed.into_iter().map(|key| (key, Update::Failed(refusal.clone())));
            self.put_out(index, failed.collect());
        }
    }

    /// Lets go of weights. Requests that have them go on, here or, handed over, elsewhere.
    pub fn evict_adapter(&mut self, index: usize, adapter_id: &str, hand_over: bool) {
        let worker = &mut self.workers[index];
        worker.weights.held.remove(adapter_id);
        if hand_over {
            let mut moved = worker.engine.hand_over(Some(adapter_id));
            if self.broken == Broken::HandOvers {
                moved.clear();
            }
            self.put_out(index, moved);
        }
    }

    /// Saves what a worker that drains trains.
    pub fn save_runs(&mut self, index: usize) {
        for run in self.workers[index].runs.values_mut() {
            run.leave();
        }
    }

    /// Saves a job and gives it back, if it is here.
    pub fn leave_job(&mut self, index: usize, job: &str) {
        note!(self, "w{index} is to leave {job}");
        if let Some(run) = self.workers[index].runs.get_mut(job) {
            run.leave();
        }
    }

    /// An operator's word begins to be carried out, or goes on where it takes two.
    pub fn obey_word(&mut self, word: Word, begins: bool) {
        if self.plan.health(Server::Queue, self.now) != Health::Fine {
            return;
        }
        let worker = |index: usize| format!("w{index}");
        let (to, message) = match (word, begins) {
            (Word::MoveAdapter { adapter, to, .. }, true) => {
                let adapter_id = id(adapter);
                (to, ToWorker::Load { object: object(&adapter_id), adapter_id })
            }
            (Word::MoveAdapter { adapter, from, .. }, false) => {
                (from, ToWorker::Evict { adapter_id: id(adapter), hand_over: true })
            }
            (Word::EvictAdapter { adapter, from }, true) => {
                (from, ToWorker::Evict { adapter_id: id(adapter), hand_over: false })
            }
            (Word::MoveJob { job, from }, true) => {
                (from, ToWorker::MoveJob { job_id: format!("ftjob-{job}"), to: None })
            }
            (_, false) => return,
        };
        note!(self, "to w{to}: {message:?}");
        self.queue.control(&worker(to), &message);
    }
}
