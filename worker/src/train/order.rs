//! Which examples a job's optimizer step holds, and the seeds of their dropout: pure functions of
//! (job seed, epoch or step), so a resumed run, on any machine, goes on in the same order.
//!
//! The generator is counter-based, with no state to save. With `mix` the finalizer of SplitMix64
//! (Steele, Lea & Flood 2014) and γ its odd constant, the i-th draw of a stream is
//! `mix(key + (i + 1)·γ)`, and a key folds its parts one after another:
//! `key ← mix(key + γ) ^ part`.
//! Each use of the seed starts from its own constant, so no two uses share a stream.

const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;
/// First part of the keys that order an epoch.
const ORDER: u64 = 0x6F72_6465_7200_0001;
/// First part of the keys that seed dropout.
const DROPOUT: u64 = 0x6472_6F70_6F75_7401;

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

fn key(parts: &[u64]) -> u64 {
    let folded = parts.iter().fold(0, |key: u64, part| mix(key.wrapping_add(GAMMA)) ^ part);
    mix(folded.wrapping_add(GAMMA))
}

/// The order of all `n` examples in `epoch` (from 0): Fisher–Yates from the last place down, the
/// partner of place `i` being the high half of draw × (i + 1).
pub fn epoch_order(seed: u64, epoch: u64, n: u32) -> Vec<u32> {
    let key = key(&[ORDER, seed, epoch]);
    let mut order: Vec<u32> = (0..n).collect();
    for (draw, place) in (1..order.len()).rev().enumerate() {
        let random = mix(key.wrapping_add((draw as u64 + 1).wrapping_mul(GAMMA)));
        let partner = (u128::from(random) * (place as u128 + 1)) >> 64;
        order.swap(place, partner as usize);
    }
    order
}

/// Optimizer steps of an epoch; the last may hold fewer than `batch_size` (≥ 1) examples.
pub fn steps_per_epoch(n: usize, batch_size: usize) -> usize {
    n.div_ceil(batch_size)
}

/// The examples of optimizer step `step` (from 0, over all epochs), in order; none when `n` is 0.
pub fn step_examples(seed: u64, step: usize, n: u32, batch_size: usize) -> Vec<u32> {
    let steps = steps_per_epoch(n as usize, batch_size);
    if steps == 0 {
        return Vec::new();
    }
    let order = epoch_order(seed, (step / steps) as u64, n);
    let first = (step % steps) * batch_size;
    order[first..(first + batch_size).min(order.len())].to_vec()
}

/// Seed of all dropout masks of `example` in optimizer step `step` (from 0).
pub fn dropout_seed(job_seed: u64, step: u64, example: u32) -> u64 {
    key(&[DROPOUT, job_seed, step, u64::from(example)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn an_epoch_is_a_permutation_and_repeats_itself() {
        for n in [0, 1, 2, 10, 997] {
            let order = epoch_order(7, 3, n);
            assert_eq!(order, epoch_order(7, 3, n));
            let mut sorted = order;
            sorted.sort_unstable();
            assert_eq!(sorted, (0..n).collect::<Vec<_>>());
        }
    }

    /// Saved jobs go on in this order: the values may never change.
    #[test]
    fn the_order_is_fixed_for_good() {
        assert_eq!(epoch_order(42, 0, 10), [5, 4, 0, 2, 8, 3, 7, 1, 6, 9]);
        assert_eq!(dropout_seed(42, 5, 9), 0x75F9_97B3_DB45_C6AA);
    }

    #[test]
    fn epochs_and_seeds_differ() {
        let orders: HashSet<_> = (0..20)
            .flat_map(|seed| (0..20).map(move |epoch| epoch_order(seed, epoch, 50)))
            .collect();
        assert_eq!(orders.len(), 400);
    }

    /// Chi-square over (place, example) for 7 examples: 36 degrees of freedom, so 80 is far out.
    #[test]
    fn every_example_comes_equally_often_at_every_place() {
        let (n, rounds) = (7usize, 14_000u64);
        let mut counts = vec![0f64; n * n];
        for epoch in 0..rounds {
            for (place, example) in epoch_order(1, epoch, n as u32).into_iter().enumerate() {
                counts[place * n + example as usize] += 1.0;
            }
        }
        let expected = rounds as f64 / n as f64;
        let chi: f64 = counts.iter().map(|c| (c - expected).powi(2) / expected).sum();
        assert!(chi < 80.0, "chi-square {chi}");
    }

    #[test]
    fn the_steps_of_an_epoch_hold_every_example_once() {
        for (n, batch) in [(10u32, 4usize), (8, 4), (3, 64), (1, 1)] {
            let steps = steps_per_epoch(n as usize, batch);
            for epoch in 0..3 {
                let seen: Vec<u32> = (epoch * steps..(epoch + 1) * steps)
                    .flat_map(|step| step_examples(9, step, n, batch))
                    .collect();
                assert_eq!(seen, epoch_order(9, epoch as u64, n));
            }
        }
        assert_eq!(step_examples(9, 2, 10, 4).len(), 2);
        assert_eq!(step_examples(9, 0, 0, 4), Vec::<u32>::new());
    }

    #[test]
    fn dropout_seeds_do_not_meet() {
        let seeds: HashSet<u64> = (0..10)
            .flat_map(|job| (0..30).map(move |step| (job, step)))
            .flat_map(|(job, step)| (0..30).map(move |example| dropout_seed(job, step, example)))
            .collect();
        assert_eq!(seeds.len(), 9000);
    }
}
