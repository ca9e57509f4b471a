//! The queue of the simulated world: the documented meaning of `storage::queue`, over virtual
//! time. Presence runs out; inboxes and streams outlive it for the process that opened them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use storage::queue::message::{Request, ToWorker, TokenMessage, WorkerPresence};
use storage::queue::{Controlled, Delivered, Placed, Received};

/// How long a process without a sign of life counts as alive.
pub const EXPIRY: u64 = 600;

/// Token messages of one gateway that wait at most.
const STREAM: usize = 32;

/// Messages read at once at most.
const READ: usize = 8;

/// Control messages of one worker that wait at most.
const CONTROLS: usize = 16;

struct Presence<T> {
    token: u64,
    expires: u64,
    told: T,
}

#[derive(Default)]
struct Inbox {
    controls: VecDeque<ToWorker>,
    requests: VecDeque<Request>,
    /// Placements that were put in, each at most once.
    seen: Vec<(String, u32)>,
}

/// The queue's state; tokens number what processes opened.
#[derive(Default)]
pub struct Queue {
    workers: BTreeMap<String, Presence<WorkerPresence>>,
    inboxes: BTreeMap<u64, Inbox>,
    gateways: BTreeMap<String, Presence<()>>,
    streams: BTreeMap<u64, VecDeque<TokenMessage>>,
    tokens: u64,
    inbox_requests: usize,
    /// Readers that found nothing, and those of them to wake.
    waiting: BTreeSet<u64>,
    pub rung: Vec<u64>,
}

impl Queue {
    /// An empty queue whose inboxes hold so many requests.
    pub fn new(inbox_requests: usize) -> Self {
        Self { inbox_requests, ..Self::default() }
    }

    /// Loses everything; tokens stay unique.
    pub fn restart(&mut self) {
        self.workers.clear();
        self.inboxes.clear();
        self.gateways.clear();
        self.streams.clear();
    }

    pub fn new_token(&mut self) -> u64 {
        self.tokens += 1;
        self.tokens
    }

    /// Drops presences that have run out.
    pub fn expire(&mut self, now: u64) {
        self.workers.retain(|_, worker| worker.expires > now);
        self.gateways.retain(|_, gateway| gateway.expires > now);
    }

    /// Tells that a worker lives. With `open` its inbox takes the place of an earlier one. False:
    /// another inbox has this id.
    pub fn keep_worker(&mut self, told: WorkerPresence, token: u64, open: bool, now: u64) -> bool {
        let before = self.workers.get(&told.worker_id).map(|worker| worker.token);
        if before.is_some_and(|before| before != token) {
            if !open {
                return false;
            }
            before.and_then(|before| self.inboxes.remove(&before));
        }
        self.inboxes.entry(token).or_default();
        let presence = Presence { token, expires: now + EXPIRY, told };
        self.workers.insert(presence.told.worker_id.clone(), presence);
        true
    }

    /// Ends a worker's presence and inbox.
    pub fn close_inbox(&mut self, worker_id: &str, token: u64) {
        self.inboxes.remove(&token);
        if self.workers.get(worker_id).is_some_and(|worker| worker.token == token) {
            self.workers.remove(worker_id);
        }
    }

    /// Wakes the reader of what a token names, if it waits.
    fn ring(&mut self, token: u64) {
        if self.waiting.remove(&token) {
            self.rung.push(token);
        }
    }

    pub fn place(&mut self, worker_id: &str, request: Request) -> Placed {
        let Some(worker) = self.workers.get(worker_id) else { return Placed::Gone };
        let token = worker.token;
        let inbox = self.inboxes.entry(token).or_default();
        let seen = (request.request_id.clone(), request.attempt);
        if inbox.seen.contains(&seen) {
            return Placed::Accepted;
        }
        if inbox.requests.len() >= self.inbox_requests {
            return Placed::Full;
        }
        inbox.seen.push(seen);
        inbox.requests.push_back(request);
        self.ring(token);
        Placed::Accepted
    }

