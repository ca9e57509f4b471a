//! Continuous batching: which sequences get rows in the next step. Plain data, no device.
//!
//! Order: running sequences first (each one row, or its next prefill chunk), then waiting ones in
//! order of arrival while rows, sequences and blocks last. A running sequence that finds no block
//! displaces the youngest running one, which starts over later; what it has generated stays, and
//! as drawing depends on seed and position only, it goes on with the same tokens.

use super::blocks::BlockPool;
use super::sequence::{Sequence, SequenceId};
use std::collections::{BTreeMap, VecDeque};

/// Limits of one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepLimits {
    /// Rows of all kinds.
    pub rows: usize,
    /// Rows that may be sampled.
    pub sample_rows: usize,
    /// Sequences at once.
    pub sequences: usize,
    /// Pairs of token and count that running sequences may come to need for penalties.
    pub history: usize,
}

/// Rows of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Whose.
    pub id: SequenceId,
    /// Position of the first row.
    pub first: usize,
    /// Number of rows.
    pub rows: usize,
    /// The last row's next token is drawn.
    pub sample: bool,
}

/// Sequences in the engine that have their adapter.
#[derive(Default)]
pub struct Scheduler {
    sequences: BTreeMap<SequenceId, Sequence>,
    waiting: VecDeque<SequenceId>,
    running: Vec<SequenceId>,
    next: SequenceId,
}

impl Scheduler {
    /// Queues a sequence.
    pub fn add(&mut self, sequence: Sequence) -> SequenceId {
        let id = self.next;
        self.next += 1;
        self.sequences.insert(id, sequence);
        self.waiting.push_back(id);
        id
    }

    /// Whether nothing runs or waits.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Sequences running or waiting.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// A sequence by number.
    pub fn get(&self, id: SequenceId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// A sequence by number.
    pub fn get_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        self.sequences.get_mut(&id)
    }

    /// Numbers of all sequences that satisfy `which`.
    pub fn select(&self, which: impl Fn(&Sequence) -> bool) -> Vec<SequenceId> {
        self.sequences.iter().filter(|(_, s)| which(s)).map(|(id, _)| *id).collect()
    }

    /// Takes a sequence out; the caller returns its blocks and slot.
    pub fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        self.waiting.retain(|other| *other != id);
        self.running.retain(|other| *other != id);
        self.sequences.remove(&id)
    }

    /// Plans the next step, taking blocks for the planned rows.
    pub fn plan(&mut self, pool: &mut BlockPool, limits: StepLimits) -> Plan {
        let mut plan = Plan { left: limits, ..Plan::default() };
        self.plan_running(pool, &mut plan, true);
        self.plan_running(pool, &mut plan, false);
        let running = self.running.iter().filter_map(|id| self.sequences.get(id));
        let mut history: usize = running.map(Sequence::history_bound).sum();
        while plan.left.rows > 0 && self.running.len() < limits.sequences {
            let Some(&id) = self.waiting.front() else { break };
            let Some(sequence) = self.sequences.get_mut(&id) else { break };
            // Enough for the whole prompt and a first token, so that admission does not lead
            // straight to a displacement.
            let rows = (sequence.tokens.len() + 1).min(sequence.max_len);
            let pairs = sequence.history_bound();
            if pool.needed(rows) > pool.free()
                || history + pairs > limits.history
                || !plan.place(id, sequence, pool)
            {
                break;
            }
            history += pairs;
            self.waiting.pop_front();
            self.running.push(id);
        }
        // Rows of one adapter stand together: they are one segment, whose weights are read once.
        plan.shares.sort_by_key(|share| self.sequences.get(&share.id).and_then(|s| s.slot));
        plan
    }

    /// Rows of running sequences: those that decode, or those that still prefill.
    fn plan_running(&mut self, pool: &mut BlockPool, plan: &mut Plan, decodes: bool) {
        let mut at = 0;
        while at < self.running.len() && plan.left.rows > 0 {
            let id = self.running[at];
            let Some(sequence) = self.sequences.get_mut(&id) else { break };
            if sequence.decodes() != decodes || plan.shares.iter().any(|share| share.id == id) {
                at += 1;
                continue;
            }
            if plan.left.sample_rows == 0 {
                break;
            }
            if plan.place(id, sequence, pool) {
                at += 1;
                continue;
            }
            let Some(&youngest) = self.running.last() else { break };
            self.displace(youngest, pool, plan);
            if youngest == id {
                break;
            }
        }
    }

    /// Takes all blocks from a running sequence and queues it first.
    fn displace(&mut self, id: SequenceId, pool: &mut BlockPool, plan: &mut Plan) {
        self.running.retain(|other| *other != id);
        self.waiting.push_front(id);
        plan.withdraw(id);
        plan.displaced += 1;
        if let Some(sequence) = self.sequences.get_mut(&id) {
            let blocks = std::mem::take(&mut sequence.blocks);
            plan.freed.extend(&blocks);
            pool.give(blocks);
            sequence.cached = 0;
        }
    }
}

/// What a step will compute for sequences.
#[derive(Debug, Default)]
pub struct Plan {
    /// Rows per sequence, in batch order.
    pub shares: Vec<Share>,
    /// Blocks that displaced sequences left.
    pub freed: Vec<u32>,
    /// Sequences that were displaced.
    pub displaced: usize,
    left: StepLimits,
}

impl Plan {
    /// Rows planned.
    pub fn rows(&self) -> usize {
        self.shares.iter().map(|share| share.rows).sum()
    }

    /// Gives a sequence its next rows. False: no blocks for them, or no row or sample left.
    fn place(&mut self, id: SequenceId, sequence: &mut Sequence, pool: &mut BlockPool) -> bool {
        let rows = sequence.pending().min(self.left.rows);
        let sample = rows == sequence.pending();
        if rows == 0 || (sample && self.left.sample_rows == 0) {
            return false;
        }
        if !pool.extend(&mut sequence.blocks, sequence.cached + rows) {
            return false;
        }
        self.left.rows -= rows;
        self.left.sample_rows -= usize::from(sample);
        self.shares.push(Share { id, first: sequence.cached, rows, sample });
        true
    }

    fn withdraw(&mut self, id: SequenceId) {
        if let Some(at) = self.shares.iter().position(|share| share.id == id) {
            let share = self.shares.remove(at);
            self.left.rows += share.rows;
            self.left.sample_rows += usize::from(share.sample);
        }
    }
}
