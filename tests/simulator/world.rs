//! Virtual time, the processes in it, and what goes wrong with them. Events happen in the order of
//! their time, ties by the seed; one seed is one run.

use std::collections::{BTreeMap, HashMap, VecDeque};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use storage::objects::ObjectKey;
use storage::queue::message::Request;

use crate::clients::Client;
use crate::gateway::Gateway;
use crate::jobs::Job;
pub use crate::network::{Answer, Call, Op, Tag};
use crate::plan::{Health, Kind, Plan, Server};
use crate::queue::Queue;
use crate::rows::Rows;
use crate::worker::Worker;

/// A rule that the glue of this run breaks, to show that its loss is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    Nothing,
    /// Gateways hear messages of any attempt.
    Attempts,
    /// Gateways do not see holes in the sequence.
    Gaps,
    /// Workers end before a silence without empty messages.
    Echoes,
    /// Workers drop requests that a gateway placed after it came back.
    Marks,
    /// Workers run a placement that comes late in place of a later one.
    LatePlacements,
    /// Cancels mean every attempt.
    LateCancels,
    /// A placement that is tried again keeps its number.
    OneNumber,
    /// Gateways wait for ever for a placement to be admitted.
    Patience,
    /// Gateways do not cancel what runs on though it no longer counts.
    Strays,
    /// Workers say nothing to requests whose adapter cannot be read.
    ColdWaits,
    /// Workers say nothing of requests for an adapter that they hand over.
    HandOvers,
    /// Rows take writes of whoever held the job once.
    Fencing,
    /// Owners write the row before the object.
    RowsFirst,
    /// Owners begin at the first step whatever was saved, and write events under new names.
    Events,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Party {
    Gateway(usize),
    Worker(usize),
}

/// What reaches a process.
pub enum Wake {
    Answer(Tag, Answer),
    /// A call to make again.
    Again(Box<Call>),
    Beat,
    /// What is read has something new.
    Read,
    Watch,
    Echo,
    Step,
    /// The client's turn ends without an answer.
    Turn(usize, u32),
    Look,
    /// Of a job's run, by the attempt of its claim.
    Train(String, i64),
    Renew(String, i64),
}

pub enum Event {
    To(Party, u32, Wake),
    Call(Box<Call>),
    Begin(usize),
    End(usize),
    Arrive(usize),
    Leave(usize),
    Steer(usize, usize),
    Repeat(String, Box<Request>),
}

/// A process between its starts and ends.
#[derive(Default)]
pub struct Process {
    /// Counts starts; what was meant for an earlier one is lost.
    pub life: u32,
    pub alive: bool,
    paused: bool,
    deferred: VecDeque<Wake>,
}

/// One run.
pub struct World {
    pub now: u64,
    pub rng: StdRng,
    pub plan: Plan,
    pub broken: Broken,
    pub queue: Queue,
    pub rows: Rows,
    pub objects: HashMap<ObjectKey, String>,
    pub gateways: Vec<Gateway>,
    pub workers: Vec<Worker>,
    pub clients: Vec<Client>,
    pub jobs: Vec<Job>,
    /// What happened, where somebody will read it.
    pub trace: Option<Vec<String>>,
    pub violation: Option<String>,
    events: BTreeMap<(u64, u32, u64), Event>,
    count: u64,
}

/// A line of the trace; costs nothing where none is kept.
macro_rules! note {
    ($world:expr, $($text:tt)*) => {
        if $world.trace.is_some() {
            let line = format!($($text)*);
            $world.note_line(line);
        }
    };
}
pub(crate) use note;

impl World {
    pub fn new(seed: u64, plan: Plan, broken: Broken, traced: bool) -> Self {
        let queue = Queue::new(plan.inbox);
        let mut world = Self {
            now: 0,
            rng: StdRng::seed_from_u64(seed),
            gateways: (0..plan.gateways).map(|_| Gateway::default()).collect(),
            workers: (0..plan.workers).map(|index| Worker::new(index, plan.bases)).collect(),
            clients: Vec::new(),
            jobs: Vec::new(),
            plan,
            broken,
            queue,
            rows: Rows::default(),
            objects: HashMap::new(),
            trace: traced.then(Vec::new),
            violation: None,
            events: BTreeMap::new(),
            count: 0,
        };
        for index in 0..world.plan.faults.len() {
            let fault = world.plan.faults[index];
            world.at(fault.at, Event::Begin(index));
            world.at(fault.until, Event::End(index));
        }
        (0..world.gateways.len()).for_each(|gateway| world.start_gateway(gateway));
        (0..world.workers.len()).for_each(|worker| world.start_worker(worker));
        world.store_adapters();
        world.make_clients();
        world.make_jobs();
        world
    }

