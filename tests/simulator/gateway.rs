//! A gateway of the simulated world: the product's switchboard, and the glue around it as
//! `relay.rs` and the queue's reader have it, over virtual time.

use std::collections::BTreeMap;

use gateway::strays::Stray;
use gateway::switchboard::{Signal, Switchboard};
use storage::queue::Received;
use storage::queue::message::{ToWorker, TokenMessage, WorkerPresence};

use crate::clients::Outcome;
use crate::drive::{CALL, Drive};
use crate::queue::EXPIRY;
use crate::world::{Answer, Broken, Op, Party, Process, Tag, Wake, World, note};

const BEAT: u64 = EXPIRY / 4;
const WATCH: u64 = 120;

#[derive(Default)]
pub struct Gateway {
    pub process: Process,
    pub id: String,
    pub board: Switchboard,
    /// The stream that counts, and the one to open should it be gone.
    tokens: (u64, u64),
    /// The stream that is read; one question at a time, and whether to ask again.
    pub reading: u64,
    asked: bool,
    rung: bool,
    /// Where sequences stand for a gateway that sees no holes: true and shown numbers.
    shown: BTreeMap<String, (u64, u64)>,
    pub drives: BTreeMap<usize, Drive>,
    /// Presence as it was read last, and when.
    pub picture: Option<(u64, Vec<WorkerPresence>)>,
}

impl World {
    pub fn start_gateway(&mut self, index: usize) {
        let tokens = (self.queue.new_token(), self.queue.new_token());
        let gateway = &mut self.gateways[index];
        if gateway.process.alive {
            return;
        }
        let mut process = std::mem::take(&mut gateway.process);
        process.start();
        let id = format!("g{index}.{}", process.life);
        *gateway = Gateway { process, id, tokens, ..Gateway::default() };
        // Its stream opens with its first sign of life; nobody knows it before.
        gateway.reading = tokens.1;
        for wake in [Wake::Beat, Wake::Watch] {
            self.wake(Party::Gateway(index), 0, wake);
        }
        self.read_on(index);
    }

    /// Its clients see their connections break.
    pub fn end_gateway(&mut self, index: usize) {
        let gateway = &mut self.gateways[index];
        gateway.process.end();
        gateway.board = Switchboard::default();
        for client in std::mem::take(&mut gateway.drives).into_keys() {
            self.conclude(client, Outcome::Broken);
        }
    }

    pub fn wake_gateway(&mut self, index: usize, wake: Wake) {
        let party = Party::Gateway(index);
        match wake {
            Wake::Beat => {
                let gateway = &self.gateways[index];
                let op = Op::KeepGateway(gateway.id.clone(), gateway.tokens.0, gateway.tokens.1);
                self.call(party, BEAT, op, Tag::Keep);
            }
            Wake::Read => self.read_on(index),
            Wake::Watch => self.call(party, CALL, Op::Workers, Tag::Watch),
            Wake::Turn(client, turn) => self.turn_is_over(index, client, turn),
            Wake::Answer(Tag::Keep, answer) => {
                let anew = matches!(answer, Answer::Kept(true));
                if anew {
                    let next = self.queue.new_token();
                    let tokens = &mut self.gateways[index].tokens;
                    *tokens = (tokens.1, next);
                }
                self.read_on(index);
                self.wake(party, BEAT, Wake::Beat);
            }
            Wake::Answer(Tag::Watch, answer) => {
                if let Answer::Workers(workers) = answer {
                    let gateway = &mut self.gateways[index];
                    gateway.shown.retain(|incarnation, _| {
                        workers.iter().any(|worker| worker.incarnation == *incarnation)
                    });
                    let heard = gateway.board.watch(&workers);
                    gateway.picture = Some((self.now, workers));
                    self.hand_out(index, heard);
                }
                self.wake(party, WATCH, Wake::Watch);
            }
            Wake::Answer(Tag::Read, answer) => self.receive(index, answer),
            Wake::Answer(Tag::Client(client, turn), answer) => {
                self.go_on_placing(index, client, turn, answer);
            }
            _ => {}
        }
    }

    fn read_on(&mut self, index: usize) {
        let gateway = &mut self.gateways[index];
        if std::mem::replace(&mut gateway.asked, true) {
            gateway.rung = true;
            return;
        }
        let op = Op::Read(gateway.reading);
        self.call(Party::Gateway(index), 10 * CALL, op, Tag::Read);
    }

    fn receive(&mut self, index: usize, answer: Answer) {
        self.gateways[index].asked = false;
        let Answer::Read(read) = answer else { return self.read_on(index) };
        let idle = read.is_empty();
        for received in read {
            if let Received::Message(message) = received {
                let message = self.as_broken(index, message);
                let heard = self.gateways[index].board.take(message);
                self.hand_out(index, heard.signals);
                self.cancel_strays(index, heard.strays);
            }
        }
        let gateway = &mut self.gateways[index];
        if gateway.reading != gateway.tokens.0 && gateway.tokens.1 != gateway.reading {
            note!(self, "gateway {index} begins anew");
            let gateway = &mut self.gateways[index];
            gateway.reading = gateway.tokens.0;
            gateway.shown.clear();
            let heard = gateway.board.begin_anew();
            self.hand_out(index, heard);
            return self.read_on(index);
        }
        if std::mem::take(&mut self.gateways[index].rung) || !idle {
            self.read_on(index);
        }
    }

    fn cancel_strays(&mut self, index: usize, strays: Vec<Stray>) {
        for Stray { worker_id, request_id, mut attempt } in strays {
            if self.broken == Broken::LateCancels {
                attempt = u32::MAX;
            }
            if self.broken != Broken::Strays {
                let op = Op::Control(worker_id, ToWorker::Cancel { request_id, attempt });
                self.call(Party::Gateway(index), CALL, op, Tag::Nobody);
            }
        }
    }

    /// What a gateway that breaks a rule hears.
    fn as_broken(&mut self, index: usize, mut message: TokenMessage) -> TokenMessage {
        if self.broken == Broken::Gaps {
            let shown = &mut self.gateways[index].shown;
            let (next, show) = shown.entry(message.worker_incarnation.clone()).or_default();
            if message.sequence >= *next {
                (*next, *show) = (message.sequence + 1, *show + 1);
                message.sequence = *show - 1;
            } else {
                message.sequence = 0;
            }
        }
        if self.broken == Broken::Attempts {
            for item in &mut message.items {
                let mut drives = self.gateways[index].drives.values();
                let of = |drive: &&Drive| drive.flight.request().request_id == item.request_id;
                if let Some(drive) = drives.find(of) {
                    item.attempt = drive.flight.request().attempt;
                }
            }
        }
        message
    }

    /// Hands signals to the requests, in order.
    pub fn hand_out(&mut self, index: usize, heard: Vec<(String, Signal)>) {
        for (request_id, signal) in heard {
            let Some(client) = crate::clients::index_of(&request_id) else { continue };
            let Some(drive) = self.gateways[index].drives.get_mut(&client) else { continue };
            drive.signals.push_back(signal);
            self.hear(index, client);
        }
    }
}
