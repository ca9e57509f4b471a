//! Sequences that workers draw for though nobody waits for them: once nothing goes wrong any more
//! and messages flow, they are cancelled within a bounded time.

use std::collections::BTreeMap;

use storage::queue::message::Request;

use crate::clients::index_of;
use crate::world::World;

/// For this long after the last fault a stray may run: presence comes back, the gateway looks at
/// it, hears an item, and its cancel takes its way.
const BOUND: u64 = 1500;

/// Since when each stray is known: worker, its life, number in its engine.
#[derive(Default)]
pub struct Strays {
    since: BTreeMap<(usize, u32, u64), u64>,
}

impl Strays {
    /// Looks at all workers; what is wrong, if a stray has run on for too long.
    pub fn look(&mut self, world: &World) -> Option<String> {
        let mut since = BTreeMap::new();
        let mut wrong = None;
        for (index, worker) in world.workers.iter().enumerate() {
            for (key, request) in worker.engine.drawing() {
                if world.is_awaited(request) {
                    continue;
                }
                let id = (index, worker.process.life, key);
                let from = self.since.get(&id).copied().unwrap_or(world.now);
                since.insert(id, from);
                if world.now > from + BOUND {
                    let (request_id, attempt) = (&request.request_id, request.attempt);
                    wrong = Some(format!("w{index} runs {request_id} #{attempt} for nobody"));
                }
            }
        }
        self.since = since;
        wrong
    }
}

impl World {
    /// Whether a gateway waits for this placement.
    fn is_awaited(&self, request: &Request) -> bool {
        let Some(client) = index_of(&request.request_id) else { return false };
        let gateway = self.gateways.iter().find(|gateway| gateway.id == request.gateway);
        gateway
            .and_then(|gateway| gateway.drives.get(&client))
            .is_some_and(|drive| drive.flight.request().attempt == request.attempt)
    }
}
