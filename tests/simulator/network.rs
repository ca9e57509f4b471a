//! The network of the simulated world: calls of processes to servers, with latency and tries, and
//! what the servers make of them. Calls and answers can be lost, and so can messages by themselves.

use rand::RngExt;
use storage::db::{Claim, JobWrite, ResumePointRow};
use storage::objects::ObjectKey;
use storage::queue::message::{Request, ToWorker, TokenMessage, WorkerPresence};
use storage::queue::{Delivered, Placed, Received};

use crate::plan::{Health, Server};
use crate::world::{Event, Party, Wake, World, note};

/// Before a lost call is tried again.
const RETRY: u64 = 40;

/// What a process asks a server.
#[derive(Clone)]
pub enum Op {
    OpenInbox(Box<WorkerPresence>, u64),
    KeepWorker(Box<WorkerPresence>, u64),
    Take(u64),
    Place(String, Box<Request>),
    Control(String, ToWorker),
    Workers,
    Gateways,
    Publish(String, TokenMessage),
    KeepGateway(String, u64, u64),
    Read(u64),
    ClaimValidation(String),
    ClaimTraining(String),
    Renew(Box<Claim>),
    Release(Box<Claim>),
    Write(Box<Claim>, Box<JobWrite>),
    Points(String),
    Put(ObjectKey, String),
    Get(ObjectKey),
    Delete(ObjectKey),
}

/// What it answers; `Failed` where no answer came in time.
#[derive(Debug)]
pub enum Answer {
    Failed,
    Done,
    Kept(bool),
    Taken(Option<ToWorker>),
    Placed(Placed),
    Workers(Vec<WorkerPresence>),
    Gateways(Vec<String>),
    Published(Delivered),
    Read(Vec<Received>),
    Claimed(Option<Box<Claim>>),
    Renewed(storage::db::Renewed),
    Written(storage::db::Written),
    Points(Vec<ResumePointRow>),
    Object(Option<String>),
}

/// What an answer is about, for the process that asked.
#[derive(Clone, Debug)]
pub enum Tag {
    /// Nobody waits for it.
    Nobody,
    Keep,
    Watch,
    Read,
    /// A step of placing the request of this client, at this turn.
    Client(usize, u32),
    Take,
    Publish {
        gateway: String,
        mark: u64,
    },
    Gateways {
        mark: u64,
    },
    Open,
    Look,
    /// Weights that requests wait for, by the adapter's id.
    Cold(String),
    /// Weights of requests to come.
    Preload(String),
    /// A step of the run of this job, at this turn.
    Job(String, u32),
    /// A renewal of this attempt at a job, asked for at this time.
    Renewal(String, i64, u64),
}

#[derive(Clone)]
pub struct Call {
    from: Party,
    life: u32,
    until: u64,
    op: Op,
    tag: Tag,
}

impl World {
    pub fn latency(&mut self) -> u64 {
        match self.rng.random_range(0..16) {
            0 => self.rng.random_range(5..120),
            _ => self.rng.random_range(1..4),
        }
    }

    /// A call of a process to a server, tried again until `limit` is over.
    pub fn call(&mut self, from: Party, limit: u64, op: Op, tag: Tag) {
        let life = self.process(from).life;
        let call = Call { from, life, until: self.now + limit, op, tag };
        let after = self.latency();
        self.at(self.now + after, Event::Call(Box::new(call)));
    }

    pub fn try_again(&mut self, call: Call) {
        if self.now < call.until {
            self.execute(call);
            return;
        }
        let (party, tag) = (call.from, call.tag);
        match party {
            Party::Gateway(index) => self.wake_gateway(index, Wake::Answer(tag, Answer::Failed)),
            Party::Worker(index) => self.wake_worker(index, Wake::Answer(tag, Answer::Failed)),
        }
    }

