//! Sampling parameters of a step's due rows, in the form the device reads.

use super::scheduler::{Plan, Scheduler};
use super::sequence::Sequence;
use crate::model::SampleRows;
use kernels::tables::SampleRow;
use std::collections::BTreeMap;

/// A bias that bans a token.
const BAN: f32 = -100.0;

/// Fills `rows` for every share of the plan that draws a token, in plan order.
pub fn fill(rows: &mut SampleRows, plan: &Plan, scheduler: &Scheduler) {
    let SampleRows { wide, int, history, bias_ids, bias, top, logprobs } = rows;
    for list in [&mut *int, history, bias_ids] {
        list.clear();
    }
    wide.clear();
    bias.clear();
    (*top, *logprobs) = (0, false);
    for share in plan.shares.iter().filter(|share| share.sample) {
        if let Some(sequence) = scheduler.get(share.id) {
            push(rows, sequence);
        }
    }
}

fn push(rows: &mut SampleRows, sequence: &Sequence) {
    let sampling = &sequence.shared.sampling;
    let mut wide = [0.0; SampleRow::WIDE];
    wide[SampleRow::TEMPERATURE] = sampling.temperature;
    wide[SampleRow::TOP_P] = sampling.top_p;
    wide[SampleRow::MIN_P] = sampling.min_p;
    wide[SampleRow::PRESENCE] = sampling.presence_penalty;
    wide[SampleRow::FREQUENCY] = sampling.frequency_penalty;
    wide[SampleRow::REPETITION] = sampling.repetition_penalty;
    rows.wide.extend_from_slice(&wide);

    let seed = choice_seed(sampling.seed, sequence.choice);
    let mut int = [0; SampleRow::INT];
    int[SampleRow::SEED_LO] = seed as u32 as i32;
    int[SampleRow::SEED_HI] = (seed >> 32) as u32 as i32;
    int[SampleRow::POSITION] = sequence.generated() as i32;
    int[SampleRow::TOP_K] = sampling.top_k as i32;
    int[SampleRow::HISTORY] = (rows.history.len() / 2) as i32;
    int[SampleRow::BIAS] = rows.bias.len() as i32;
    if sequence.penalised() {
        push_history(rows, sequence);
    }
    for &(id, bias) in &sampling.logit_bias {
        rows.bias_ids.push(id as i32);
        rows.bias.push(bias);
    }
    if sequence.generated() < sequence.shared.min_tokens as usize {
        for &id in &sequence.shared.end_tokens {
            rows.bias_ids.push(id as i32);
            rows.bias.push(BAN);
        }
    }
    int[SampleRow::HISTORY_LEN] = (rows.history.len() / 2) as i32 - int[SampleRow::HISTORY];
    int[SampleRow::BIAS_LEN] = rows.bias.len() as i32 - int[SampleRow::BIAS];
    rows.int.extend_from_slice(&int);
    rows.top = rows.top.max(usize::from(sampling.logprobs.unwrap_or(0)));
    rows.logprobs |= sampling.logprobs.is_some();
}

fn push_history(rows: &mut SampleRows, sequence: &Sequence) {
    let mut counts: BTreeMap<u32, i32> = BTreeMap::new();
    for (at, token) in sequence.tokens.iter().enumerate() {
        *counts.entry(*token).or_default() += i32::from(at >= sequence.prompt_len);
    }
    for (token, count) in counts {
        rows.history.extend_from_slice(&[token as i32, count]);
    }
}

/// Seed of one choice: a SplitMix64 step (Steele, Lea & Flood 2014) from the request's seed, so
/// that choices draw independently and each is a pure function of (seed, choice, position).
fn choice_seed(seed: i64, choice: u32) -> u64 {
    let mut z =
        (seed as u64).wrapping_add(0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(choice as u64 + 1));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::choice_seed;
    use std::collections::HashSet;

    #[test]
    fn choices_draw_from_different_streams() {
        let seeds: HashSet<u64> =
            (-50..50).flat_map(|seed| (0..128).map(move |c| choice_seed(seed, c))).collect();
        assert_eq!(seeds.len(), 100 * 128);
    }
}
