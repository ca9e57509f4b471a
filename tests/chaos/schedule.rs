//! What is done to the service, and when: a pure function of a seed.

use super::blows::{Blow, Planned, Process, Store, Target};
use std::time::Duration;

/// Gateway processes.
pub const GATEWAYS: usize = 2;
/// Worker processes.
pub const WORKERS: usize = 3;
/// Jobs that are trained to their end; each makes an adapter.
pub const JOBS: usize = 3;
/// The job that is cancelled.
pub const DOOMED: usize = JOBS;
/// At most so many of them are disturbed at the same time by blows at processes.
const GATEWAYS_AT_ONCE: usize = 1;
const WORKERS_AT_ONCE: usize = 2;
/// What was hit is left alone for so long after it was repaired.
const REST_MS: u64 = 3000;
/// A gateway that was asked to end mostly has after so long.
const DRAIN_MS: u64 = 8000;

/// Which kind of target a card of the deck hits.
#[derive(Clone, Copy)]
enum Suit {
    Gateway,
    Worker,
    Store(Store),
    Adapter,
    Job,
    DoomedJob,
}

/// Every storm deals each of these once: whom, what, and between how many milliseconds it lasts.
/// Presence and leases last three seconds, so some end before and some after them.
const DECK: [(Suit, Blow, (u64, u64)); 33] = [
    (Suit::Worker, Blow::Kill, (200, 1500)),
    (Suit::Worker, Blow::Kill, (2000, 6000)),
    (Suit::Worker, Blow::Replace, (200, 3000)),
    (Suit::Worker, Blow::Replace, (200, 3000)),
    (Suit::Worker, Blow::Freeze, (500, 2000)),
    (Suit::Worker, Blow::Freeze, (4000, 7000)),
    (Suit::Worker, Blow::Terminate, (200, 1000)),
    (Suit::Worker, Blow::CutOff(Store::Redis), (4000, 7000)),
    (Suit::Worker, Blow::CutOff(Store::Postgres), (3500, 6000)),
    (Suit::Worker, Blow::CutOff(Store::Objects), (2000, 5000)),
    (Suit::Gateway, Blow::Kill, (200, 3000)),
    (Suit::Gateway, Blow::Freeze, (500, 2000)),
    (Suit::Gateway, Blow::Freeze, (4000, 6000)),
    (Suit::Gateway, Blow::CutOff(Store::Redis), (1000, 5000)),
    (Suit::Gateway, Blow::Terminate, (200, 2000)),
    (Suit::Store(Store::Redis), Blow::Restart, (100, 1500)),
    (Suit::Store(Store::Redis), Blow::Cut, (500, 3000)),
    (Suit::Store(Store::Redis), Blow::Hush, (1000, 4000)),
    (Suit::Store(Store::Postgres), Blow::Restart, (100, 2000)),
    (Suit::Store(Store::Postgres), Blow::Cut, (1000, 5000)),
    (Suit::Store(Store::Postgres), Blow::Hush, (1000, 5000)),
    (Suit::Store(Store::Objects), Blow::Cut, (1000, 5000)),
    (Suit::Store(Store::Objects), Blow::Hush, (1000, 5000)),
    (Suit::Adapter, Blow::Migrate, (0, 0)),
    (Suit::Adapter, Blow::Migrate, (0, 0)),
    (Suit::Adapter, Blow::Evict, (0, 0)),
    (Suit::Adapter, Blow::Evict, (0, 0)),
    (Suit::Job, Blow::Migrate, (0, 0)),
    (Suit::Job, Blow::Migrate, (0, 0)),
    (Suit::Job, Blow::Migrate, (0, 0)),
    (Suit::Job, Blow::Pause, (100, 1000)),
    (Suit::Job, Blow::Pause, (1000, 5000)),
    (Suit::DoomedJob, Blow::Cancel, (0, 0)),
];

/// Random numbers that are the same everywhere and for ever (SplitMix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From `low` to `high`, both included.
    fn between(&mut self, (low, high): (u64, u64)) -> u64 {
        low + self.roll() % (high - low + 1)
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.between((0, at as u64)) as usize);
        }
    }
}

