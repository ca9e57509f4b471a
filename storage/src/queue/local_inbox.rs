//! One worker's inbox in this process: a bounded line of requests and, before it, a bounded line
//! of control messages.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::message::{Request, ToWorker};
use super::{Controlled, Placed};

/// Both ends share this.
#[derive(Debug)]
pub(super) struct InboxState {
    lines: Mutex<Lines>,
    /// Something was put in, or the inbox closed.
    filled: Notify,
    /// Control messages were taken out, or the inbox closed.
    drained: Notify,
    requests_max: usize,
    controls_max: usize,
}

#[derive(Debug, Default)]
struct Lines {
    controls: VecDeque<ToWorker>,
    requests: VecDeque<Box<Request>>,
    closed: bool,
}

impl InboxState {
    pub(super) fn new(requests_max: usize, controls_max: usize) -> Arc<Self> {
        Arc::new(Self {
            lines: Mutex::default(),
            filled: Notify::new(),
            drained: Notify::new(),
            requests_max,
            controls_max,
        })
    }

    /// Every change leaves the lines whole, so a panic elsewhere does not spoil them.
    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn place(&self, request: Request) -> Placed {
        let mut lines = self.lines();
        if lines.closed {
            return Placed::Gone;
        }
        if lines.requests.len() >= self.requests_max {
            return Placed::Full;
        }
        lines.requests.push_back(Box::new(request));
        drop(lines);
        self.filled.notify_one();
        Placed::Accepted
    }

    /// Waits for room; a message that is waiting already is not put in twice.
    pub(super) async fn control(&self, message: ToWorker) -> Controlled {
        loop {
            // Armed before the look, so that a drain between the two is not missed.
            let drained = self.drained.notified();
            {
                let mut lines = self.lines();
                if lines.closed {
                    return Controlled::Gone;
                }
                if let ToWorker::Cancel { request_id, attempt } = &message {
                    let waiting = lines.requests.len();
                    lines.requests.retain(|request| {
                        request.request_id != *request_id || request.attempt > *attempt
                    });
                    if lines.requests.len() < waiting {
                        return Controlled::Sent;
                    }
                }
                let known = lines.controls.contains(&message);
                if known || lines.controls.len() < self.controls_max {
                    if !known {
                        lines.controls.push_back(message);
                    }
                    drop(lines);
                    self.filled.notify_one();
                    return Controlled::Sent;
                }
            }
            drained.await;
        }
    }

    /// Ends the inbox for both sides; what waits in it is dropped.
    pub(super) fn close(&self) {
        let mut lines = self.lines();
        *lines = Lines { closed: true, ..Lines::default() };
        drop(lines);
        self.filled.notify_one();
        self.drained.notify_waiters();
    }
}

/// The worker's end.
#[derive(Debug)]
pub(super) struct InboxEnd {
    state: Arc<InboxState>,
}

impl InboxEnd {
    pub(super) fn new(state: Arc<InboxState>) -> Self {
        Self { state }
    }

    fn try_recv(&mut self) -> Option<ToWorker> {
        let mut lines = self.state.lines();
        if let Some(control) = lines.controls.pop_front() {
            drop(lines);
            self.state.drained.notify_waiters();
            return Some(control);
        }
        lines.requests.pop_front().map(ToWorker::Place)
    }

    pub(super) async fn recv(&mut self) -> Option<ToWorker> {
        loop {
            if let Some(message) = self.try_recv() {
                return Some(message);
            }
            if self.state.lines().closed {
                return None;
            }
            // One receiver: a notification sent before this wait is kept for it.
            self.state.filled.notified().await;
        }
    }
}

impl Drop for InboxEnd {
    fn drop(&mut self) {
        self.state.close();
    }
}