    /// None: there is no room now.
    pub fn control(&mut self, worker_id: &str, message: &ToWorker) -> Option<Controlled> {
        let Some(worker) = self.workers.get(worker_id) else { return Some(Controlled::Gone) };
        let token = worker.token;
        let inbox = self.inboxes.entry(token).or_default();
        if let ToWorker::Cancel { request_id, attempt } = message {
            let waiting = inbox.requests.len();
            inbox.requests.retain(|r| r.request_id != *request_id || r.attempt > *attempt);
            if inbox.requests.len() < waiting {
                return Some(Controlled::Sent);
            }
        }
        if inbox.controls.contains(message) {
            return Some(Controlled::Sent);
        }
        if inbox.controls.len() >= CONTROLS {
            return None;
        }
        inbox.controls.push_back(message.clone());
        self.ring(token);
        Some(Controlled::Sent)
    }

    /// A nudge for every worker.
    pub fn nudge(&mut self, job_id: &str) {
        let workers: Vec<String> = self.workers.keys().cloned().collect();
        for worker in workers {
            self.control(&worker, &ToWorker::JobNudge { job_id: job_id.to_owned() });
        }
    }

    pub fn take(&mut self, token: u64) -> Option<ToWorker> {
        let taken = self.inboxes.get_mut(&token).and_then(|inbox| {
            let control = inbox.controls.pop_front();
            control.or_else(|| Some(ToWorker::Place(Box::new(inbox.requests.pop_front()?))))
        });
        if taken.is_none() {
            self.waiting.insert(token);
        }
        taken
    }

    /// Puts a request in once more, past the look for repeats.
    pub fn repeat(&mut self, worker_id: &str, request: Request) {
        if let Some(worker) = self.workers.get(worker_id) {
            let token = worker.token;
            self.inboxes.entry(token).or_default().requests.push_back(request);
            self.ring(token);
        }
    }

    /// Tells that a gateway lives. True: its presence was gone, and a new stream of the token
    /// `next` counts.
    pub fn keep_gateway(&mut self, id: &str, token: u64, next: u64, now: u64) -> bool {
        let anew = match self.gateways.get(id) {
            Some(presence) => presence.token != token,
            None => {
                self.streams.remove(&token);
                true
            }
        };
        let token = if anew { next } else { token };
        self.streams.entry(token).or_default();
        let presence = Presence { token, expires: now + EXPIRY, told: () };
        self.gateways.insert(id.to_owned(), presence);
        anew
    }

    /// Where a gateway's messages go; None: it is gone.
    pub fn stream(&mut self, gateway: &str) -> Option<&mut VecDeque<TokenMessage>> {
        let token = self.gateways.get(gateway)?.token;
        Some(self.streams.entry(token).or_default())
    }

    pub fn publish(&mut self, gateway: &str, message: TokenMessage) -> Delivered {
        match self.stream(gateway) {
            None => Delivered::GatewayGone,
            Some(stream) if stream.len() >= STREAM => Delivered::Dropped,
            Some(stream) => {
                stream.push_back(message);
                let token = self.gateways.get(gateway).map(|presence| presence.token);
                token.into_iter().for_each(|token| self.ring(token));
                Delivered::Delivered
            }
        }
    }

    pub fn read(&mut self, token: u64) -> Vec<Received> {
        let stream = self.streams.get_mut(&token);
        let ready = stream.filter(|stream| !stream.is_empty());
        let Some(stream) = ready else {
            self.waiting.insert(token);
            return Vec::new();
        };
        let count = stream.len().min(READ);
        stream.drain(..count).map(Received::Message).collect()
    }

    pub fn workers(&self) -> Vec<WorkerPresence> {
        self.workers.values().map(|worker| worker.told.clone()).collect()
    }

    pub fn gateways(&self) -> Vec<String> {
        self.gateways.keys().cloned().collect()
    }
}
