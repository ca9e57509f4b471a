//! One request from its first placement to its end, as plain data: which messages count, when it
//! is placed again, and what its next worker is told. No IO and no clock.
//!
//! A request moves when its worker is gone or a message of it was lost. The tokens so far go along
//! as generated ones, so the client's text goes on without a gap or a repeat; messages of earlier
//! attempts are dropped.

use storage::queue::message::{Finish, Refusal, RefusalKind, Replay, Request, Token, Update};

/// Placements of one request before it is given up: a request that ends its workers must not walk
/// through all of them.
const ATTEMPTS_MAX: u32 = 4;

/// New tokens of one choice, for the client.
#[derive(Clone, Debug, PartialEq)]
pub struct Delta {
    /// Choice index.
    pub choice: u32,
    /// The tokens.
    pub tokens: Vec<Token>,
    /// Text that became certain.
    pub text: String,
    /// The choice ends here.
    pub finish: Option<Finish>,
}

/// What the caller has to do after a message.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Nothing: a repeat, or a message of an earlier attempt.
    Ignore,
    /// Admitted for the first time.
    Admitted,
    /// Send this to the client.
    Deliver(Delta),
    /// Take [`Flight::next_attempt`] and place it.
    PlaceAgain,
    /// It is over.
    Fail(Refusal),
}

/// What admission told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// `fp_…` of the first admission; it stays for all chunks.
    pub fingerprint: String,
}

/// The state of one request.
#[derive(Debug)]
pub struct Flight {
    request: Request,
    choices: Vec<Replay>,
    admission: Option<Admission>,
}

impl Flight {
    /// A request not placed yet.
    pub fn new(request: Request) -> Flight {
        let choices = vec![Replay::default(); request.choices as usize];
        Flight { request, choices, admission: None }
    }

    /// The placement that counts.
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// Set once admitted.
    pub fn admission(&self) -> Option<&Admission> {
        self.admission.as_ref()
    }

    /// Every choice has ended.
    pub fn is_done(&self) -> bool {
        self.choices.iter().all(|choice| choice.finish.is_some())
    }

    /// Tokens sampled so far over all choices.
    pub fn completion_tokens(&self) -> u64 {
        self.choices.iter().map(|choice| choice.tokens.len() as u64).sum()
    }

    /// A message of the worker.
    pub fn receive(&mut self, attempt: u32, update: Update) -> Effect {
        if attempt != self.request.attempt || self.is_done() {
            return Effect::Ignore;
        }
        match update {
            Update::Admitted { prompt_tokens, fingerprint } => {
                if self.admission.is_some() {
                    return Effect::Ignore;
                }
                self.admission = Some(Admission { prompt_tokens, fingerprint });
                Effect::Admitted
            }
            Update::Tokens { choice, first, tokens, text, finish } => {
                self.advance(first, Delta { choice, tokens, text, finish })
            }
            // A worker that drains or is full now says nothing about the request itself.
            Update::Failed(refusal) if refusal.kind == RefusalKind::Overloaded => {
                self.move_on(refusal)
            }
            Update::Failed(refusal) => Effect::Fail(refusal),
        }
    }

    /// The worker is gone, or a message of it was lost.
    pub fn lose_worker(&mut self) -> Effect {
        if self.is_done() {
            return Effect::Ignore;
        }
        self.move_on(Refusal {
            kind: RefusalKind::Overloaded,
            message: "The worker running this request was lost.".to_owned(),
            param: None,
        })
    }

    /// The same request for its next worker, with all tokens so far.
    pub fn next_attempt(&mut self) -> &Request {
        self.request.attempt += 1;
        let begun = self.choices.iter().any(|choice| !choice.tokens.is_empty());
        self.request.replay = if begun { self.choices.clone() } else { Vec::new() };
        &self.request
    }

    fn move_on(&mut self, last_word: Refusal) -> Effect {
        if self.request.attempt + 1 >= ATTEMPTS_MAX {
            return Effect::Fail(last_word);
        }
        Effect::PlaceAgain
    }

    /// Accepts the tokens if they continue the choice; a repeat is dropped, and a hole means that
    /// something was lost.
    fn advance(&mut self, first: u32, delta: Delta) -> Effect {
        let Some(choice) = self.choices.get_mut(delta.choice as usize) else {
            return Effect::Fail(Refusal {
                kind: RefusalKind::Internal,
                message: format!("a worker spoke of choice {}", delta.choice),
                param: None,
            });
        };
        let known = choice.tokens.len() as u32;
        let repeated = first + (delta.tokens.len() as u32) <= known && first < known;
        if repeated || choice.finish.is_some() {
            return Effect::Ignore;
        }
        if first != known || self.admission.is_none() {
            return self.lose_worker();
        }
        choice.tokens.extend(delta.tokens.iter().map(|token| token.id));
        choice.text_chars += delta.text.chars().count() as u32;
        choice.finish = delta.finish;
        Effect::Deliver(delta)
    }
}

#[cfg(test)]
mod tests;
