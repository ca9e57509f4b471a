//! Runs inference requests: places them, waits for admission, follows their tokens across workers,
//! and ends them when nobody reads any more. Knows neither HTTP nor JSON.

use std::sync::Arc;
use std::time::Duration;

use storage::queue::Placed;
use storage::queue::message::{Refusal, RefusalKind, Request, Target, WorkerPresence};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::aim::{Aim, Hints};
use crate::flight::{Admission, Delta, Effect, Flight, Loss};
use crate::gateway::Gateway;
use crate::placement::{Wish, candidates};
use crate::relay::{ALL_ATTEMPTS, Relay, Signal};

/// Pause between two looks for another worker of an open stream, and before a placement that
/// several workers have refused.
const REPLACEMENT_PAUSE: Duration = Duration::from_millis(250);

/// A cancel that a busy worker does not take within this is left to the presence of this gateway.
const CANCEL_PATIENCE: Duration = Duration::from_secs(1);

/// An admitted request.
pub struct Running {
    gateway: Arc<Gateway>,
    flight: Flight,
    hints: Hints,
    signals: mpsc::Receiver<Signal>,
    hold: Hold,
    /// When the attempt that counts was put into an inbox.
    placed: Instant,
    over: bool,
}

/// Where a candidate is.
struct Address {
    worker_id: String,
    incarnation: String,
}

/// What placing has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tried {
    Placed,
    /// No worker is a candidate.
    Nobody,
    /// None has room.
    Busy,
    /// None has room, and some are gone.
    Gone,
}

/// Where the request runs; dropped before its end, it cancels there.
struct Hold {
    relay: Arc<Relay>,
    request_id: String,
    worker_id: Option<String>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.relay.close(&self.request_id);
        let Some(worker_id) = self.worker_id.take() else { return };
        let (relay, request_id) = (Arc::clone(&self.relay), std::mem::take(&mut self.request_id));
        // Without a runtime the process is ending, and with it this gateway's presence.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                relay.cancel(&worker_id, &request_id, ALL_ATTEMPTS).await;
            });
        }
    }
}

impl Running {
    /// Places the request and waits until a worker has admitted it.
    pub async fn start(
        gateway: &Arc<Gateway>,
        request: Request,
        hints: Hints,
    ) -> Result<Running, Refusal> {
        let relay = Arc::clone(gateway.relay());
        let signals = relay.open(&request.request_id);
        let hold = Hold { relay, request_id: request.request_id.clone(), worker_id: None };
        let gateway = Arc::clone(gateway);
        let flight = Flight::new(request);
        let placed = Instant::now();
        let mut running = Running { gateway, flight, hints, signals, hold, placed, over: false };
        let deadline = placed + running.gateway.config().admission_timeout;
        running.place().await?;
        loop {
            let signal = timeout_at(deadline, running.signals.recv());
            let Ok(signal) = signal.await else {
                return Err(overloaded("No worker admitted the request in time."));
            };
            match running.take(signal) {
                Effect::Admitted => return Ok(running),
                Effect::PlaceAgain => {
                    running.rest().await;
                    running.aim_again().await?;
                    running.flight.next_attempt();
                    running.place().await?;
                }
                Effect::Fail(refusal) => return Err(refusal),
                Effect::Ignore | Effect::Deliver(_) => {}
            }
        }
    }

    /// What its admission told.
    pub fn admission(&self) -> Admission {
        // Only an admitted request leaves `start`.
        self.flight.admission().cloned().expect("admitted")
    }

    /// The next tokens; None once every choice has ended.
    pub async fn next(&mut self) -> Option<Result<Delta, Refusal>> {
        while !self.over {
            match self.hear().await {
                Effect::Deliver(delta) => {
                    if self.flight.is_done() {
                        self.finish();
                    }
                    return Some(Ok(delta));
                }
                Effect::PlaceAgain => {
                    if let Err(refusal) = self.place_again().await {
                        self.finish();
                        return Some(Err(refusal));
                    }
                }
                Effect::Fail(refusal) => {
                    self.finish();
                    return Some(Err(refusal));
                }
                Effect::Ignore | Effect::Admitted => {}
            }
        }
        None
    }

    /// The next signal, or that the placement got no answer: an inbox can be lost unseen.
    async fn hear(&mut self) -> Effect {
        if !self.flight.is_waiting() {
            let signal = self.signals.recv().await;
            return self.take(signal);
        }
        let deadline = self.placed + self.gateway.config().admission_timeout;
        match timeout_at(deadline, self.signals.recv()).await {
            Ok(signal) => self.take(signal),
            Err(_) => self.flight.lose(Loss::Worker),
        }
    }

    fn finish(&mut self) {
        self.over = true;
        if self.flight.is_done() {
            // The worker has forgotten it already.
            self.hold.worker_id = None;
        }
    }

    fn take(&mut self, signal: Option<Signal>) -> Effect {
        match signal {
            Some(Signal::Update { attempt, update }) => self.flight.receive(attempt, update),
            Some(Signal::Lost { attempt, loss }) if attempt == self.flight.request().attempt => {
                self.flight.lose(loss)
            }
            Some(Signal::Lost { .. }) => Effect::Ignore,
            None => Effect::Fail(Refusal {
                kind: RefusalKind::Overloaded,
                message: "The reply was read too slowly and has been ended.".to_owned(),
                param: None,
            }),
        }
    }

