//! One request in a gateway of the simulated world: the product's flight and placement, and the
//! glue around them as `inference.rs` has it, over virtual time.

use std::collections::VecDeque;

use gateway::flight::{Effect, Flight, Loss};
use gateway::placement::{Wish, candidates};
use gateway::switchboard::Signal;
use storage::queue::Placed;
use storage::queue::message::{ToWorker, WorkerPresence};

use crate::clients::Outcome;
use crate::world::{Answer, Broken, Op, Party, Tag, Wake, World, note};

/// One call with all its tries.
pub const CALL: u64 = 400;
const ADMISSION: u64 = 2500;
const REPLACEMENT: u64 = 3000;
const REST: u64 = 60;
const CANCEL_PATIENCE: u64 = 250;
/// How old presence may be for a first placement.
const LATELY: u64 = 300;
/// Cancels every placement.
const ALL: u32 = u32::MAX;

/// One request of this gateway, as `Running` has it.
pub struct Drive {
    pub flight: Flight,
    /// Where it is placed, and that worker's incarnation.
    pub worker: Option<String>,
    pub incarnation: String,
    phase: Phase,
    /// Counts phases; answers to earlier ones are lost.
    turn: u32,
    pub signals: VecDeque<Signal>,
    admitted: bool,
    /// Chosen by presence as it was seen lately; and somebody in it has gone.
    lately: bool,
    gone: bool,
    /// No longer than this until it is admitted, or placed again.
    until: u64,
}

enum Phase {
    Looking,
    Cancelling(VecDeque<WorkerPresence>),
    Placing(VecDeque<WorkerPresence>),
    Resting,
    Running,
}

impl World {
    /// Opens a request and places it.
    pub fn open_request(&mut self, index: usize, client: usize) {
        let mut request = self.clients[client].request.clone();
        let gateway = &mut self.gateways[index];
        request.gateway.clone_from(&gateway.id);
        gateway.board.open(&request.request_id);
        let drive = Drive {
            flight: Flight::new(request),
            worker: None,
            incarnation: String::new(),
            phase: Phase::Looking,
            turn: 0,
            signals: VecDeque::new(),
            admitted: false,
            lately: false,
            gone: false,
            until: self.now + ADMISSION,
        };
        gateway.drives.insert(client, drive);
        self.place(index, client);
        self.wake(Party::Gateway(index), ADMISSION + 1, Wake::Turn(client, ALL));
    }

    /// Closes a request, cancelling it where it runs.
    pub fn close_request(&mut self, index: usize, client: usize) {
        let gateway = &mut self.gateways[index];
        let Some(drive) = gateway.drives.remove(&client) else { return };
        let request_id = drive.flight.request().request_id.clone();
        gateway.board.close(&request_id);
        if let Some(worker) = drive.worker {
            let op = Op::Control(worker, ToWorker::Cancel { request_id, attempt: ALL });
            self.call(Party::Gateway(index), CALL, op, Tag::Nobody);
        }
    }

    fn drive(&mut self, index: usize, client: usize) -> Option<&mut Drive> {
        self.gateways[index].drives.get_mut(&client)
    }

    /// A new phase; `Tag` of the call that ends it.
    fn enter(&mut self, index: usize, client: usize, phase: Phase) -> Tag {
        let Some(drive) = self.drive(index, client) else { return Tag::Nobody };
        drive.phase = phase;
        drive.turn += 1;
        Tag::Client(client, drive.turn)
    }

    fn place(&mut self, index: usize, client: usize) {
        let now = self.now;
        let gateway = &mut self.gateways[index];
        let Some(drive) = gateway.drives.get_mut(&client) else { return };
        let picture = gateway.picture.as_ref().filter(|(seen, _)| now < seen + LATELY);
        match picture {
            Some((_, workers)) if drive.flight.request().attempt == 0 => {
                drive.lately = true;
                let workers = workers.clone();
                self.choose(index, client, &workers);
            }
            _ => self.look(index, client),
        }
    }

