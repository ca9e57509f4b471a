//! One request from its first placement to its end, as plain data: which messages count, when it
//! is placed again, and what its next worker is told. No IO and no clock.
//!
//! A request moves when its worker is gone or a message of it was lost. The tokens so far go along
//! as generated ones, so the client's text goes on without a gap or a repeat; messages of earlier
//! attempts are dropped.

use storage::queue::message::{
    Finish, Refusal, RefusalKind, Replay, Request, Target, Token, Update,
};

/// Losses of one request before it is given up: a request that ends its workers must not walk
/// through all of them.
const LOSSES_MAX: u32 = 4;

/// Lost messages of one request before it is given up. The queue's doing, not the request's: when
/// it comes back empty, each worker's next message can show another hole.
const HOLES_MAX: u32 = 16;

/// Placements in all; only hand-overs, which say nothing against the request, come near.
const ATTEMPTS_MAX: u32 = 1000;

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

/// What a request has lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Its worker is gone, or did not answer.
    Worker,
    /// A message of its worker, or all that the queue held.
    Message,
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
    /// Workers that it lost or that had no room.
    losses: u32,
    /// Messages that were lost.
    holes: u32,
    /// Workers that refused it one after the other, for want of room or of the weights.
    refusals: u32,
    /// No worker has admitted the placement that counts.
    waiting: bool,
}

impl Flight {
    /// A request not placed yet.
    pub fn new(request: Request) -> Flight {
        let choices = vec![Replay::default(); request.choices as usize];
        Flight {
            request,
            choices,
            admission: None,
            losses: 0,
            holes: 0,
            refusals: 0,
            waiting: true,
        }
    }

    /// The placement that counts.
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// Set once admitted.
    pub fn admission(&self) -> Option<&Admission> {
        self.admission.as_ref()
    }

    /// No worker has admitted the placement that counts yet; it may never have got there.
    pub fn is_waiting(&self) -> bool {
        self.waiting
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
                self.admit(Admission { prompt_tokens, fingerprint })
            }
            Update::Tokens { choice, first, tokens, text, finish } => {
                self.advance(first, Delta { choice, tokens, text, finish })
            }
            Update::Moved if self.request.attempt + 1 < ATTEMPTS_MAX => Effect::PlaceAgain,
            Update::Moved => self.lose(Loss::Worker),
            // A worker that drains or is full now says nothing about the request itself.
            Update::Failed(refusal) if refusal.kind == RefusalKind::Overloaded => {
                self.refusals += 1;
                let told = self.is_live() && self.admission.is_some();
                self.move_on(if told { version_gone() } else { refusal })
            }
            Update::Failed(refusal) => Effect::Fail(refusal),
        }
    }

    /// The worker is gone, or a message of it was lost.
    pub fn lose(&mut self, loss: Loss) -> Effect {
        if self.is_done() {
            return Effect::Ignore;
        }
        if loss == Loss::Message && self.holes + 1 < HOLES_MAX {
            self.holes += 1;
            return Effect::PlaceAgain;
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
        self.waiting = true;
        let begun = self.choices.iter().any(|choice| !choice.tokens.is_empty());
        self.request.replay = if begun { self.choices.clone() } else { Vec::new() };
        &self.request
    }

    /// Pauses to make before it is placed again: none after the first refusal in a row, as the
    /// next worker may have what the first had not.
    pub fn rests(&self) -> u32 {
        self.refusals.saturating_sub(1)
    }

    /// What was asked for means this by now, or nothing any more. An answer of live weights whose
    /// version the client was told cannot go on with others.
    pub fn retarget(&mut self, target: Option<Target>) -> Result<(), Refusal> {
        match target {
            Some(target) if target == self.request.target => Ok(()),
            _ if self.admission.is_some() => Err(version_gone()),
            Some(target) => {
                self.request.target = target;
                Ok(())
            }
            None => Err(Refusal {
                kind: RefusalKind::ModelNotFound,
                message: "The job has ended without a model.".to_owned(),
                param: None,
            }),
        }
    }

    /// Its weights are those of a running job, which change.
    fn is_live(&self) -> bool {
        matches!(self.request.target, Target::Job { .. })
    }

    /// The first admission counts: the client has been told its fingerprint. A later one must be of
    /// the same weights where they could have changed: those of a running job.
    fn admit(&mut self, admission: Admission) -> Effect {
        self.refusals = 0;
        let Some(first) = &self.admission else {
            self.waiting = false;
            self.admission = Some(admission);
            return Effect::Admitted;
        };
        if self.is_live() && first.fingerprint != admission.fingerprint {
            return Effect::Fail(version_gone());
        }
        self.waiting = false;
        Effect::Ignore
    }

    fn move_on(&mut self, last_word: Refusal) -> Effect {
        self.losses += 1;
        if self.losses >= LOSSES_MAX {
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
        let end = first.saturating_add(delta.tokens.len() as u32);
        let repeated = end <= known && first < known;
        if repeated || choice.finish.is_some() {
            return Effect::Ignore;
        }
        if first != known || self.admission.is_none() {
            return self.lose(Loss::Message);
        }
        choice.tokens.extend(delta.tokens.iter().map(|token| token.id));
        choice.text_chars += delta.text.chars().count() as u32;
        choice.finish = delta.finish;
        Effect::Deliver(delta)
    }
}

fn version_gone() -> Refusal {
    Refusal {
        kind: RefusalKind::Overloaded,
        message: "The version of the job's model that was answering is gone with its worker. Ask \
                  again for an answer of the newest one."
            .to_owned(),
        param: None,
    }
}

#[cfg(test)]
mod tests;
