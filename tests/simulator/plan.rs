//! What goes wrong in one run: a schedule of faults drawn from the seed.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::adapters::ADAPTERS;

/// Nothing goes wrong after this; milliseconds of virtual time.
pub const FAULTS_END: u64 = 3000;

/// What an operator wants done; it is no fault, and explains nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Loaded there, and then handed over from here.
    MoveAdapter {
        adapter: usize,
        from: usize,
        to: usize,
    },
    EvictAdapter {
        adapter: usize,
        from: usize,
    },
    MoveJob {
        job: usize,
        from: usize,
    },
}

/// A party that can be reached or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    Queue,
    Rows,
    Store,
}

/// How a server answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Fine,
    /// Calls or their answers are lost, each by chance.
    Flaky,
    Away,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ends at once; another process takes its place at the end.
    KillWorker(usize),
    KillGateway(usize),
    /// Stands still, and goes on at the end.
    PauseWorker(usize),
    PauseGateway(usize),
    /// Hands over what it runs, ends, and another takes its place.
    DrainWorker(usize),
    /// Loses all it held, and is away until the end.
    RestartQueue,
    Away(Server),
    Flaky(Server),
    /// Token messages, requests and cancels are lost, doubled, swapped or held up, each by chance.
    Noise,
    Word(Word),
}

#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub at: u64,
    pub until: u64,
    pub kind: Kind,
}

/// The size of one run and what goes wrong in it.
#[derive(Clone, Debug)]
pub struct Plan {
    pub gateways: usize,
    pub workers: usize,
    /// Base models; each second worker runs the second one.
    pub bases: usize,
    pub clients: usize,
    pub jobs: usize,
    /// Requests that may wait in one inbox; a small bound is an explanation for refusals.
    pub inbox: usize,
    pub faults: Vec<Fault>,
}

impl Plan {
    /// The plan of a seed. Every sixteenth has no fault.
    pub fn of(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ 0x5EED);
        let what = rng.random_range(0..10);
        let workers = rng.random_range(1..=3);
        let gateways = rng.random_range(1..=2);
        let bases = if workers > 1 && rng.random_range(0..4) == 0 { 2 } else { 1 };
        let (clients, jobs) = match what {
            0..5 => (rng.random_range(2..=6), 0),
            5..8 => (0, rng.random_range(1..=3)),
            _ => (rng.random_range(1..=3), rng.random_range(1..=2)),
        };
        let inbox = if rng.random_range(0..6) == 0 { 1 } else { 64 };
        let count = if seed.is_multiple_of(16) { 0 } else { rng.random_range(1..=4) };
        let mut faults: Vec<Fault> =
            (0..count).map(|_| fault(&mut rng, gateways, workers, clients > 0)).collect();
        let words = rng.random_range(0..=2);
        faults.extend((0..words).map(|_| word(&mut rng, workers, bases, jobs)));
        Self { gateways, workers, bases, clients, jobs, inbox, faults }
    }

    /// One of requests alone, while the store is away.
    pub fn of_store(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ 0x0570);
        let at = rng.random_range(0..1000);
        let until = at + rng.random_range(500..2000);
        let faults = vec![Fault { at, until, kind: Kind::Away(Server::Store) }];
        Self { gateways: 1, workers: 1, bases: 1, clients: 6, jobs: 0, inbox: 64, faults }
    }

    /// One of requests alone, with nothing but faults of the queue, all at once.
    pub fn of_queue(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ 0x0E0E);
        let kinds = [Kind::Noise, Kind::Flaky(Server::Queue), Kind::Flaky(Server::Queue)];
        let workers = rng.random_range(1..=2);
        let late = [Kind::PauseWorker(0), Kind::RestartQueue][rng.random_range(0..2)];
        let mut faults: Vec<Fault> = kinds
            .into_iter()
            .map(|kind| {
                let at = rng.random_range(0..1000);
                Fault { at, until: at + rng.random_range(500..2000), kind }
            })
            .collect();
        let at = rng.random_range(0..FAULTS_END - 1000);
        faults.push(Fault { at, until: at + rng.random_range(1..1000), kind: late });
        Self { gateways: 1, workers, bases: 1, clients: 6, jobs: 0, inbox: 64, faults }
    }

    /// How a server answers now.
    pub fn health(&self, server: Server, now: u64) -> Health {
        let mut health = Health::Fine;
        for fault in self.faults.iter().filter(|f| f.at <= now && now < f.until) {
            match fault.kind {
                Kind::RestartQueue if server == Server::Queue => return Health::Away,
                Kind::Away(away) if away == server => return Health::Away,
                Kind::Flaky(flaky) if flaky == server => health = Health::Flaky,
                _ => {}
            }
        }
        health
    }

    pub fn is_noisy(&self, now: u64) -> bool {
        self.faults.iter().any(|f| f.kind == Kind::Noise && f.at <= now && now < f.until)
    }

    /// Nothing goes wrong from then on.
    pub fn end(&self) -> u64 {
        self.faults.iter().map(|fault| fault.until).max().unwrap_or(0)
    }

    /// Whether something that went wrong, or its wake, touches this time.
    pub fn explains(&self, from: u64, to: u64, wake: u64) -> bool {
        let mut faults = self.faults.iter().filter(|f| !matches!(f.kind, Kind::Word(_)));
        self.inbox == 1 || faults.any(|f| f.at <= to && from <= f.until + wake)
    }
}

fn fault(rng: &mut StdRng, gateways: usize, workers: usize, clients: bool) -> Fault {
    let at = rng.random_range(0..FAULTS_END - 1000);
    // Shorter and longer than presence and leases last.
    let mut length = rng.random_range(20..1000);
    let (g, w) = (rng.random_range(0..gateways), rng.random_range(0..workers));
    let kind = match rng.random_range(0..if clients { 16 } else { 9 }) {
        0 | 1 => Kind::KillWorker(w),
        2 | 3 => Kind::PauseWorker(w),
        4 => Kind::DrainWorker(w),
        5 => Kind::Away(Server::Rows),
        6 => Kind::Flaky(Server::Rows),
        7 => Kind::Away(Server::Store),
        8 => Kind::Flaky(Server::Store),
        9 => Kind::KillGateway(g),
        10 => Kind::PauseGateway(g),
        11 => Kind::RestartQueue,
        12 => Kind::Away(Server::Queue),
        13 => Kind::Flaky(Server::Queue),
        _ => Kind::Noise,
    };
    if kind == Kind::RestartQueue {
        length = rng.random_range(0..500);
    }
    Fault { at, until: at + length, kind }
}

/// Adapters and jobs are moved between workers of one base.
fn word(rng: &mut StdRng, workers: usize, bases: usize, jobs: usize) -> Fault {
    let at = rng.random_range(0..FAULTS_END - 500);
    let (adapter, from) = (rng.random_range(0..ADAPTERS), rng.random_range(0..workers));
    let others: Vec<usize> =
        (0..workers).filter(|to| *to != from && to % bases == from % bases).collect();
    let word = match rng.random_range(0..3) {
        0 if !others.is_empty() => {
            Word::MoveAdapter { adapter, from, to: others[rng.random_range(0..others.len())] }
        }
        1 if jobs > 0 => Word::MoveJob { job: rng.random_range(0..jobs), from },
        _ => Word::EvictAdapter { adapter, from },
    };
    Fault { at, until: at + rng.random_range(1..500), kind: Kind::Word(word) }
}
