//! The name of every key in Redis, all under one prefix.
//!
//! | key | kind | what it holds | ends |
//! |---|---|---|---|
//! | `P:workers`, `P:gateways` | set | ids that may be alive | stays; the dead are taken out |
//! | `P:worker:ID` | hash | `token`, `presence`, bounds of the inbox | presence expiry |
//! | `P:inbox:ID:TOKEN:requests` | list | `ATTEMPT:REQUEST` in order | [`LINGER`] |
//! | `P:inbox:ID:TOKEN:bodies` | hash | `ATTEMPT:REQUEST` → envelope | [`LINGER`] |
//! | `P:inbox:ID:TOKEN:seen:ATTEMPT:REQUEST` | text | placed lately: no repeat | [`SEEN`] |
//! | `P:inbox:ID:TOKEN:controls` | list | envelopes | [`LINGER`] |
//! | `P:inbox:ID:TOKEN:handed` | hash | what the worker took last, by number | [`LINGER`] |
//! | `P:inbox:ID:TOKEN:bell` | list | one element while something may wait | [`LINGER`] |
//! | `P:gateway:ID` | hash | `token`, bound of the stream | presence expiry |
//! | `P:tokens:ID:TOKEN` | stream | `m` → envelope; an entry with `end` is the last | [`LINGER`] |
//!
//! TOKEN is drawn anew by each opening, so what is left of an earlier one is never read by the
//! next. The scripts form these names from the stems below; a Redis Cluster is not supported.

use std::time::Duration;

/// How long what waits outlives the last sign of life of its reader: a worker that was stopped
/// past its presence and goes on finds its inbox, one that died leaves nothing for ever.
pub(super) const LINGER: Duration = Duration::from_secs(60);

/// How long a placement is remembered; longer than any call is tried.
pub(super) const SEEN: Duration = Duration::from_secs(30);

/// Forms names.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    prefix: String,
}

impl Keys {
    pub(super) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    pub(super) fn workers(&self) -> String {
        format!("{}:workers", self.prefix)
    }

    /// An id makes it the key of that worker.
    pub(super) fn worker_stem(&self) -> String {
        format!("{}:worker:", self.prefix)
    }

    pub(super) fn worker(&self, id: &str) -> String {
        format!("{}{id}", self.worker_stem())
    }

    /// A token makes it the stem of one inbox.
    pub(super) fn inbox_stem(&self, id: &str) -> String {
        format!("{}:inbox:{id}:", self.prefix)
    }

    pub(super) fn bell(&self, id: &str, token: &str) -> String {
        format!("{}{token}:bell", self.inbox_stem(id))
    }

    pub(super) fn gateways(&self) -> String {
        format!("{}:gateways", self.prefix)
    }

    /// An id makes it the key of that gateway.
    pub(super) fn gateway_stem(&self) -> String {
        format!("{}:gateway:", self.prefix)
    }

    pub(super) fn gateway(&self, id: &str) -> String {
        format!("{}{id}", self.gateway_stem())
    }

    /// A token makes it one stream.
    pub(super) fn tokens_stem(&self, id: &str) -> String {
        format!("{}:tokens:{id}:", self.prefix)
    }

    pub(super) fn tokens(&self, id: &str, token: &str) -> String {
        format!("{}{token}", self.tokens_stem(id))
    }
}
