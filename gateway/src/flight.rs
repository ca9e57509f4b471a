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
    /// No worker has admitted the placement that counts.
    waiting: bool,
}

impl Flight {
    /// A request not placed yet.
    pub fn new(request: Request) -> Flight {
        let choices = vec![Replay::default(); request.choices as usize];
        Flight { request, choices, admission: None, losses: 0, holes: 0, waiting: true }
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
                self.move_on(refusal)
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

    /// The first admission counts: the client has been told its fingerprint. A later one must be of
    /// the same weights where they could have changed: those of a running job.
    fn admit(&mut self, admission: Admission) -> Effect {
        let Some(first) = &self.admission else {
            self.waiting = false;
            self.admission = Some(admission);
            return Effect::Admitted;
        };
        let live = matches!(self.request.target, Target::Job { .. });
        if live && first.fingerprint != admission.fingerprint {
            return Effect::Fail(Refusal {
                kind: RefusalKind::Overloaded,
                message: "The version of the job's model that was answering is gone with its \
                          worker. Ask again for an answer of the newest one."
                    .to_owned(),
                param: None,
            });
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

#[cfg(test)]
mod tests {
    use storage::queue::message::{Input, Limits, Sampling};

    use super::*;

    fn request(choices: u32) -> Request {
        Request {
            request_id: "chatcmpl-1".to_owned(),
            attempt: 0,
            gateway: "g".to_owned(),
            org: "org-local".to_owned(),
            base: "b".to_owned(),
            target: Target::Base,
            input: Input::Text("x".to_owned()),
            sampling: Sampling {
                temperature: 0.0,
                top_p: 1.0,
                top_k: 0,
                min_p: 0.0,
                presence_penalty: 0.0,
                frequency_penalty: 0.0,
                repetition_penalty: 1.0,
                logit_bias: Vec::new(),
                seed: 1,
                logprobs: None,
            },
            limits: Limits::default(),
            choices,
            replay: Vec::new(),
        }
    }

    fn admitted(fingerprint: &str) -> Update {
        Update::Admitted { prompt_tokens: 3, fingerprint: fingerprint.to_owned() }
    }

    fn tokens(choice: u32, first: u32, ids: &[u32], text: &str, finish: Option<Finish>) -> Update {
        let tokens = ids.iter().map(|&id| Token { id, logprob: None }).collect();
        Update::Tokens { choice, first, tokens, text: text.to_owned(), finish }
    }

    fn text_of(effect: Effect) -> String {
        match effect {
            Effect::Deliver(delta) => delta.text,
            other => panic!("expected a delta, got {other:?}"),
        }
    }

    #[test]
    fn tokens_in_order_are_delivered_and_repeats_are_not() {
        let mut flight = Flight::new(request(1));
        assert_eq!(flight.receive(0, admitted("fp_1")), Effect::Admitted);
        assert_eq!(text_of(flight.receive(0, tokens(0, 0, &[7], "a", None))), "a");
        assert_eq!(flight.receive(0, tokens(0, 0, &[7], "a", None)), Effect::Ignore);
        assert_eq!(text_of(flight.receive(0, tokens(0, 1, &[8, 9], "bc", None))), "bc");
        assert!(!flight.is_done());
        let last = flight.receive(0, tokens(0, 3, &[2], "", Some(Finish::Stop)));
        assert!(matches!(last, Effect::Deliver(_)));
        assert!(flight.is_done());
        assert_eq!(flight.completion_tokens(), 4);
        assert_eq!(flight.receive(0, tokens(0, 4, &[2], "x", None)), Effect::Ignore);
    }

    #[test]
    fn a_final_message_without_tokens_still_ends_the_choice() {
        let mut flight = Flight::new(request(1));
        flight.receive(0, admitted("fp_1"));
        flight.receive(0, tokens(0, 0, &[7], "", None));
        let last = flight.receive(0, tokens(0, 1, &[], "held", Some(Finish::Length)));
        assert_eq!(text_of(last), "held");
        assert!(flight.is_done());
    }

    #[test]
    fn a_hole_moves_the_request_with_its_tokens() {
        let mut flight = Flight::new(request(2));
        flight.receive(0, admitted("fp_1"));
        flight.receive(0, tokens(0, 0, &[7, 8], "añ", None));
        flight.receive(0, tokens(1, 0, &[5], "z", Some(Finish::Stop)));
        assert_eq!(flight.receive(0, tokens(0, 3, &[9], "c", None)), Effect::PlaceAgain);

        let again = flight.next_attempt().clone();
        assert_eq!(again.attempt, 1);
        assert_eq!(again.replay[0], Replay { tokens: vec![7, 8], text_chars: 2, finish: None });
        assert_eq!(again.replay[1].finish, Some(Finish::Stop));

        // The old worker goes on talking; nothing of it counts, and the fingerprint stays.
        assert_eq!(flight.receive(0, tokens(0, 2, &[9], "old", None)), Effect::Ignore);
        assert_eq!(flight.receive(1, admitted("fp_2")), Effect::Ignore);
        assert_eq!(flight.admission().unwrap().fingerprint, "fp_1");
        let last = flight.receive(1, tokens(0, 2, &[9], "c", Some(Finish::Length)));
        assert_eq!(text_of(last), "c");
        assert!(flight.is_done());
    }

    #[test]
    fn losses_are_bounded_and_hand_overs_are_no_losses() {
        let mut flight = Flight::new(request(1));
        for loss in 0..LOSSES_MAX - 1 {
            assert_eq!(flight.lose(Loss::Worker), Effect::PlaceAgain, "loss {loss}");
            let attempt = flight.next_attempt().attempt;
            assert_eq!(flight.receive(attempt, Update::Moved), Effect::PlaceAgain);
            flight.next_attempt();
        }
        assert!(
            matches!(flight.lose(Loss::Worker), Effect::Fail(r) if r.kind == RefusalKind::Overloaded)
        );
    }

    #[test]
    fn lost_messages_are_borne_longer_than_lost_workers() {
        let mut flight = Flight::new(request(1));
        for _ in 1..HOLES_MAX {
            assert_eq!(flight.lose(Loss::Message), Effect::PlaceAgain);
        }
        for _ in 1..LOSSES_MAX {
            assert_eq!(flight.lose(Loss::Message), Effect::PlaceAgain, "now as lost workers");
        }
        assert!(matches!(flight.lose(Loss::Message), Effect::Fail(_)));
    }

    #[test]
    fn text_of_live_weights_goes_on_with_the_same_version_only() {
        let job = Target::Job { job_id: "ftjob-1".to_owned() };
        let mut flight = Flight::new(Request { target: job, ..request(1) });
        flight.receive(0, admitted("fp_1"));
        flight.next_attempt();
        assert_eq!(flight.receive(1, admitted("fp_1")), Effect::Ignore);
        flight.receive(1, tokens(0, 0, &[7], "a", None));
        flight.next_attempt();
        let ended = flight.receive(2, admitted("fp_2"));
        assert!(matches!(ended, Effect::Fail(r) if r.message.contains("is gone")), "{flight:?}");
    }

    #[test]
    fn a_version_that_was_told_is_the_one_that_answers() {
        let job = Target::Job { job_id: "ftjob-1".to_owned() };
        let mut flight = Flight::new(Request { target: job, ..request(1) });
        flight.receive(0, admitted("fp_1"));
        flight.next_attempt();
        // No text yet, but the head of the stream has named the version.
        let ended = flight.receive(1, admitted("fp_2"));
        assert!(matches!(ended, Effect::Fail(r) if r.message.contains("is gone")), "{flight:?}");
    }

    #[test]
    fn refusals_end_it_and_a_full_worker_does_not() {
        let refusal = |kind| Refusal { kind, message: "no".to_owned(), param: None };
        let mut flight = Flight::new(request(1));
        let full = Update::Failed(refusal(RefusalKind::Overloaded));
        assert_eq!(flight.receive(0, full), Effect::PlaceAgain);
        flight.next_attempt();
        for kind in [RefusalKind::Invalid, RefusalKind::Unavailable] {
            let last = refusal(kind);
            assert_eq!(flight.receive(1, Update::Failed(last.clone())), Effect::Fail(last));
        }
    }

    /// Random drops, repeats, delays and worker changes: what is delivered is always a prefix of
    /// the one true token sequence, and what is replayed is exactly what was delivered.
    #[test]
    fn under_any_disorder_the_client_sees_one_sequence() {
        use rand::{RngExt, SeedableRng, rngs::StdRng};
        for seed in 0..2000 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut flight = Flight::new(request(1));
            let mut seen: Vec<u32> = Vec::new();
            // Messages of any attempt that may still arrive: (attempt, first, count).
            let mut wire: Vec<(u32, u32, u32)> = Vec::new();
            flight.receive(0, admitted("fp_1"));
            for _ in 0..200 {
                let attempt = flight.request().attempt;
                let start = flight.request().replay.first().map_or(0, |r| r.tokens.len() as u32);
                let first = start + rng.random_range(0..6);
                wire.push((attempt, first, rng.random_range(1..3)));
                let at = rng.random_range(0..wire.len());
                let (attempt, first, count) =
                    if rng.random_bool(0.7) { wire.swap_remove(at) } else { wire[at] };
                let ids: Vec<u32> = (first..first + count).collect();
                match flight.receive(attempt, tokens(0, first, &ids, "t", None)) {
                    Effect::Deliver(delta) => seen.extend(delta.tokens.iter().map(|t| t.id)),
                    Effect::PlaceAgain => {
                        let replay = flight.next_attempt().replay.clone();
                        let told = replay.first().map(|r| r.tokens.clone()).unwrap_or_default();
                        assert_eq!(told, seen, "seed {seed}");
                    }
                    Effect::Ignore => {}
                    Effect::Fail(_) => break,
                    Effect::Admitted => panic!("admitted twice"),
                }
                assert!(seen.iter().copied().eq(0..seen.len() as u32), "seed {seed}: {seen:?}");
            }
        }
    }
}
