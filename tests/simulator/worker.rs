//! A worker of the simulated world: the product's routes and mail, a toy engine, and the glue
//! around them as intake and outlet have it, over virtual time.

use std::collections::{BTreeMap, VecDeque};

use storage::queue::Delivered;
use storage::queue::message::{
    PROTOCOL_VERSION, Refusal, RefusalKind, Request, Target, ToWorker, TokenMessage, Update,
    WorkerPresence,
};
use worker::intake::mail::Mail;
use worker::intake::routes::{Added, Route, Routes};

use crate::adapters::Weights;
use crate::clients::base;
use crate::engine::Engine;
use crate::jobs::Run;
use crate::queue::EXPIRY;
use crate::world::{Answer, Broken, Op, Party, Process, Tag, Wake, World, note};

const BEAT: u64 = EXPIRY / 4;
const ECHO: u64 = 200;
const STEP: u64 = 15;
const CALL: u64 = 400;
/// A token message is tried for longer than presence lasts.
const PUBLISH: u64 = EXPIRY + 200;
/// Steps whose outputs may wait for the outlet.
const BEHIND: usize = 4;
/// A job's weights change so often.
const VERSION: u64 = 700;

pub struct Worker {
    pub process: Process,
    pub id: String,
    pub incarnation: String,
    /// Of its inbox.
    pub token: u64,
    /// One question to the inbox at a time, and whether to ask again.
    asked: bool,
    rung: bool,
    pub routes: Routes,
    mail: Mail,
    pub engine: Engine,
    pub weights: Weights,
    /// Name of the base that it runs.
    base: String,
    stepping: bool,
    /// Outputs of steps that the outlet has not taken, and its messages under way.
    outputs: VecDeque<Vec<(u64, Update)>>,
    messages: VecDeque<(String, TokenMessage)>,
    sending: bool,
    pub draining: bool,
    pub runs: BTreeMap<String, Run>,
    pub looking: bool,
}

impl Worker {
    pub fn new(index: usize, bases: usize) -> Self {
        Self {
            base: base(index % bases),
            weights: Weights::default(),
            process: Process::default(),
            id: format!("w{index}"),
            incarnation: String::new(),
            token: 0,
            asked: false,
            rung: false,
            routes: Routes::default(),
            mail: Mail::new(String::new()),
            engine: Engine::default(),
            stepping: false,
            outputs: VecDeque::new(),
            messages: VecDeque::new(),
            sending: false,
            draining: false,
            runs: BTreeMap::new(),
            looking: false,
        }
    }

    /// Whether it runs the base that jobs are of.
    pub fn is_of_first_base(&self) -> bool {
        self.base == base(0)
    }

    fn presence(&self) -> Box<WorkerPresence> {
        Box::new(WorkerPresence {
            worker_id: self.id.clone(),
            incarnation: self.incarnation.clone(),
            protocol: vec![PROTOCOL_VERSION],
            base: self.base.clone(),
            base_fingerprint: "print".to_owned(),
            device: String::new(),
            adapters: self.weights.told(),
            requests: self.routes.len() as u32,
            free_blocks: 8,
            total_blocks: 8,
            training_jobs: 0,
            training_room: 0,
            draining: self.draining,
        })
    }
}

impl World {
    pub fn start_worker(&mut self, index: usize) {
        let token = self.queue.new_token();
        let bases = self.plan.bases;
        let worker = &mut self.workers[index];
        if worker.process.alive {
            return;
        }
        let mut process = std::mem::take(&mut worker.process);
        process.start();
        let incarnation = format!("w{index}.{}", process.life);
        let mail = Mail::new(incarnation.clone());
        *worker = Worker { process, incarnation, token, mail, ..Worker::new(index, bases) };
        let told = worker.presence();
        self.call(Party::Worker(index), 10 * CALL, Op::OpenInbox(told, token), Tag::Open);
    }

    pub fn end_worker(&mut self, index: usize) {
        let mut process = std::mem::take(&mut self.workers[index].process);
        process.end();
        self.workers[index] = Worker { process, ..Worker::new(index, self.plan.bases) };
    }

