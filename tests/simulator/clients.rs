//! Clients of the simulated world: what they ask, and that what they get is a beginning of the one
//! true answer, whole at the end or ended in an error that a fault explains.

use gateway::flight::Delta;
use rand::RngExt;
use storage::queue::message::{Finish, Input, Limits, Request, Sampling, Target};

use crate::adapters::{self, ADAPTERS, true_version};
use crate::engine::{mark, text, token};
use crate::plan::FAULTS_END;
use crate::queue::EXPIRY;
use crate::world::{Event, World, note};

/// How long a fault is felt after its end: presence, a placement's patience, a search.
const WAKE: u64 = 6500 + 3 * EXPIRY;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Waiting,
    Complete,
    /// A clear error.
    Failed(String),
    /// Its gateway ended.
    Broken,
    /// It went by itself.
    Left,
}

pub struct Client {
    pub request: Request,
    gateway: usize,
    began: u64,
    /// Version of the weights that its first token was drawn with.
    version: Option<u64>,
    tokens: Vec<Vec<u32>>,
    texts: Vec<String>,
    finishes: Vec<Option<Finish>>,
    pub outcome: Outcome,
    /// It was placed again.
    pub moved: bool,
}

/// Number of the client in a request's id.
pub fn index_of(request_id: &str) -> Option<usize> {
    request_id.strip_prefix('r')?.parse().ok()
}

/// The name of a base.
pub fn base(number: usize) -> String {
    format!("base-{number}")
}

/// A request that ends by length, after so many tokens; or earlier, if it may.
fn request(
    index: usize,
    seed: i64,
    choices: u32,
    (most, ignore_eos): (u32, bool),
    target: Target,
) -> Request {
    Request {
        request_id: format!("r{index}"),
        attempt: 0,
        gateway: String::new(),
        org: "org".to_owned(),
        base: base(0),
        target,
        input: Input::Tokens(vec![1]),
        sampling: Sampling {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed,
            logprobs: None,
        },
        limits: Limits { max_tokens: Some(most), ignore_eos, ..Limits::default() },
        choices,
        replay: Vec::new(),
    }
}

impl World {
    pub fn make_clients(&mut self) {
        for index in 0..self.plan.clients {
            let rng = &mut self.rng;
            let target = match rng.random_range(0..6) {
                0 => Target::Job { job_id: "ftjob-0".to_owned() },
                1 | 2 => adapters::target(rng.random_range(0..ADAPTERS)),
                _ => Target::Base,
            };
            let of_base = rng.random_range(0..self.plan.bases);
            let seed = rng.random_range(0..i64::MAX);
            let choices = if rng.random_range(0..4) == 0 { 2 } else { 1 };
            // A few go on for longer than a loss is felt.
            let long = rng.random_range(0..6) == 0;
            let most = rng.random_range(if long { 100..300 } else { 1..50 });
            let gateway = rng.random_range(0..self.gateways.len());
            let began = rng.random_range(200..FAULTS_END - 800);
            let leaves = (rng.random_range(0..8) == 0).then(|| rng.random_range(1..600));
            let n = choices as usize;
            self.clients.push(Client {
                request: Request {
                    base: base(of_base),
                    ..request(index, seed, choices, (most, long), target)
                },
                gateway,
                began,
                version: None,
                tokens: vec![Vec::new(); n],
                texts: vec![String::new(); n],
                finishes: vec![None; n],
                outcome: Outcome::Waiting,
                moved: false,
            });
            self.at(began, Event::Arrive(index));
            if let Some(after) = leaves {
                self.at(began + after, Event::Leave(index));
            }
        }
    }

    pub fn arrive(&mut self, client: usize) {
        let gateway = self.clients[client].gateway;
        if self.gateways[gateway].process.alive {
            note!(self, "r{client} comes to gateway {gateway}");
            self.open_request(gateway, client);
        } else {
            self.conclude(client, Outcome::Broken);
        }
    }

    pub fn leave(&mut self, client: usize) {
        if self.clients[client].outcome == Outcome::Waiting {
            self.close_request(self.clients[client].gateway, client);
            self.conclude(client, Outcome::Left);
        }
    }

    /// Tokens for a client, which its gateway takes as of the placement `place`.
    pub fn deliver(&mut self, client: usize, delta: &Delta, place: &(String, u32)) {
        let index = delta.choice as usize;
        for drawn in &delta.tokens {
            let origin = drawn.logprob.as_ref().map(|logprob| logprob.bytes.as_slice());
            let origin = String::from_utf8_lossy(origin.unwrap_or_default()).into_owned();
            let version = origin.rsplit('/').next().and_then(|text| text.parse().ok());
            let this = &mut self.clients[client];
            let pinned = *this.version.get_or_insert(version.unwrap_or_default());
            let at = this.tokens[index].len();
            let (true_id, finish) = token(&this.request, pinned, index, at);
            this.tokens[index].push(drawn.id);
            let is_true = true_version(&this.request.target).is_none_or(|true_| true_ == pinned);
            if !is_true {
                self.violate(format!("r{client} was answered by weights {pinned}"));
            } else if origin != mark(&place.0, place.1, pinned) {
                let (incarnation, attempt) = place;
                self.violate(format!("r{client} on {incarnation} #{attempt} heard {origin}"));
            } else if drawn.id != true_id {
                self.violate(format!("r{client}.{index} got {} at {at}, not {true_id}", drawn.id));
            } else if finish != delta.finish {
                self.violate(format!("r{client}.{index} ended at {at}: {:?}", delta.finish));
            }
        }
        let this = &mut self.clients[client];
        this.texts[index].push_str(&delta.text);
        if this.outcome != Outcome::Waiting || this.finishes[index].is_some() {
            self.violate(format!("r{client}.{index} got tokens after its end"));
        }
        self.clients[client].finishes[index] = delta.finish;
    }

    /// A client's request is over.
    pub fn conclude(&mut self, client: usize, outcome: Outcome) {
        note!(self, "r{client} {outcome:?}");
        let explained = self.plan.explains(self.clients[client].began, self.now, WAKE);
        let this = &mut self.clients[client];
        if this.outcome != Outcome::Waiting {
            return;
        }
        this.outcome = outcome;
        let mut wrong = None;
        for (index, tokens) in this.tokens.iter().enumerate() {
            let whole: String = tokens.iter().map(|id| text(*id)).collect();
            let ended = this.finishes[index].is_some();
            let shown = if ended { whole == this.texts[index] } else { true };
            if !shown || !whole.starts_with(&this.texts[index]) {
                wrong = Some(format!("r{client}.{index} was shown {:?}", this.texts[index]));
            }
            if this.outcome == Outcome::Complete && !ended {
                wrong = Some(format!("r{client}.{index} is not whole"));
            }
        }
        if matches!(this.outcome, Outcome::Failed(_) | Outcome::Broken) && !explained {
            wrong = Some(format!("r{client} {:?} without a fault", this.outcome));
        }
        if let Some(wrong) = wrong {
            self.violate(wrong);
        }
    }
}
