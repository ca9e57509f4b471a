//! The HTTP side: requests in, OpenAI's replies out. Knows keys, limits, names and placement;
//! knows no model, no tokenizer and no device.
//!
//! - [`router`]: the whole API on one page; `routes/*` are its handlers, `wire/*` its JSON.
//! - `border`, `auth`, `limits`, `body`: what every request passes.
//! - `inference`, [`flight`], `relay`, [`switchboard`], [`strays`], [`placement`]: from a request
//!   to tokens, across workers; the linked ones are plain data, which the simulator drives too.
//! - `sse`: those tokens as a stream.
//! - [`serve()`] holds the connections.

mod aim;
mod auth;
mod body;
mod border;
mod config;
pub mod error;
mod feed;
pub mod flight;
mod gateway;
pub mod import;
mod inference;
mod ledger;
mod limits;
mod lines;
mod metrics;
mod multipart;
mod names;
pub mod placement;
mod relay;
pub mod router;
mod routes;
mod serve;
mod sse;
pub mod strays;
pub mod switchboard;
mod tar;
pub mod wire;

pub use border::Peer;
pub use config::{GatewayConfig, RateLimits};
pub use gateway::Gateway;
pub use import::{AdapterCheck, CheckRefusal, CheckedAdapter};
pub use router::{app, openapi, openapi_json};
pub use serve::serve;
