//! A worker without a model: it keeps the queue's protocol and says what its script tells it.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use storage::Storage;
use storage::ids::incarnation;
use storage::queue::Inbox;
use storage::queue::message::{
    Finish, Item, PROTOCOL_VERSION, Refusal, Request, ResidentAdapter, Target, ToWorker, Token,
    TokenLogprob, TokenMessage, Update, WorkerPresence,
};
use tokio::task::JoinHandle;

use crate::site::{BASE, PRINT};

/// What the double does with each request.
#[derive(Clone)]
pub struct Script {
    /// One token each; the whole answer.
    pub pieces: Vec<String>,
    /// Why the answer ends when all pieces are said.
    pub finish: Finish,
    /// Pause before each step.
    pub pause: Duration,
    /// Refuses everything that `refuses` names.
    pub refusal: Option<Refusal>,
    pub refuses: fn(&Target) -> bool,
    /// Admits, then says nothing.
    pub silent: bool,
    /// The whole process ends after so many steps.
    pub dies_after: Option<usize>,
    /// The message of this step never arrives.
    pub loses: Option<usize>,
    /// Never looks into its inbox.
    pub deaf: bool,
    /// Adapters on its device.
    pub resident: Vec<String>,
    /// Name and fingerprint of its base.
    pub base: (&'static str, &'static str),
    /// Has no room for adapters that it is told to load.
    pub cramped: bool,
    /// What else is special about its presence.
    pub presence: fn(&mut WorkerPresence),
}

impl Default for Script {
    fn default() -> Script {
        Script {
            pieces: ["Hi", " ", "🦀", "!"].map(str::to_owned).into(),
            finish: Finish::Stop,
            pause: Duration::ZERO,
            refusal: None,
            refuses: |_| true,
            silent: false,
            dies_after: None,
            loses: None,
            deaf: false,
            resident: Vec::new(),
            base: (BASE, PRINT),
            cramped: false,
            presence: |_| {},
        }
    }
}

impl Script {
    pub fn saying(pieces: &[&str]) -> Script {
        Script {
            pieces: pieces.iter().map(|piece| (*piece).to_owned()).collect(),
            ..Script::default()
        }
    }
}

#[derive(Default)]
pub struct Heard {
    pub requests: Vec<Request>,
    pub cancels: Vec<String>,
    pub nudges: Vec<String>,
    /// An operator's words.
    pub words: Vec<ToWorker>,
}

pub struct Worker {
    pub incarnation: String,
    pub heard: Arc<Mutex<Heard>>,
    task: JoinHandle<()>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub const FINGERPRINT: &str = "fp_test";

pub async fn start(storage: &Storage, id: &str, script: Script) -> Worker {
    let mut presence = WorkerPresence {
        worker_id: id.to_owned(),
        incarnation: incarnation(),
        protocol: vec![PROTOCOL_VERSION],
        base: script.base.0.to_owned(),
        base_fingerprint: script.base.1.to_owned(),
        device: "none".to_owned(),
        adapters: script.resident.iter().map(|id| copy(id)).collect(),
        requests: 0,
        free_blocks: 8,
        total_blocks: 8,
        training_jobs: 0,
        training_room: 1,
        draining: false,
    };
    (script.presence)(&mut presence);
    let inbox = storage.queue.open_inbox(presence.clone()).await.unwrap();
    let heard = Arc::new(Mutex::new(Heard::default()));
    let incarnation = presence.incarnation.clone();
    let double = Double {
        storage: storage.clone(),
        presence,
        heard: Arc::clone(&heard),
        script,
        sequence: 0,
        steps: 0,
        running: Vec::new(),
    };
    Worker { incarnation, heard, task: tokio::spawn(double.run(inbox)) }
}

fn copy(adapter: &str) -> ResidentAdapter {
    ResidentAdapter { id: adapter.to_owned(), version: None, on_device: true, requests: 0 }
}

impl Worker {
    pub fn words(&self) -> Vec<ToWorker> {
        self.heard.lock().unwrap().words.clone()
    }