    /// Puts the request into an inbox. At first by the workers as they were seen lately: one of
    /// them that has gone, or has no room, says so then, and its going is reason to look again.
    async fn place(&mut self) -> Result<(), Refusal> {
        let queue = Arc::clone(&self.gateway.storage().queue);
        let mut tried = Tried::Gone;
        if self.flight.request().attempt == 0 {
            let order = self.order(&queue.workers_lately().await.map_err(unreachable_queue)?);
            tried = self.place_among(order).await?;
        }
        if matches!(tried, Tried::Nobody | Tried::Gone) {
            let order = self.order(&queue.workers().await.map_err(unreachable_queue)?);
            tried = self.place_among(order).await?;
        }
        match tried {
            Tried::Placed => Ok(()),
            Tried::Nobody => {
                let base = &self.flight.request().base;
                Err(overloaded(format!("No worker serves the base `{base}` at the moment.")))
            }
            Tried::Busy | Tried::Gone => {
                Err(overloaded("All workers are busy. Try again in a moment."))
            }
        }
    }

    /// Candidates, best first.
    fn order(&self, workers: &[WorkerPresence]) -> Vec<Address> {
        let request = self.flight.request();
        let wish = Wish {
            base: &request.base,
            base_fingerprint: self.hints.base_fingerprint.as_deref(),
            target: &request.target,
            owner: self.hints.owner.as_deref(),
            avoid: self.hold.worker_id.as_deref(),
        };
        let address = |worker: &WorkerPresence| Address {
            worker_id: worker.worker_id.clone(),
            incarnation: worker.incarnation.clone(),
        };
        candidates(workers, &wish, &mut rand::rng()).into_iter().map(address).collect()
    }

    /// Tries the inbox of each candidate in turn. Each try is an attempt of its own: one that
    /// failed may have come through all the same.
    async fn place_among(&mut self, order: Vec<Address>) -> Result<Tried, Refusal> {
        let queue = Arc::clone(&self.gateway.storage().queue);
        let before = self.hold.worker_id.take();
        let request = self.flight.request();
        let mut tried = Tried::Nobody;
        if let Some(before) = before.filter(|_| !order.is_empty()) {
            // It may still be computing; and where it is the only worker, it must forget the old
            // attempt before it sees the new one.
            let earlier = request.attempt.saturating_sub(1);
            let cancel = self.hold.relay.cancel(&before, &request.request_id, earlier);
            if timeout(CANCEL_PATIENCE, cancel).await.is_err() {
                tracing::warn!(worker.id = before, "a worker takes no cancel");
            }
        }
        for Address { worker_id, incarnation } in order {
            let request = self.flight.request();
            let (id, attempt) = (&request.request_id, request.attempt);
            self.hold.relay.expect(id, attempt, &worker_id, &incarnation);
            self.hold.worker_id = Some(worker_id.clone());
            let placed = queue.place(&worker_id, request.clone()).await;
            tried = match placed.map_err(unreachable_queue)? {
                Placed::Accepted => {
                    self.placed = Instant::now();
                    return Ok(Tried::Placed);
                }
                Placed::Gone => Tried::Gone,
                Placed::Full if tried == Tried::Gone => Tried::Gone,
                Placed::Full => Tried::Busy,
            };
            self.hold.worker_id = None;
            self.flight.next_attempt();
        }
        Ok(tried)
    }

    /// Workers that refuse one after the other are given time, so that a request does not go
    /// round among them.
    async fn rest(&self) {
        sleep(REPLACEMENT_PAUSE * self.flight.rests()).await;
    }

    /// What a job's id means can have changed since it was asked for: it has another owner, or it
    /// has ended and its id means its final adapter, or nothing.
    async fn aim_again(&mut self) -> Result<(), Refusal> {
        let request = self.flight.request();
        let Target::Job { job_id } = &request.target else { return Ok(()) };
        match self.gateway.look_up(&request.org, job_id).await {
            Ok(Some(resolved)) => {
                let aim = Aim::at(resolved, job_id.clone());
                self.flight.retarget(Some(aim.target))?;
                self.hints = aim.hints;
                Ok(())
            }
            Ok(None) => self.flight.retarget(None),
            Err(error) => {
                tracing::debug!(%error, "a job cannot be looked at; it is taken as it was");
                Ok(())
            }
        }
    }

    /// Moves an admitted request to another worker; looks for one for a while.
    async fn place_again(&mut self) -> Result<(), Refusal> {
        let deadline = Instant::now() + self.gateway.config().replacement_timeout;
        metrics::counter!("loquetier_replacements_total").increment(1);
        self.rest().await;
        loop {
            self.aim_again().await?;
            self.flight.next_attempt();
            match self.place().await {
                Ok(()) => return Ok(()),
                Err(refusal) if Instant::now() >= deadline => return Err(refusal),
                Err(_) => sleep(REPLACEMENT_PAUSE).await,
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(admission) = self.flight.admission() {
            let prompt_tokens = u64::from(admission.prompt_tokens);
            let request = self.flight.request();
            self.gateway.account(
                request,
                &self.hints.model,
                prompt_tokens,
                self.flight.completion_tokens(),
            );
        }
    }
}

fn overloaded(message: impl Into<String>) -> Refusal {
    Refusal { kind: RefusalKind::Overloaded, message: message.into(), param: None }
}

fn unreachable_queue(error: storage::Error) -> Refusal {
    tracing::error!(%error, "the queue cannot be reached");
    overloaded("The queue cannot be reached at the moment.")
}
