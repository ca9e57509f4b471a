//! Which worker gets a request: a pure function of presence. Among the live workers of the base,
//! those that hold the adapter and have room come first, and of equals the less loaded of two drawn
//! at random, so that gateways with the same picture do not all pick the same worker.

use rand::{Rng, RngExt};
use storage::queue::message::{PROTOCOL_VERSION, Target, WorkerPresence};

/// What a request asks of its worker.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    /// Base model name.
    pub base: &'a str,
    /// Fingerprint the adapter was made for; none for the base itself.
    pub base_fingerprint: Option<&'a str>,
    /// What runs on it.
    pub target: &'a Target,
    /// Worker that owns the job, for a request on live weights.
    pub owner: Option<&'a str>,
    /// Worker that just failed the request, or handed it over: the last choice.
    pub avoid: Option<&'a str>,
}

/// Every candidate, best first. Empty: no live worker serves the base.
pub fn candidates<'a>(
    workers: &'a [WorkerPresence],
    wish: &Wish<'_>,
    rng: &mut impl Rng,
) -> Vec<&'a WorkerPresence> {
    let fits = |worker: &&WorkerPresence| {
        serves(worker, wish.base, wish.base_fingerprint) && !worker.draining
    };
    let rank = |worker: &&WorkerPresence| {
        let avoided = wish.avoid == Some(worker.worker_id.as_str());
        (avoided, distance(worker, wish))
    };
    let mut order: Vec<&WorkerPresence> = workers.iter().filter(fits).collect();
    order.sort_by_key(|worker| (rank(worker), load(worker)));
    for equals in order.chunk_by_mut(|one, two| rank(one) == rank(two)) {
        let [one, two] = [(); 2].map(|()| rng.random_range(0..equals.len()));
        // Sorted by load: the lower place is the less loaded of the two.
        equals[..=one.min(two)].rotate_right(1);
    }
    order
}

/// Whether a worker speaks our protocol and runs the base, with the weights that are meant.
pub fn serves(worker: &WorkerPresence, base: &str, fingerprint: Option<&str>) -> bool {
    worker.base == base
        && worker.protocol.contains(&PROTOCOL_VERSION)
        && fingerprint.is_none_or(|print| print == worker.base_fingerprint)
}

/// The least loaded of some workers.
pub fn least_loaded(workers: impl Iterator<Item = WorkerPresence>) -> Option<WorkerPresence> {
    workers.min_by_key(load)
}

/// Requests first, then the share of blocks in use in thousandths.
fn load(worker: &WorkerPresence) -> (u32, u64) {
    let used = u64::from(worker.total_blocks.saturating_sub(worker.free_blocks));
    (worker.requests, used * 1000 / u64::from(worker.total_blocks.max(1)))
}