    /// Takes nothing new, and lets go of all it has.
    pub fn drain_worker(&mut self, index: usize) {
        let worker = &mut self.workers[index];
        worker.draining = true;
        let moved = worker.engine.hand_over(None);
        self.put_out(index, moved);
        self.save_runs(index);
    }

    pub fn wake_worker(&mut self, index: usize, wake: Wake) {
        let party = Party::Worker(index);
        let worker = &mut self.workers[index];
        match wake {
            Wake::Answer(Tag::Open, Answer::Failed) => {
                let (told, token) = (worker.presence(), worker.token);
                self.call(party, 10 * CALL, Op::OpenInbox(told, token), Tag::Open);
            }
            Wake::Answer(Tag::Open, _) => {
                for wake in [Wake::Beat, Wake::Echo, Wake::Read, Wake::Look] {
                    self.wake(party, 0, wake);
                }
            }
            Wake::Beat => {
                let op = Op::KeepWorker(worker.presence(), worker.token);
                self.call(party, BEAT, op, Tag::Keep);
            }
            Wake::Answer(Tag::Keep, _) => {
                let mark = worker.routes.mark();
                self.take_next(index);
                self.call(party, BEAT, Op::Gateways, Tag::Gateways { mark });
                self.wake(party, BEAT, Wake::Beat);
            }
            Wake::Answer(Tag::Gateways { mark }, answer) => {
                if let Answer::Gateways(alive) = answer {
                    for gateway in self.workers[index].routes.gateways() {
                        if !alive.contains(&gateway) {
                            self.drop_gateway(index, &gateway, mark);
                        }
                    }
                }
            }
            Wake::Echo => {
                if self.broken != Broken::Echoes && !worker.sending {
                    let echoes = self.workers[index].mail.echo();
                    self.workers[index].messages.extend(echoes);
                    self.send(index);
                }
                self.wake(party, ECHO, Wake::Echo);
            }
            Wake::Read => self.take_next(index),
            Wake::Answer(Tag::Take, answer) => self.taken(index, answer),
            Wake::Step => self.step_engine(index),
            Wake::Answer(Tag::Cold(adapter), answer) => {
                self.adapter_read(index, &adapter, &answer, true);
            }
            Wake::Answer(Tag::Preload(adapter), answer) => {
                self.adapter_read(index, &adapter, &answer, false);
            }
            Wake::Answer(Tag::Publish { gateway, mark }, answer) => {
                self.published(index, &gateway, mark, &answer);
            }
            wake => self.wake_jobs(index, wake),
        }
    }

    fn take_next(&mut self, index: usize) {
        let worker = &mut self.workers[index];
        if std::mem::replace(&mut worker.asked, true) {
            worker.rung = true;
            return;
        }
        let op = Op::Take(worker.token);
        self.call(Party::Worker(index), 10 * CALL, op, Tag::Take);
    }

    fn taken(&mut self, index: usize, answer: Answer) {
        let worker = &mut self.workers[index];
        worker.asked = false;
        let rung = std::mem::take(&mut worker.rung);
        match answer {
            Answer::Taken(None) if !rung => return,
            Answer::Taken(Some(message)) => self.take_in(index, message),
            _ => {}
        }
        self.take_next(index);
    }

    fn drop_gateway(&mut self, index: usize, gateway: &str, mark: u64) {
        note!(self, "w{index} drops the requests of {gateway}");
        let mark = if self.broken == Broken::Marks { u64::MAX } else { mark };
        let worker = &mut self.workers[index];
        for key in worker.routes.drop_gateway(gateway, mark) {
            worker.engine.cancel(key);
        }
    }

    fn take_in(&mut self, index: usize, message: ToWorker) {
        match message {
            ToWorker::Place(request) => self.take_request(index, *request),
            ToWorker::Cancel { request_id, attempt } => {
                note!(self, "w{index} cancels {request_id} to #{attempt}");
                let worker = &mut self.workers[index];
                if let Some(key) = worker.routes.cancel(&request_id, attempt) {
                    worker.engine.cancel(key);
                }
            }
            ToWorker::JobNudge { job_id } => self.nudged(index, &job_id),
            ToWorker::Load { adapter_id, object } => {
                self.preload_adapter(index, &adapter_id, &object);
            }
            ToWorker::Evict { adapter_id, hand_over } => {
                self.evict_adapter(index, &adapter_id, hand_over);
            }
            ToWorker::MoveJob { job_id, .. } => self.leave_job(index, &job_id),
            // As the signal does, which is one of the faults.
            ToWorker::Drain => {}
        }
    }

