//! From a launched step to what clients see: tokens are taken when they have come, the next step
//! may be launched, and only then their text is made and sent.

use super::Engine;
use super::command::{Drawn, Finish, Output};
use super::scheduler::{Plan, Share};
use super::sequence::{Sequence, SequenceId};
use crate::model::Sampled;
use kernels::{Device, Result};

/// A launched step whose tokens have not been taken.
pub(super) struct Flight {
    pub(super) plan: Plan,
    pub(super) sampled: Option<Sampled>,
    /// Alternatives per drawn row.
    pub(super) top: usize,
}

/// A drawn token whose text has not been made.
pub(super) struct Taken {
    id: SequenceId,
    /// Its sequence, where the token was its last.
    ended: Option<Sequence>,
    index: u32,
    token: u32,
    finish: Option<Finish>,
    /// Its log-probability and alternatives, where wanted.
    logprob: Option<(f32, Vec<(u32, f32)>)>,
}

impl Flight {
    /// Whether its tokens have come.
    pub(super) fn is_ready(&self) -> bool {
        self.sampled.as_ref().is_none_or(|sampled| {
            sampled.tokens.is_ready()
                && sampled.logprobs.is_ready()
                && sampled.top_ids.is_ready()
                && sampled.top_logprobs.is_ready()
        })
    }
}

impl<D: Device> Engine<D> {
    /// Waits for the tokens of the step in flight and gives each sequence its own, so that the next
    /// step can be planned. Sequences that were cancelled meanwhile get nothing.
    pub(super) fn take(&mut self) -> Result<()> {
        let Some(Flight { plan, sampled, top }) = self.flight.take() else { return Ok(()) };
        for share in &plan.shares {
            if let Some(sequence) = self.scheduler.get_mut(share.id) {
                sequence.cached += share.rows;
            }
        }
        let Some(sampled) = sampled else { return Ok(()) };
        let tokens = sampled.tokens.wait()?;
        let rows = Rows {
            logprobs: sampled.logprobs.wait()?,
            top_ids: sampled.top_ids.wait()?,
            top_logprobs: sampled.top_logprobs.wait()?,
            top,
        };
        let drawing = plan.shares.iter().filter(|share| share.sample);
        for (row, share) in drawing.enumerate() {
            self.take_token(share, tokens[row] as u32, &rows, row)?;
        }
        Ok(())
    }

    fn take_token(&mut self, share: &Share, token: u32, rows: &Rows, row: usize) -> Result<()> {
        let Some(sequence) = self.scheduler.get_mut(share.id) else { return Ok(()) };
        let wanted = sequence.shared.sampling.logprobs;
        let logprob = wanted.map(|wanted| rows.told(row, usize::from(wanted)));
        let (index, finish) = sequence.append(token);
        let ended = match finish {
            Some(_) => self.release(share.id)?,
            None => None,
        };
        self.taken.push(Taken { id: share.id, ended, index, token, finish, logprob });
        Ok(())
    }

    /// Makes the text of the tokens taken, looks for stop texts, and sends what became certain. A
    /// sequence that ends by a stop text may have a step in flight; what that draws is dropped.
    pub(super) fn hand_out(&mut self) -> Result<()> {
        let mut taken = std::mem::take(&mut self.taken);
        for mut token in taken.drain(..) {
            let sequence = match &mut token.ended {
                Some(sequence) => Some(sequence),
                None => self.scheduler.get_mut(token.id),
            };
            let Some(sequence) = sequence else { continue };
            let bytes = match &token.logprob {
                Some(_) => sequence.detokenizer.bytes_of(token.token).to_vec(),
                None => Vec::new(),
            };
            let (text, finish) = sequence.speak(token.index, token.token, token.finish);
            let output = Output::Tokens {
                choice: sequence.choice,
                first: token.index,
                tokens: vec![Drawn { id: token.token, bytes, logprob: token.logprob }],
                text,
                finish,
            };
            self.outputs.push((sequence.shared.request, output));
            if finish.is_some() && token.ended.is_none() {
                self.release(token.id)?;
            }
        }
        self.taken = taken;
        self.flush();
        Ok(())
    }
}

/// What a step tells beside its tokens.
struct Rows {
    logprobs: Vec<f32>,
    top_ids: Vec<i32>,
    top_logprobs: Vec<f32>,
    top: usize,
}

impl Rows {
    /// Log-probability of a row's token and the `wanted` likeliest ones.
    fn told(&self, row: usize, wanted: usize) -> (f32, Vec<(u32, f32)>) {
        let range = row * self.top..row * self.top + wanted;
        let ids = self.top_ids[range.clone()].iter().map(|id| *id as u32);
        (self.logprobs[row], ids.zip(self.top_logprobs[range].iter().copied()).collect())
    }
}