/// How far the wanted weights are from running: 0 at hand and with room, 1 in host memory and with
/// room, 2 not there or without room. The base is at hand everywhere.
fn distance(worker: &WorkerPresence, wish: &Wish<'_>) -> u8 {
    let has_room = worker.free_blocks > 0;
    let id = match wish.target {
        Target::Base => return if has_room { 0 } else { 2 },
        Target::Adapter { adapter_id, .. } => adapter_id,
        Target::Job { job_id } => job_id,
    };
    if wish.owner == Some(worker.worker_id.as_str()) {
        return 0;
    }
    match worker.holds(id) {
        _ if !has_room => 2,
        true => 0,
        false if worker.adapters.iter().any(|adapter| adapter.id == *id) => 1,
        false => 2,
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};
    use storage::queue::message::ResidentAdapter;

    use super::*;

    fn worker(id: &str, requests: u32) -> WorkerPresence {
        WorkerPresence {
            worker_id: id.to_owned(),
            incarnation: format!("{id}-1"),
            protocol: vec![PROTOCOL_VERSION],
            base: "b".to_owned(),
            base_fingerprint: "print".to_owned(),
            device: "cpu".to_owned(),
            adapters: Vec::new(),
            requests,
            free_blocks: 10,
            total_blocks: 10,
            training_jobs: 0,
            training_room: 1,
            draining: false,
        }
    }

    fn holding(mut worker: WorkerPresence, id: &str, on_device: bool) -> WorkerPresence {
        worker.adapters.push(ResidentAdapter {
            id: id.to_owned(),
            version: None,
            on_device,
            requests: 0,
        });
        worker
    }

    fn adapter() -> Target {
        let text = |text: &str| text.to_owned();
        Target::Adapter { adapter_id: text("adp-1"), model: text("ft:b"), object: text("o") }
    }

    fn wish(target: &Target) -> Wish<'_> {
        Wish { base: "b", base_fingerprint: None, target, owner: None, avoid: None }
    }

    fn order(workers: &[WorkerPresence], wish: &Wish<'_>, seed: u64) -> Vec<String> {
        let mut rng = StdRng::seed_from_u64(seed);
        candidates(workers, wish, &mut rng).iter().map(|w| w.worker_id.clone()).collect()
    }

    #[test]
    fn the_holder_of_the_adapter_comes_first_unless_it_is_full() {
        let mut workers = [
            worker("idle", 0),
            holding(worker("host", 5), "adp-1", false),
            holding(worker("device", 9), "adp-1", true),
        ];
        for seed in 0..20 {
            assert_eq!(order(&workers, &wish(&adapter()), seed), ["device", "host", "idle"]);
        }
        workers[2].free_blocks = 0;
        assert_eq!(order(&workers, &wish(&adapter()), 1)[0], "host");
    }

    #[test]
    fn of_many_holders_the_less_loaded_of_two_comes_first() {
        let mut workers: Vec<_> = (0..3)
            .map(|i| holding(worker(&format!("w{i}"), 5 + i), "adp-1", true))
            .chain([worker("idle", 0), worker("busy", 9)])
            .collect();
        let mut first = [0; 3];
        for seed in 0..300 {
            let order = order(&workers, &wish(&adapter()), seed);
            first[order[0][1..].parse::<usize>().unwrap()] += 1;
            let mut holders = order[..3].to_vec();
            holders.sort();
            assert_eq!(holders, ["w0", "w1", "w2"], "before all others");
        }
        assert!(first[0] > first[1] && first[1] > first[2] && first[2] > 0, "{first:?}");
        for holder in &mut workers[..3] {
            holder.free_blocks = 0;
        }
        // Without room a holder is no better than another; the load decides.
        let best: Vec<_> =
            (0..50).map(|s| order(&workers, &wish(&adapter()), s).remove(0)).collect();
        assert!(best.iter().any(|id| id == "idle"), "{best:?}");
        assert!(
            order(&workers, &wish(&Target::Base), 1)[..2].iter().all(|id| !id.starts_with('w'))
        );
    }

    #[test]
    fn the_most_loaded_of_many_is_rarely_chosen_and_never_lost() {
        let workers: Vec<_> = (0..4).map(|i| worker(&format!("w{i}"), i)).collect();
        let mut first = [0; 4];
        for seed in 0..400 {
            let order = order(&workers, &wish(&Target::Base), seed);
            assert_eq!(order.len(), 4);
            first[order[0][1..].parse::<usize>().unwrap()] += 1;
        }
        assert!(first[0] > first[1] && first[1] > first[2] && first[2] > first[3], "{first:?}");
    }

    #[test]
    fn only_workers_that_can_run_it_are_candidates() {
        let mut other = worker("other", 0);
        other.base = "c".to_owned();
        let mut draining = worker("draining", 0);
        draining.draining = true;
        let mut newer = worker("newer", 0);
        newer.protocol = vec![PROTOCOL_VERSION + 1];
        let mut reloaded = worker("reloaded", 0);
        reloaded.base_fingerprint = "changed".to_owned();
        let workers = [other, draining, newer, reloaded, worker("right", 3)];
        let target = adapter();
        let wish = Wish { base_fingerprint: Some("print"), ..wish(&target) };
        assert_eq!(order(&workers, &wish, 1), ["right"]);
        assert!(order(&workers[..4], &wish, 1).is_empty());
    }

    #[test]
    fn live_weights_are_at_the_job_owner_and_a_failed_worker_is_last() {
        let workers = [worker("idle", 0), worker("owner", 9)];
        let target = Target::Job { job_id: "ftjob-1".to_owned() };
        let owned = Wish { owner: Some("owner"), ..wish(&target) };
        assert_eq!(order(&workers, &owned, 1), ["owner", "idle"]);
        let failed = Wish { avoid: Some("owner"), ..owned };
        assert_eq!(order(&workers, &failed, 1), ["idle", "owner"]);
    }
}
