//! Sampling, one row at a time.
//!
//! Order: log-probabilities are taken from the raw logits; then repetition, frequency and presence
//! penalties, then biases change the logits. Greedy (temperature or top-p not above 0) takes the
//! largest, ties by lower id. Otherwise probabilities at the temperature are sorted descending,
//! ties by lower id; min-p and top-k cut the list, then top-p keeps its shortest prefix that holds
//! that share of what is left; the draw inverts the cumulative sum at `uniform(seed, position)`.
//!
//! A NaN logit counts as −∞ and +∞ as the largest finite number. Where no token is left (all NaN
//! or banned), token 0 is drawn. A log-probability of an impossible token is −∞. Entries of the
//! history or the biases outside the vocabulary are skipped.

use super::Host;
use super::float::Float;
use super::lanes::sum;
use super::random::{hash, uniform};
use super::threads::{Shared, Threads};
use crate::tables::{SampleArgs, SampleOut, SampleRow, SampleShape};

/// Draws one token per row.
pub(super) fn sample<T: Float, D: Host<T>>(
    threads: &Threads,
    out: SampleOut<'_, D>,
    logits: &mut [T],
    args: &SampleArgs<'_, D>,
    shape: SampleShape,
) {
    let SampleShape { rows, vocab, top } = shape;
    let (tokens, logprobs) = (out.tokens.slice_mut(), out.logprobs.slice_mut());
    let (top_ids, top_logprobs) = (out.top_ids.slice_mut(), out.top_logprobs.slice_mut());
    assert!(logits.len() == rows * vocab && vocab > 0, "logits to sample");
    assert!(tokens.len() == rows && logprobs.len() == rows, "rows to sample");
    assert!(top_ids.len() == rows * top && top_logprobs.len() == rows * top, "alternatives");
    let (tokens, logprobs) = (Shared::new(tokens), Shared::new(logprobs));
    let (top_ids, top_logprobs) = (Shared::new(top_ids), Shared::new(top_logprobs));
    let work = 40 * logits.len();
    threads.each_chunk(
        logits,
        vocab,
        work,
        #[inline(always)]
        |row, logits| {
            // SAFETY: one task per row.
            let (token, logprob, top_ids, top_logprobs) = unsafe {
                (
                    &mut tokens.slice(row, 1)[0],
                    &mut logprobs.slice(row, 1)[0],
                    top_ids.slice(row * top, top),
                    top_logprobs.slice(row * top, top),
                )
            };
            for logit in logits.iter_mut() {
                *logit = clean(*logit);
            }
            let log_sum = log_sum_exp(logits);
            let log_probability = |logit: T| match logit > T::NEG_INFINITY {
                true => logit - log_sum,
                false => T::NEG_INFINITY,
            };
            largest(logits, top_ids, top_logprobs);
            for value in top_logprobs {
                *value = log_probability(*value);
            }
            let raw = logits.to_vec();
            let choice = RowChoice::read(args, row);
            choice.adjust(logits);
            let drawn = choice.draw(logits);
            *token = drawn as i32;
            *logprob = log_probability(raw[drawn]);
        },
    );
}

fn clean<T: Float>(logit: T) -> T {
    match logit {
        nan if nan.is_nan() => T::NEG_INFINITY,
        high if high > T::MAX => T::MAX,
        logit => logit,
    }
}

/// Position of the largest value, the first of equals.
fn arg_max<T: Float>(values: &[T]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best
}

fn log_sum_exp<T: Float>(logits: &[T]) -> T {
    let largest = logits[arg_max(logits)];
    let exponents: Vec<T> = logits.iter().map(|logit| (*logit - largest).exp()).collect();
    largest + sum(&exponents).ln()
}

/// The likeliest ids and their logits, descending, ties by lower id; −1 and −∞ past the end.
fn largest<T: Float>(logits: &[T], ids: &mut [i32], values: &mut [T]) {
    ids.fill(-1);
    values.fill(T::NEG_INFINITY);
    for (id, logit) in logits.iter().enumerate() {
        let better = |kept: usize| ids[kept] < 0 || *logit > values[kept];
        let Some(last) = ids.len().checked_sub(1).filter(|last| better(*last)) else { continue };
        let place = (0..=last).find(|kept| better(*kept)).unwrap_or(last);
        ids[place..].rotate_right(1);
        values[place..].rotate_right(1);
        (ids[place], values[place]) = (id as i32, *logit);
    }
}