    pub fn execute(&mut self, call: Call) {
        let lost = match self.plan.health(call.op.server(), self.now) {
            Health::Away => true,
            Health::Fine => false,
            Health::Flaky => match self.rng.random_range(0..4) {
                0 => true,
                1 => {
                    // It happens, and the answer is lost.
                    self.perform(&call.op);
                    true
                }
                _ => false,
            },
        };
        let answer = if lost { None } else { self.perform(&call.op) };
        let (party, life) = (call.from, call.life);
        let (after, wake) = match answer {
            None => (RETRY, Wake::Again(Box::new(call))),
            Some(answer) => (self.latency(), Wake::Answer(call.tag, answer)),
        };
        self.at(self.now + after, Event::To(party, life, wake));
    }

    /// Does what is asked; None where there is no room for it yet.
    fn perform(&mut self, op: &Op) -> Option<Answer> {
        let now = self.now;
        Some(match op {
            Op::OpenInbox(told, token) => {
                Answer::Kept(self.queue.keep_worker((**told).clone(), *token, true, now))
            }
            Op::KeepWorker(told, token) => {
                Answer::Kept(self.queue.keep_worker((**told).clone(), *token, false, now))
            }
            Op::Take(token) => Answer::Taken(self.queue.take(*token)),
            Op::Place(worker, request) => Answer::Placed(self.place_in_noise(worker, request)),
            Op::Control(worker, message) => {
                if !(self.plan.is_noisy(now) && self.rng.random_range(0..4) == 0) {
                    self.queue.control(worker, message)?;
                }
                Answer::Done
            }
            Op::Workers => Answer::Workers(self.queue.workers()),
            Op::Gateways => Answer::Gateways(self.queue.gateways()),
            Op::Publish(gateway, message) => {
                Answer::Published(self.publish_in_noise(gateway, message))
            }
            Op::KeepGateway(id, token, next) => {
                Answer::Kept(self.queue.keep_gateway(id, *token, *next, now))
            }
            Op::Read(token) => Answer::Read(self.queue.read(*token)),
            op => self.perform_job(op),
        })
    }

    /// A placement may be lost, or come once more much later.
    fn place_in_noise(&mut self, worker: &str, request: &Request) -> Placed {
        if !self.plan.is_noisy(self.now) {
            return self.queue.place(worker, request.clone());
        }
        match self.rng.random_range(0..6) {
            0 => Placed::Accepted,
            1 => {
                let late = self.now + self.rng.random_range(1..800);
                self.at(late, Event::Repeat(worker.to_owned(), Box::new(request.clone())));
                self.queue.place(worker, request.clone())
            }
            _ => self.queue.place(worker, request.clone()),
        }
    }

    /// A token message may be lost, come twice, or before the one sent before it.
    fn publish_in_noise(&mut self, gateway: &str, message: &TokenMessage) -> Delivered {
        if !self.plan.is_noisy(self.now) {
            return self.queue.publish(gateway, message.clone());
        }
        match self.rng.random_range(0..10) {
            0 => match self.queue.stream(gateway) {
                Some(_) => {
                    note!(self, "to {gateway} {} is lost", message.sequence);
                    Delivered::Delivered
                }
                None => Delivered::GatewayGone,
            },
            1 => {
                self.queue.publish(gateway, message.clone());
                self.queue.publish(gateway, message.clone())
            }
            2 => {
                let delivered = self.queue.publish(gateway, message.clone());
                if let Some(stream) = self.queue.stream(gateway)
                    && let [.., before, last] = stream.make_contiguous()
                {
                    std::mem::swap(before, last);
                }
                delivered
            }
            _ => self.queue.publish(gateway, message.clone()),
        }
    }
}

impl Op {
    fn server(&self) -> Server {
        match self {
            Self::ClaimValidation(_)
            | Self::ClaimTraining(_)
            | Self::Renew(_)
            | Self::Release(_)
            | Self::Write(..)
            | Self::Points(_) => Server::Rows,
            Self::Put(..) | Self::Get(_) | Self::Delete(_) => Server::Store,
            _ => Server::Queue,
        }
    }
}