    /// Waits until `look` finds what it wants.
    pub async fn wait<T>(&self, look: impl Fn(&Heard) -> Option<T>) -> T {
        for _ in 0..1000 {
            if let Some(found) = look(&self.heard.lock().unwrap()) {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("the worker did not hear it");
    }

    pub async fn cancelled(&self) -> String {
        self.wait(|heard| heard.cancels.first().cloned()).await
    }

    pub fn last_request(&self) -> Request {
        self.heard.lock().unwrap().requests.last().cloned().unwrap()
    }
}

struct Double {
    storage: Storage,
    presence: WorkerPresence,
    heard: Arc<Mutex<Heard>>,
    script: Script,
    sequence: u64,
    steps: usize,
    running: Vec<Run>,
}

struct Run {
    request: Request,
    /// Tokens said, per choice.
    said: Vec<usize>,
    done: HashSet<u32>,
}

impl Double {
    async fn run(mut self, mut inbox: Inbox) {
        if self.script.deaf {
            std::future::pending::<()>().await;
        }
        loop {
            let message = if self.running.is_empty() || self.script.silent {
                inbox.recv().await
            } else {
                inbox.try_recv()
            };
            match message {
                Some(ToWorker::Place(request)) => self.admit(*request).await,
                Some(ToWorker::Cancel { request_id, attempt }) => {
                    self.running.retain(|run| {
                        run.request.request_id != request_id || run.request.attempt > attempt
                    });
                    self.heard.lock().unwrap().cancels.push(request_id);
                }
                Some(ToWorker::JobNudge { job_id }) => {
                    self.heard.lock().unwrap().nudges.push(job_id);
                }
                Some(word) => self.obey(word).await,
                None if self.running.is_empty() => return,
                None => {
                    if self.script.dies_after.is_some_and(|steps| self.steps >= steps) {
                        return;
                    }
                    tokio::time::sleep(self.script.pause).await;
                    self.step().await;
                    tokio::task::yield_now().await;
                }
            }
        }
    }

    async fn obey(&mut self, word: ToWorker) {
        self.heard.lock().unwrap().words.push(word.clone());
        match word {
            ToWorker::Load { adapter_id, .. } if !self.script.cramped => {
                self.presence.adapters.push(copy(&adapter_id));
            }
            ToWorker::Evict { adapter_id, hand_over } => {
                self.presence.adapters.retain(|copy| copy.id != adapter_id);
                if hand_over {
                    self.hand_over(&adapter_id).await;
                }
            }
            _ => {}
        }
        self.storage.queue.refresh(self.presence.clone()).await.unwrap();
    }

    async fn hand_over(&mut self, adapter: &str) {
        let on = |run: &Run| {
            matches!(&run.request.target,
            Target::Adapter { adapter_id, .. } if adapter_id == adapter)
        };
        let (left, kept) = std::mem::take(&mut self.running).into_iter().partition(on);
        self.running = kept;
        let left: Vec<Run> = left;
        for Run { request, .. } in left {
            let (request_id, attempt) = (request.request_id, request.attempt);
            let item = Item { request_id, attempt, update: Update::Moved };
            self.publish(&request.gateway, vec![item]).await;
        }
    }

    async fn admit(&mut self, request: Request) {
        self.heard.lock().unwrap().requests.push(request.clone());
        let item = |update| Item {
            request_id: request.request_id.clone(),
            attempt: request.attempt,
            update,
        };
        if let Some(refusal) = &self.script.refusal
            && (self.script.refuses)(&request.target)
        {
            let items = vec![item(Update::Failed(refusal.clone()))];
            return self.publish(&request.gateway, items).await;
        }
        let fingerprint = FINGERPRINT.to_owned();
        let items = vec![item(Update::Admitted { prompt_tokens: 9, fingerprint })];
        self.publish(&request.gateway, items).await;
        let choices = request.choices as usize;
        let said = (0..choices).map(|c| request.replay.get(c).map_or(0, |r| r.tokens.len()));
        let done = (0..).zip(&request.replay).filter(|(_, r)| r.finish.is_some());
        let done = done.map(|(choice, _)| choice).collect();
        self.running.push(Run { said: said.collect(), done, request });
    }

    /// One token for every choice of every request, one message per gateway.
    async fn step(&mut self) {
        self.steps += 1;
        let mut items = Vec::new();
        let mut gateway = String::new();
        for run in &mut self.running {
            gateway.clone_from(&run.request.gateway);
            for choice in 0..run.request.choices {
                if !run.done.contains(&choice) {
                    let update = say(&self.script, run, choice);
                    items.push(Item {
                        request_id: run.request.request_id.clone(),
                        attempt: run.request.attempt,
                        update,
                    });
                }
            }
        }
        self.running.retain(|run| run.done.len() < run.request.choices as usize);
        if self.script.loses == Some(self.steps) {
            self.sequence += 1;
            return;
        }
        self.publish(&gateway, items).await;
    }

    async fn publish(&mut self, gateway: &str, items: Vec<Item>) {
        let message = TokenMessage {
            worker_incarnation: self.presence.incarnation.clone(),
            sequence: self.sequence,
            items,
        };
        self.sequence += 1;
        self.storage.queue.publish(gateway, message).await.unwrap();
    }
}

fn say(script: &Script, run: &mut Run, choice: u32) -> Update {
    let first = run.said[choice as usize];
    let most = run.request.limits.max_tokens.map_or(usize::MAX, |max| max as usize);
    let piece = script.pieces.get(first).filter(|_| first < most);
    let text = piece.cloned().unwrap_or_default();
    let said = first + usize::from(piece.is_some());
    run.said[choice as usize] = said;
    let finish = if said >= most {
        Some(Finish::Length)
    } else {
        (said >= script.pieces.len()).then_some(script.finish)
    };
    if finish.is_some() {
        run.done.insert(choice);
    }
    let logprob = run.request.sampling.logprobs.map(|top| TokenLogprob {
        logprob: -0.25 - choice as f32,
        bytes: text.clone().into_bytes(),
        top: (0..top).map(|i| (vec![b'a' + i], -0.25 - f32::from(i))).collect(),
    });
    let token = piece.map(|_| Token { id: 100 + first as u32, logprob });
    Update::Tokens {
        choice,
        first: first as u32,
        tokens: token.into_iter().collect(),
        text,
        finish,
    }
}