/// What one row's tables say.
struct RowChoice<'a, T> {
    wide: &'a [T],
    int: &'a [i32],
    /// Pairs (token, count among generated).
    history: &'a [i32],
    bias_ids: &'a [i32],
    bias: &'a [T],
}

impl<'a, T: Float> RowChoice<'a, T> {
    fn read<D: Host<T>>(args: &SampleArgs<'a, D>, row: usize) -> Self {
        let wide = &args.wide.slice()[row * SampleRow::WIDE..][..SampleRow::WIDE];
        let int = &args.int.slice()[row * SampleRow::INT..][..SampleRow::INT];
        let span = |start: usize, len: usize| int[start] as usize..(int[start] + int[len]) as usize;
        let history = span(SampleRow::HISTORY, SampleRow::HISTORY_LEN);
        let bias = span(SampleRow::BIAS, SampleRow::BIAS_LEN);
        Self {
            wide,
            int,
            history: &args.history.slice()[2 * history.start..2 * history.end],
            bias_ids: &args.bias_ids.slice()[bias.clone()],
            bias: &args.bias.slice()[bias],
        }
    }

    /// Penalties, then biases.
    fn adjust(&self, logits: &mut [T]) {
        let repetition = self.wide[SampleRow::REPETITION];
        for pair in self.history.chunks_exact(2) {
            let Some(logit) = logits.get_mut(pair[0] as usize) else { continue };
            let repeated = *logit > T::ZERO;
            *logit = if repeated { *logit / repetition } else { *logit * repetition };
            if pair[1] > 0 {
                *logit -= self.wide[SampleRow::FREQUENCY] * T::from_f64(f64::from(pair[1]));
                *logit -= self.wide[SampleRow::PRESENCE];
            }
        }
        for (id, bias) in self.bias_ids.iter().zip(self.bias) {
            let Some(logit) = logits.get_mut(*id as usize) else { continue };
            let banned = *bias <= T::from_f64(-100.0);
            *logit = if banned { T::NEG_INFINITY } else { *logit + *bias };
        }
        for logit in logits {
            *logit = clean(*logit);
        }
    }

    /// The token drawn from adjusted logits.
    fn draw(&self, logits: &[T]) -> usize {
        let temperature = self.wide[SampleRow::TEMPERATURE];
        let top_p = self.wide[SampleRow::TOP_P];
        let best = arg_max(logits);
        let random = temperature > T::ZERO && top_p > T::ZERO;
        if !random || logits[best] == T::NEG_INFINITY {
            return best;
        }
        let weight = |logit: T| ((logit - logits[best]) / temperature).exp();
        let floor = self.wide[SampleRow::MIN_P];
        let weights = logits.iter().map(|logit| weight(*logit)).enumerate();
        // The largest weight is exactly 1, so weights compare with min-p as they are.
        let mut kept: Vec<(usize, T)> =
            weights.filter(|(_, weight)| *weight > T::ZERO && *weight >= floor).collect();
        let descending = |a: &(usize, T), b: &(usize, T)| {
            b.1.partial_cmp(&a.1).unwrap_or(std::cmp::Ordering::Equal).then(a.0.cmp(&b.0))
        };
        kept.sort_unstable_by(descending);
        if let Ok(top_k @ 1..) = usize::try_from(self.int[SampleRow::TOP_K]) {
            kept.truncate(top_k);
        }
        if top_p < T::ONE {
            let total = kept.iter().fold(T::ZERO, |total, (_, weight)| total + *weight);
            kept.truncate(prefix(&kept, top_p * total) + 1);
        }
        let total = kept.iter().fold(T::ZERO, |total, (_, weight)| total + *weight);
        let words = [SampleRow::SEED_LO, SampleRow::SEED_HI, SampleRow::POSITION];
        let draw = uniform(hash(words.map(|word| self.int[word] as u32)));
        let target = T::from_f32(draw) * total;
        let mut reached = T::ZERO;
        for (id, weight) in &kept {
            reached += *weight;
            if reached > target {
                return *id;
            }
        }
        kept.last().map_or(best, |(id, _)| *id)
    }
}

/// Index of the first entry at which the cumulative weight reaches `mass`, or of the last.
fn prefix<T: Float>(kept: &[(usize, T)], mass: T) -> usize {
    let mut reached = T::ZERO;
    for (index, (_, weight)) in kept.iter().enumerate() {
        reached += *weight;
        if reached >= mass {
            return index;
        }
    }
    kept.len().saturating_sub(1)
}
