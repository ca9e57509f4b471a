//! Decoding and prefill, timed by when the engine hands tokens out.

use super::args::Grid;
use super::rig::Rig;
use anyhow::Context;
use std::time::{Duration, Instant};
use worker::engine::command::{Event, Output};

/// Sequences that decode together.
#[derive(Clone, Copy, Debug)]
pub struct Decoding {
    /// How many.
    pub sequences: usize,
    /// Adapters they are spread over; 0: the base.
    pub adapters: usize,
    /// Rank of the adapters.
    pub rank: usize,
    /// Tokens of each prompt.
    pub prompt: usize,
    /// Tokens generated for each.
    pub output: usize,
}

/// What decoding came to.
#[derive(Clone, Copy, Debug)]
pub struct Decoded {
    /// Median time of a step in which all sequences decode.
    pub step: Duration,
    /// The time that 99 of 100 such steps keep.
    pub p99: Duration,
    /// Steps measured.
    pub steps: usize,
}

impl Decoded {
    /// Tokens per second of all sequences together.
    pub fn tokens_per_sec(&self, sequences: usize) -> f64 {
        sequences as f64 / self.step.as_secs_f64()
    }
}

/// One round to warm up, then `repeats` measured.
pub fn decode(rig: &mut Rig, what: &Decoding, repeats: usize) -> anyhow::Result<Decoded> {
    decode_round(rig, what)?;
    let mut steps = Vec::new();
    for _ in 0..repeats {
        steps.extend(decode_round(rig, what)?);
    }
    steps.sort_unstable();
    let step = median(&steps).context("no step in which all sequences decoded")?;
    Ok(Decoded {
        step,
        p99: steps[(steps.len() * 99 / 100).min(steps.len() - 1)],
        steps: steps.len(),
    })
}

/// Times of the steps that gave every sequence a token, as did the step before.
fn decode_round(rig: &mut Rig, what: &Decoding) -> anyhow::Result<Vec<Duration>> {
    for index in 0..what.sequences {
        let target = rig.target(index, what.adapters, what.rank);
        let request = rig.request(target, what.prompt, what.output);
        rig.send(request)?;
    }
    let mut steps = Vec::new();
    let mut last: Option<Instant> = None;
    let mut finished = 0;
    while finished < what.sequences {
        let (at, tokens, ended) = outputs(rig)?;
        finished += ended;
        if tokens == 0 {
            continue; // An admission, not a step.
        }
        let whole = tokens == what.sequences;
        if let (true, Some(before)) = (whole, last) {
            steps.push(at - before);
        }
        last = whole.then_some(at);
    }
    Ok(steps)
}

/// Waits for the next outputs: when, how many tokens, how many sequences ended.
fn outputs(rig: &mut Rig) -> anyhow::Result<(Instant, usize, usize)> {
    loop {
        let (at, event) = rig.next()?;
        let Event::Outputs(outputs) = event else { continue };
        let (mut count, mut ended) = (0, 0);
        for (_, output) in &outputs {
            if let Output::Tokens { tokens, finish, .. } = output {
                count += tokens.len();
                ended += usize::from(finish.is_some());
            }
        }
        return Ok((at, count, ended));
    }
}

/// Median time from the first prompt sent to the last first token, after a round to warm up.
pub fn prefill(
    rig: &mut Rig,
    shape: Grid,
    adapters: usize,
    rank: usize,
    repeats: usize,
) -> anyhow::Result<Duration> {
    let mut times = Vec::new();
    for round in 0..=repeats {
        let mut requests = Vec::with_capacity(shape.count);
        for index in 0..shape.count {
            let target = rig.target(index, adapters, rank);
            requests.push(rig.request(target, shape.length, 1));
        }
        let start = Instant::now();
        for request in requests {
            rig.send(request)?;
        }
        let mut finished = 0;
        let mut end = start;
        while finished < shape.count {
            let (at, _, ended) = outputs(rig)?;
            (end, finished) = (at, finished + ended);
        }
        if round > 0 {
            times.push(end - start);
        }
    }
    times.sort_unstable();
    median(&times).context("no round was measured")
}

/// Middle of sorted times.
pub fn median<T: Copy>(sorted: &[T]) -> Option<T> {
    sorted.get(sorted.len() / 2).copied()
}