    fn look(&mut self, index: usize, client: usize) {
        if let Some(drive) = self.drive(index, client) {
            drive.lately = false;
        }
        let tag = self.enter(index, client, Phase::Looking);
        self.call(Party::Gateway(index), CALL, Op::Workers, tag);
    }

    pub fn go_on_placing(&mut self, index: usize, client: usize, turn: u32, answer: Answer) {
        let Some(drive) = self.drive(index, client) else { return };
        if drive.turn != turn {
            return;
        }
        match (&mut drive.phase, answer) {
            (Phase::Looking, Answer::Workers(workers)) => self.choose(index, client, &workers),
            (Phase::Cancelling(order), _) => {
                let order = std::mem::take(order);
                self.try_next(index, client, order);
            }
            (Phase::Placing(order), Answer::Placed(placed)) => {
                let order = std::mem::take(order);
                if placed == Placed::Accepted {
                    self.placed(index, client);
                } else {
                    drive.worker = None;
                    drive.gone |= placed == Placed::Gone;
                    self.try_next(index, client, order);
                }
            }
            (Phase::Running | Phase::Resting, _) => {}
            _ => self.cannot_place(index, client, "the queue cannot be reached"),
        }
    }

    fn choose(&mut self, index: usize, client: usize, workers: &[WorkerPresence]) {
        let Some(drive) = self.gateways[index].drives.get_mut(&client) else { return };
        let before = drive.worker.take();
        let request = drive.flight.request();
        let wish = Wish {
            base: &request.base,
            base_fingerprint: None,
            target: &request.target,
            owner: None,
            avoid: before.as_deref(),
        };
        let order: VecDeque<_> =
            candidates(workers, &wish, &mut self.rng).into_iter().cloned().collect();
        if order.is_empty() && drive.lately {
            return self.look(index, client);
        }
        if order.is_empty() {
            return self.cannot_place(index, client, "no worker");
        }
        let Some(before) = before else { return self.try_next(index, client, order) };
        let request_id = request.request_id.clone();
        let mut attempt = request.attempt.saturating_sub(1);
        if self.broken == Broken::LateCancels {
            attempt = ALL;
        }
        let tag = self.enter(index, client, Phase::Cancelling(order));
        if let Tag::Client(_, turn) = tag {
            self.wake(Party::Gateway(index), CANCEL_PATIENCE, Wake::Turn(client, turn));
        }
        let op = Op::Control(before, ToWorker::Cancel { request_id, attempt });
        self.call(Party::Gateway(index), CALL, op, tag);
    }

    fn try_next(&mut self, index: usize, client: usize, mut order: VecDeque<WorkerPresence>) {
        let one_number = self.broken == Broken::OneNumber;
        let Some(worker) = order.pop_front() else {
            return match self.drive(index, client) {
                Some(drive) if drive.lately && drive.gone => {
                    drive.flight.next_attempt();
                    self.look(index, client);
                }
                _ => self.cannot_place(index, client, "all workers are busy"),
            };
        };
        let gateway = &mut self.gateways[index];
        let Some(drive) = gateway.drives.get_mut(&client) else { return };
        if matches!(drive.phase, Phase::Placing(_)) && !one_number {
            drive.flight.next_attempt();
        }
        let tag = self.enter(index, client, Phase::Placing(order));
        let gateway = &mut self.gateways[index];
        let Some(drive) = gateway.drives.get_mut(&client) else { return };
        let request = drive.flight.request().clone();
        let (id, attempt) = (&request.request_id, request.attempt);
        gateway.board.expect(id, attempt, &worker.worker_id, &worker.incarnation);
        drive.worker = Some(worker.worker_id.clone());
        drive.incarnation = worker.incarnation;
        note!(self, "{} #{attempt} to {}", request.request_id, worker.worker_id);
        let op = Op::Place(worker.worker_id, Box::new(request));
        self.call(Party::Gateway(index), CALL, op, tag);
    }

