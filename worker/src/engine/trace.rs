//! A recording of what the device did and when: bounded, cheap, read when all is over.

use super::backlog::{Done, Work};
use serde_json::{Value, json};
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

    /// Takes what was recorded, in the form that Chrome's tracing page and Perfetto read: steps,
    /// slices and copies on a line each, with rows by kind and the planned time.
    pub fn take_chrome(&self) -> Value {
        let (pieces, dropped) = self.take();
        let events: Vec<Value> = pieces.iter().map(chrome_event).collect();
        json!({ "traceEvents": events, "otherData": { "dropped": dropped } })
    }

    /// Takes what was recorded, in order of the device, and how many pieces there was no room for.
    pub fn take(&self) -> (Vec<Done>, usize) {
        let recording = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        (recording.pieces, recording.dropped)
    }
}

fn chrome_event(done: &Done) -> Value {
    let (line, name, mut told) = match done.work {
        Work::Step { inference, micro } => {
            (1, "step", json!({ "inference_rows": inference, "training_rows": micro }))
        }
        Work::Loss { rows } => (2, "loss", json!({ "rows": rows })),
        Work::Layer { rows } => (2, "layer backward", json!({ "rows": rows })),
        Work::Update => (2, "optimizer step", json!({})),
        Work::Copy { bytes } => (3, "copy", json!({ "bytes": bytes })),
    };
    let micros = |secs: f64| (secs * 1e9).round() / 1e3;
    told["planned_us"] = json!(micros(done.planned));
    json!({
        "name": name, "ph": "X", "pid": 1, "tid": line,
        "ts": micros(done.start), "dur": micros(done.secs), "args": told,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_what_chrome_reads() {
        let trace = Trace::default();
        let work = Work::Step { inference: 3, micro: 40 };
        trace.clone().add(Done { work, start: 1.5, secs: 0.0025, planned: 0.002 });
        let chrome = trace.take_chrome();
        let expected = json!({
            "name": "step", "ph": "X", "pid": 1, "tid": 1, "ts": 1.5e6, "dur": 2500.0,
            "args": { "inference_rows": 3, "training_rows": 40, "planned_us": 2000.0 },
        });
        assert_eq!(chrome["traceEvents"], json!([expected]));
        assert_eq!(trace.take().0, []);
    }
}
