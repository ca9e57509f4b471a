//! The JSON of the HTTP API, both ways: parsing with path-aware errors, and the reply types the
//! OpenAPI document is made of. Nothing here touches storage or the queue's transport.

pub mod adapter;
pub mod chat;
pub mod completion;
pub mod fields;
pub mod file;
pub mod generation;
pub mod hyperparameters;
pub mod job;
pub mod list;
pub mod logprobs;
pub mod message;
pub mod model;
pub mod reply;
pub mod request;
pub mod training;
