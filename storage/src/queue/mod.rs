//! The queue between gateways and workers: inboxes, token messages, presence.

pub mod message;
