//! What whole-system tests share. The tests themselves are in the folders beside this one.

// For tests alone: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

pub mod proxy;