    pub fn note_line(&mut self, line: String) {
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{now:>6} {line}"));
        }
    }

    /// What must never happen has happened.
    pub fn violate(&mut self, what: String) {
        note!(self, "VIOLATION {what}");
        self.violation.get_or_insert(what);
    }

    pub fn at(&mut self, time: u64, event: Event) {
        self.count += 1;
        let tie = self.rng.random::<u32>();
        self.events.insert((time, tie, self.count), event);
    }

    /// Wakes a process later, unless it ends before.
    pub fn wake(&mut self, party: Party, after: u64, wake: Wake) {
        let life = self.process(party).life;
        self.at(self.now + after, Event::To(party, life, wake));
    }

    pub fn process(&mut self, party: Party) -> &mut Process {
        match party {
            Party::Gateway(index) => &mut self.gateways[index].process,
            Party::Worker(index) => &mut self.workers[index].process,
        }
    }

    /// Takes the next event; false where none is left.
    pub fn step(&mut self) -> bool {
        let Some(((time, ..), event)) = self.events.pop_first() else { return false };
        self.now = time;
        self.queue.expire(time);
        match event {
            Event::To(party, life, wake) => self.reach(party, life, wake),
            Event::Call(call) => self.execute(*call),
            Event::Begin(index) => self.begin(self.plan.faults[index].kind),
            Event::End(index) => self.end(self.plan.faults[index].kind),
            Event::Arrive(client) => self.arrive(client),
            Event::Leave(client) => self.leave(client),
            Event::Steer(job, wish) => self.steer(job, wish),
            Event::Repeat(worker, request) => {
                note!(self, "{} #{} comes again", request.request_id, request.attempt);
                self.queue.repeat(&worker, *request);
            }
        }
        for token in std::mem::take(&mut self.queue.rung) {
            self.ring(token);
        }
        true
    }

    /// Wakes whoever reads what this token names.
    fn ring(&mut self, token: u64) {
        let gateway = self.gateways.iter().position(|gateway| gateway.reading == token);
        let worker = self.workers.iter().position(|worker| worker.token == token);
        let party = gateway.map(Party::Gateway).or(worker.map(Party::Worker));
        if let Some(party) = party {
            let after = self.latency();
            self.wake(party, after, Wake::Read);
        }
    }

    fn reach(&mut self, party: Party, life: u32, wake: Wake) {
        let process = self.process(party);
        if !process.alive || process.life != life {
            return;
        }
        if process.paused {
            process.deferred.push_back(wake);
            return;
        }
        match (party, wake) {
            (_, Wake::Again(call)) => self.try_again(*call),
            (Party::Gateway(index), wake) => self.wake_gateway(index, wake),
            (Party::Worker(index), wake) => self.wake_worker(index, wake),
        }
    }

    fn begin(&mut self, kind: Kind) {
        note!(self, "FAULT {kind:?}");
        match kind {
            Kind::KillWorker(index) => self.end_worker(index),
            Kind::KillGateway(index) => self.end_gateway(index),
            Kind::PauseWorker(index) => self.process(Party::Worker(index)).paused = true,
            Kind::PauseGateway(index) => self.process(Party::Gateway(index)).paused = true,
            Kind::DrainWorker(index) => self.drain_worker(index),
            Kind::RestartQueue => self.queue.restart(),
            Kind::Word(word) => self.obey_word(word, true),
            Kind::Away(_) | Kind::Flaky(_) | Kind::Noise => {}
        }
    }

    fn end(&mut self, kind: Kind) {
        note!(self, "over {kind:?}");
        match kind {
            Kind::KillWorker(index) => {
                self.end_worker(index);
                self.start_worker(index);
            }
            Kind::DrainWorker(index) => {
                if self.plan.health(Server::Queue, self.now) == Health::Fine {
                    let worker = &self.workers[index];
                    self.queue.close_inbox(&worker.id, worker.token);
                }
                self.end_worker(index);
                self.start_worker(index);
            }
            Kind::KillGateway(index) => {
                self.end_gateway(index);
                self.start_gateway(index);
            }
            Kind::PauseWorker(index) => self.go_on(Party::Worker(index)),
            Kind::PauseGateway(index) => self.go_on(Party::Gateway(index)),
            Kind::Word(word) => self.obey_word(word, false),
            Kind::RestartQueue | Kind::Away(_) | Kind::Flaky(_) | Kind::Noise => {}
        }
    }

    fn go_on(&mut self, party: Party) {
        let (now, process) = (self.now, self.process(party));
        process.paused = false;
        let (life, deferred) = (process.life, std::mem::take(&mut process.deferred));
        for wake in deferred {
            // In order: one after the other, and before what comes now.
            self.count += 1;
            self.events.insert((now, 0, self.count), Event::To(party, life, wake));
        }
    }
}

impl Process {
    /// A new process.
    pub fn start(&mut self) {
        *self = Self { life: self.life + 1, alive: true, ..Self::default() };
    }

    pub fn end(&mut self) {
        *self = Self { life: self.life, ..Self::default() };
    }
}