    fn take_request(&mut self, index: usize, request: Request) {
        let live = self.now / VERSION;
        let broken = self.broken;
        let worker = &mut self.workers[index];
        if worker.base != request.base {
            let (id, base) = (request.request_id, &worker.base);
            let wrong = format!("{id} of {} comes to w{index} of {base}", request.base);
            return self.violate(wrong);
        }
        if broken == Broken::LatePlacements
            && let Some(key) = worker.routes.cancel(&request.request_id, u32::MAX)
        {
            worker.engine.cancel(key);
        }
        let ended = request.replay.iter().filter(|replay| replay.finish.is_some()).count();
        let route = Route {
            request_id: request.request_id.clone(),
            attempt: request.attempt,
            gateway: request.gateway.clone(),
            open: request.choices as usize - ended,
        };
        let added = worker.routes.add(route);
        note!(self, "w{index} takes {} #{}: {added:?}", request.request_id, request.attempt);
        let Added::New { key, replaced } = added else { return };
        let worker = &mut self.workers[index];
        if let Some(old) = replaced {
            worker.engine.cancel(old);
        }
        if worker.draining {
            let refusal = Refusal {
                kind: RefusalKind::Overloaded,
                message: "draining".to_owned(),
                param: None,
            };
            return self.put_out(index, vec![(key, Update::Failed(refusal))]);
        }
        let (version, cold) = match &request.target {
            Target::Base => (Some(0), None),
            Target::Job { .. } => (Some(live), None),
            Target::Adapter { adapter_id, object, .. } => {
                (worker.weights.version(adapter_id), Some((adapter_id.clone(), object.clone())))
            }
        };
        worker.engine.admit(key, request, version);
        if !worker.stepping {
            worker.stepping = true;
            self.wake(Party::Worker(index), STEP, Wake::Step);
        }
        if let (None, Some((adapter_id, object))) = (version, cold) {
            self.load_adapter(index, &adapter_id, &object);
        }
    }

    fn step_engine(&mut self, index: usize) {
        let worker = &mut self.workers[index];
        if worker.engine.is_idle() {
            worker.stepping = false;
            return;
        }
        if worker.outputs.len() < BEHIND {
            let outputs = worker.engine.step(&worker.incarnation);
            self.put_out(index, outputs);
        }
        self.wake(Party::Worker(index), STEP, Wake::Step);
    }

    /// The outputs of one step go to the outlet.
    pub fn put_out(&mut self, index: usize, outputs: Vec<(u64, Update)>) {
        if !outputs.is_empty() {
            self.workers[index].outputs.push_back(outputs);
            self.send(index);
        }
    }

    /// The outlet sends one message after the other.
    fn send(&mut self, index: usize) {
        let worker = &mut self.workers[index];
        if worker.sending {
            return;
        }
        while worker.messages.is_empty() {
            let Some(outputs) = worker.outputs.pop_front() else { return };
            let routes = &mut worker.routes;
            let items = outputs.into_iter().filter_map(|(key, update)| routes.address(key, update));
            let items: Vec<_> = items.collect();
            worker.messages.extend(worker.mail.post(items));
        }
        let Some((gateway, message)) = worker.messages.pop_front() else { return };
        worker.sending = true;
        let mark = worker.routes.mark();
        let op = Op::Publish(gateway.clone(), message);
        self.call(Party::Worker(index), PUBLISH, op, Tag::Publish { gateway, mark });
    }

    fn published(&mut self, index: usize, gateway: &str, mark: u64, answer: &Answer) {
        let worker = &mut self.workers[index];
        worker.sending = false;
        match answer {
            Answer::Published(Delivered::Delivered) => {}
            Answer::Published(Delivered::GatewayGone) => {
                worker.mail.gone(gateway);
                self.drop_gateway(index, gateway, mark);
            }
            _ => worker.mail.missed(gateway),
        }
        self.send(index);
    }
}