    fn placed(&mut self, index: usize, client: usize) {
        self.enter(index, client, Phase::Running);
        let Some(drive) = self.drive(index, client) else { return };
        let turn = drive.turn;
        if drive.admitted {
            self.wake(Party::Gateway(index), ADMISSION, Wake::Turn(client, turn));
        }
        self.hear(index, client);
    }

    fn cannot_place(&mut self, index: usize, client: usize, why: &str) {
        let now = self.now;
        let Some(drive) = self.drive(index, client) else { return };
        if !drive.admitted || now >= drive.until {
            return self.fail(index, client, why);
        }
        self.rest(index, client, REST);
    }

    /// Is placed again after a pause.
    fn rest(&mut self, index: usize, client: usize, pause: u64) {
        let tag = self.enter(index, client, Phase::Resting);
        if let Tag::Client(_, turn) = tag {
            self.wake(Party::Gateway(index), pause, Wake::Turn(client, turn));
        }
    }

    /// A turn has ended by time.
    pub fn turn_is_over(&mut self, index: usize, client: usize, turn: u32) {
        let patient = self.broken == Broken::Patience;
        let one_number = self.broken == Broken::OneNumber;
        let Some(drive) = self.drive(index, client) else { return };
        if turn == ALL {
            if !drive.admitted {
                self.fail(index, client, "not admitted in time");
            }
            return;
        }
        if drive.turn != turn {
            return;
        }
        match &mut drive.phase {
            Phase::Cancelling(order) => {
                let order = std::mem::take(order);
                self.try_next(index, client, order);
            }
            Phase::Resting => {
                if !one_number {
                    drive.flight.next_attempt();
                }
                self.place(index, client);
            }
            Phase::Running if drive.flight.is_waiting() && !patient => {
                let effect = drive.flight.lose(Loss::Worker);
                self.obey(index, client, effect);
            }
            _ => {}
        }
    }

    /// Takes the signals that lie ready, as long as the request is not being placed.
    pub fn hear(&mut self, index: usize, client: usize) {
        loop {
            let Some(drive) = self.drive(index, client) else { return };
            if !matches!(drive.phase, Phase::Running) {
                return;
            }
            let effect = match drive.signals.pop_front() {
                None => return,
                Some(Signal::Update { attempt, update }) => drive.flight.receive(attempt, update),
                Some(Signal::Lost { attempt, loss })
                    if attempt == drive.flight.request().attempt =>
                {
                    drive.flight.lose(loss)
                }
                Some(Signal::Lost { .. }) => Effect::Ignore,
            };
            self.obey(index, client, effect);
        }
    }

    fn obey(&mut self, index: usize, client: usize, effect: Effect) {
        let until = self.now + REPLACEMENT;
        let Some(drive) = self.drive(index, client) else { return };
        match effect {
            Effect::Ignore => {}
            Effect::Admitted => drive.admitted = true,
            Effect::PlaceAgain => {
                self.clients[client].moved = true;
                let Some(drive) = self.drive(index, client) else { return };
                if drive.admitted {
                    drive.until = until;
                }
                let rests = u64::from(drive.flight.rests());
                if rests > 0 {
                    return self.rest(index, client, REST * rests);
                }
                drive.flight.next_attempt();
                self.place(index, client);
            }
            Effect::Fail(refusal) => self.fail(index, client, &refusal.message),
            Effect::Deliver(delta) => {
                let attempt = drive.flight.request().attempt;
                let place = (drive.incarnation.clone(), attempt);
                let done = drive.flight.is_done();
                if done {
                    drive.worker = None;
                    self.close_request(index, client);
                }
                self.deliver(client, &delta, &place);
                if done {
                    self.conclude(client, Outcome::Complete);
                }
            }
        }
    }

    fn fail(&mut self, index: usize, client: usize, why: &str) {
        self.close_request(index, client);
        self.conclude(client, Outcome::Failed(why.to_owned()));
    }
}
