//! A recording of what the device did and when: bounded, cheap, read when all is over.

use super::backlog::Done;
use std::sync::{Arc, Mutex, PoisonError};

/// Pieces kept; what comes later is counted only.
const PIECES_MAX: usize = 1 << 20;

/// A recorder; clones share one recording.
#[derive(Clone, Debug, Default)]
pub struct Trace(Arc<Mutex<Recording>>);

#[derive(Debug, Default)]
struct Recording {
    pieces: Vec<Done>,
    dropped: usize,
}

impl Trace {
    /// Adds a piece of work that has ended.
    pub(super) fn add(&self, done: Done) {
        let mut recording = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match recording.pieces.len() < PIECES_MAX {
            true => recording.pieces.push(done),
            false => recording.dropped += 1,
        }
    }

    /// Takes what was recorded, in order of the device, and how many pieces there was no room for.
    pub fn take(&self) -> (Vec<Done>, usize) {
        let recording = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        (recording.pieces, recording.dropped)
    }
}
