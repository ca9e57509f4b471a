//! A toy engine: what it draws is a pure function of the request's seed, the version of its
//! weights, the choice and the position. So every client's tokens can be checked.

use std::collections::BTreeMap;

use storage::queue::message::{Finish, Request, Target, Token, TokenLogprob, Update};

/// Requests that draw in one step; others wait, admitted.
const BATCH: usize = 4;

/// Mixes numbers into one.
pub fn mix(parts: &[u64]) -> u64 {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    for part in parts {
        state = (state ^ part).wrapping_mul(0xBF58_476D_1CE4_E5B9).rotate_left(31);
        state = state.wrapping_add(0x94D0_49BB_1331_11EB);
    }
    state ^ (state >> 29)
}

/// The one token at a place, and whether the choice ends with it.
pub fn token(request: &Request, version: u64, choice: usize, at: usize) -> (u32, Option<Finish>) {
    let seed = request.sampling.seed as u64;
    let id = (mix(&[seed, version, choice as u64, at as u64]) % 1000) as u32;
    let most = request.limits.max_tokens.map_or(usize::MAX, |most| most as usize);
    let finish = match id {
        id if id.is_multiple_of(29) && !request.limits.ignore_eos => Some(Finish::Stop),
        _ if at + 1 >= most => Some(Finish::Length),
        _ => None,
    };
    (id, finish)
}

/// What a token adds to the text.
pub fn text(id: u32) -> String {
    format!("{id} ")
}

struct Choice {
    tokens: Vec<u32>,
    ended: bool,
}

struct Run {
    request: Request,
    /// None: its weights have not come.
    version: Option<u64>,
    choices: Vec<Choice>,
    announced: bool,
}

/// Running requests by the number that routes gave them.
#[derive(Default)]
pub struct Engine {
    runs: BTreeMap<u64, Run>,
}

impl Engine {
    /// Takes a request with the tokens it has, for weights of `version` or, without one, to wait
    /// for them.
    pub fn admit(&mut self, key: u64, request: Request, version: Option<u64>) {
        let choice = |index: u32| match request.replay.get(index as usize) {
            None => Choice { tokens: Vec::new(), ended: false },
            Some(replay) => {
                Choice { tokens: replay.tokens.clone(), ended: replay.finish.is_some() }
            }
        };
        let choices = (0..request.choices).map(choice).collect();
        self.runs.insert(key, Run { request, version, choices, announced: false });
    }

    pub fn cancel(&mut self, key: u64) {
        self.runs.remove(&key);
    }

    /// Weights have come.
    pub fn warm(&mut self, adapter_id: &str, version: u64) {
        for run in self.runs.values_mut().filter(|run| run.is_of(adapter_id)) {
            run.version.get_or_insert(version);
        }
    }

    /// Lets go of what waits for these weights.
    pub fn end_cold(&mut self, adapter_id: &str) -> Vec<u64> {
        let ended = |run: &mut Run| run.is_of(adapter_id) && run.version.is_none();
        self.runs.extract_if(.., |_, run| ended(run)).map(|(key, _)| key).collect()
    }

    pub fn is_idle(&self) -> bool {
        self.runs.is_empty()
    }

    /// What the next step draws for, by number.
    pub fn drawing(&self) -> impl Iterator<Item = (u64, &Request)> {
        let warm = self.runs.iter().filter(|(_, run)| run.version.is_some());
        warm.take(BATCH).map(|(key, run)| (*key, &run.request))
    }

    /// One step: what happened to each request. `incarnation` marks where a token was drawn.
    pub fn step(&mut self, incarnation: &str) -> Vec<(u64, Update)> {
        let mut outputs = Vec::new();
        for (key, run) in &mut self.runs {
            if !run.announced {
                run.announced = true;
                let fingerprint = run.fingerprint();
                outputs.push((*key, Update::Admitted { prompt_tokens: 1, fingerprint }));
            }
        }
        let warm = |run: &Run| run.version.is_some();
        for (key, run) in self.runs.iter_mut().filter(|(_, run)| warm(run)).take(BATCH) {
            let Some(version) = run.version else { continue };
            let mark = mark(incarnation, run.request.attempt, version);
            for index in 0..run.choices.len() {
                if !run.choices[index].ended {
                    outputs.push((*key, run.draw(index, version, &mark)));
                }
            }
        }
        self.runs.retain(|_, run| run.choices.iter().any(|choice| !choice.ended));
        outputs
    }

    /// Lets go of everything, or of what is for one adapter.
    pub fn hand_over(&mut self, adapter_id: Option<&str>) -> Vec<(u64, Update)> {
        let goes = |run: &mut Run| adapter_id.is_none_or(|id| run.is_of(id));
        let runs = self.runs.extract_if(.., |_, run| goes(run));
        runs.map(|(key, _)| (key, Update::Moved)).collect()
    }
}

/// Names where a token was drawn; it travels beside the token.
pub fn mark(incarnation: &str, attempt: u32, version: u64) -> String {
    format!("{incarnation}/{attempt}/{version}")
}

impl Run {
    fn is_of(&self, id: &str) -> bool {
        matches!(&self.request.target, Target::Adapter { adapter_id, .. } if adapter_id == id)
    }

    /// Names the version; an adapter's is known before its weights come.
    fn fingerprint(&self) -> String {
        match (&self.request.target, self.version) {
            (Target::Adapter { adapter_id, .. }, _) => format!("fp-{adapter_id}"),
            (_, version) => format!("fp-{}", version.unwrap_or_default()),
        }
    }

    /// One more token. Text is held back by one, as a possible stop text is.
    fn draw(&mut self, index: usize, version: u64, mark: &str) -> Update {
        let choice = &mut self.choices[index];
        let at = choice.tokens.len();
        let (id, finish) = token(&self.request, version, index, at);
        let mut shown = choice.tokens.last().map(|last| text(*last)).unwrap_or_default();
        if finish.is_some() {
            shown.push_str(&text(id));
        }
        choice.tokens.push(id);
        choice.ended = finish.is_some();
        let logprob = TokenLogprob { logprob: 0.0, bytes: mark.as_bytes().to_vec(), top: vec![] };
        let tokens = vec![Token { id, logprob: Some(logprob) }];
        Update::Tokens { choice: index as u32, first: at as u32, tokens, text: shown, finish }
    }
}