/// Until when each target is busy with a blow, in milliseconds.
#[derive(Default)]
struct Busy(Vec<(Target, u64)>);

impl Busy {
    /// The targets of a suit that may be hit at a time.
    fn free(&self, suit: Suit, at: u64) -> Vec<Target> {
        let (all, at_once): (Vec<Target>, usize) = match suit {
            Suit::Gateway => (processes(Process::Gateway, GATEWAYS), GATEWAYS_AT_ONCE),
            Suit::Worker => (processes(Process::Worker, WORKERS), WORKERS_AT_ONCE),
            Suit::Store(store) => (vec![Target::Store(store)], 1),
            Suit::Adapter => ((0..JOBS).map(Target::Adapter).collect(), JOBS),
            Suit::Job => ((0..JOBS).map(Target::Job).collect(), JOBS),
            Suit::DoomedJob => (vec![Target::Job(DOOMED)], 1),
        };
        let busy = |target: &Target| self.0.iter().any(|(hit, until)| hit == target && *until > at);
        if all.iter().filter(|target| busy(target)).count() >= at_once {
            return Vec::new();
        }
        all.into_iter().filter(|target| !busy(target)).collect()
    }
}

fn processes(kind: fn(usize) -> Process, count: usize) -> Vec<Target> {
    (0..count).map(|number| Target::Process(kind(number))).collect()
}

/// The storm of a seed: its blows are spread over `length` and some seconds more.
pub fn schedule(seed: u64, length: Duration) -> Vec<Planned> {
    let mut dice = Dice(seed);
    let mut deck = DECK;
    dice.shuffle(&mut deck);
    let pace = length.as_millis() as u64 / deck.len() as u64;
    let mut busy = Busy::default();
    let mut planned = Vec::new();
    for (place, (suit, blow, bounds)) in (0..).zip(deck) {
        // Jobs do not last as long as a storm.
        let early = matches!(suit, Suit::Job | Suit::DoomedJob);
        let place = if early { place / 2 } else { place };
        let mut at = place * pace + dice.between((0, pace.max(2) / 2));
        let lasts = dice.between(bounds);
        let pick = dice.roll() as usize;
        let target = loop {
            let free = busy.free(suit, at);
            match free.get(pick % free.len().max(1)) {
                Some(target) => break *target,
                None => at += 100,
            }
        };
        let drain = match (target, blow) {
            (Target::Process(Process::Gateway(_)), Blow::Terminate) => DRAIN_MS,
            _ => 0,
        };
        busy.0.push((target, at + drain + lasts + REST_MS));
        let (at, lasts) = (Duration::from_millis(at), Duration::from_millis(lasts));
        planned.push(Planned { at, lasts, target, blow, pick });
    }
    planned.sort_by_key(|planned| planned.at);
    planned
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: Duration = Duration::from_secs(60);

    #[test]
    fn a_seed_always_makes_the_same_storm_and_another_seed_another() {
        assert_eq!(schedule(7, LENGTH), schedule(7, LENGTH));
        assert_ne!(schedule(7, LENGTH), schedule(8, LENGTH));
        // Pinned: a seed that somebody wrote down must mean the same next year.
        let first = schedule(1, LENGTH)[0].to_string();
        assert_eq!(first, "   0.5 s  gateway 1: killed, for 3.0 s");
    }

    #[test]
    fn every_storm_has_each_kind_of_blow_and_leaves_somebody_standing() {
        for seed in 0..200 {
            let storm = schedule(seed, LENGTH);
            assert_eq!(storm.len(), DECK.len());
            for (_, blow, _) in DECK {
                assert!(storm.iter().any(|planned| planned.blow == blow), "{seed}: {blow:?}");
            }
            assert!(storm.iter().all(|planned| planned.at < LENGTH * 3 / 2), "seed {seed}");
            for planned in &storm {
                let at_once = storm.iter().filter(|other| {
                    matches!(other.target, Target::Process(Process::Worker(_)))
                        && other.at <= planned.at
                        && planned.at < other.at + other.lasts
                });
                assert!(at_once.count() <= WORKERS_AT_ONCE, "seed {seed} at {planned}");
            }
        }
    }
}
