//! Tests over the fixtures of `worker/tests/fixtures/text`.

mod encoding;
mod faults;
