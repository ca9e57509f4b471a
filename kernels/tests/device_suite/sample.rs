//! Sampling against an independent reference, and as statistics.

use kernels::tables::{SampleArgs, SampleOut, SampleRow, SampleShape};
use kernels::{Cpu, In, Out};
use proptest::prelude::*;

use crate::lab::{Lab, Rng, assert_bits, assert_close, cases};

/// Parameters of one row.
#[derive(Clone)]
struct Row {
    logits: Vec<f64>,
    wide: [f64; SampleRow::WIDE],
    seed: u64,
    position: usize,
    top_k: usize,
    history: Vec<(i32, i32)>,
    bias: Vec<(i32, f64)>,
}

/// Temperature 1, everything else off.
const OFF: [f64; SampleRow::WIDE] = [1.0, 1.0, 0.0, 0.0, 0.0, 1.0];

impl Row {
    fn new(logits: Vec<f64>, seed: u64) -> Self {
        let (history, bias) = (vec![], vec![]);
        Self { logits, wide: OFF, seed, position: 0, top_k: 0, history, bias }
    }
    fn random(vocab: usize, rng: &mut Rng) -> Self {
        let logits = rng.values(vocab).iter().map(|x| x * 4.0).collect();
        let pick = |rng: &mut Rng, choices: &[f64]| choices[rng.below(choices.len())];
        let mut row = Self::new(logits, rng.next());
        row.wide[SampleRow::TEMPERATURE] = pick(rng, &[0.0, 0.5, 1.0, 2.0]);
        row.wide[SampleRow::TOP_P] = pick(rng, &[0.0, 0.3, 0.9, 1.0]);
        row.wide[SampleRow::MIN_P] = pick(rng, &[0.0, 0.05, 0.5]);
        row.wide[SampleRow::PRESENCE] = pick(rng, &[0.0, 1.5, -0.5]);
        row.wide[SampleRow::FREQUENCY] = pick(rng, &[0.0, 0.25]);
        row.wide[SampleRow::REPETITION] = pick(rng, &[1.0, 1.5]);
        (row.position, row.top_k) = (rng.below(1000), rng.below(4) * rng.below(vocab));
        for token in 0..vocab as i32 {
            if rng.below(3) == 0 {
                row.history.push((token, rng.below(4) as i32));
            }
            if rng.below(4) == 0 {
                row.bias.push((token, pick(rng, &[-100.0, -2.0, 3.0])));
            }
        }
        row
    }
}

#[derive(Debug)]
struct Drawn {
    token: usize,
    logprob: f64,
    top_ids: Vec<i32>,
    top_logprobs: Vec<f64>,
}

fn run<D: Lab>(lab: &D, rows: &[Row], top: usize) -> Vec<Drawn> {
    let vocab = rows.first().map_or(1, |row| row.logits.len());
    let (mut wide, mut int) = (Vec::new(), Vec::new());
    let (mut history, mut bias_ids, mut bias) = (vec![], vec![], vec![]);
    for row in rows {
        wide.extend(row.wide);
        let spans = [history.len() / 2, row.history.len(), bias.len(), row.bias.len()];
        let words = [row.seed as i32, (row.seed >> 32) as i32, row.position as i32];
        int.extend(words.into_iter().chain([row.top_k as i32]).chain(spans.map(|x| x as i32)));
        history.extend(row.history.iter().flat_map(|(token, count)| [*token, *count]));
        bias_ids.extend(row.bias.iter().map(|(token, _)| *token));
        bias.extend(row.bias.iter().map(|(_, bias)| *bias));
    }
    let logits: Vec<f64> = rows.iter().flat_map(|row| row.logits.clone()).collect();
    let (wide, int, history) = (lab.wide(&wide), lab.ints(&int), lab.ints(&history));
    let (bias_ids, bias) = (lab.ints(&bias_ids), lab.wide(&bias));
    let mut tokens = lab.ints(&vec![-7; rows.len()]);
    let mut top_ids = lab.ints(&vec![-7; rows.len() * top]);
    let (mut logprobs, mut top_logprobs) = (Vec::new(), Vec::new());
    lab.changed(&logits, |logits| {
        logprobs = lab.written_wide(rows.len(), |logprobs| {
            top_logprobs = lab.written_wide(rows.len() * top, |top_logprobs| {
                let out = SampleOut {
                    tokens: Out::all(&mut tokens),
                    logprobs,
                    top_ids: Out::all(&mut top_ids),
                    top_logprobs,
                };
                let args = SampleArgs {
                    wide: In::all(&wide),
                    int: In::all(&int),
                    history: In::all(&history),
                    bias_ids: In::all(&bias_ids),
                    bias: In::all(&bias),
                };
                let shape = SampleShape { rows: rows.len(), vocab, top };
                lab.sample(out, logits, &args, shape).unwrap();
            });
        });
    });
    let (tokens, top_ids) = (lab.read_ints(&tokens), lab.read_ints(&top_ids));
    (0..rows.len())
        .map(|row| Drawn {
            token: usize::try_from(tokens[row]).unwrap(),
            logprob: logprobs[row],
            top_ids: top_ids[row * top..][..top].to_vec(),
            top_logprobs: top_logprobs[row * top..][..top].to_vec(),
        })
        .collect()
}

/// The tokens that may be drawn, in order, with their cumulative probabilities.
fn distribution(row: &Row) -> Vec<(usize, f64)> {
    let [temperature, top_p, min_p, presence, frequency, repetition] = row.wide;
    let mut logits = row.logits.clone();
    for (token, count) in &row.history {
        let logit = &mut logits[*token as usize];
        *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
        *logit -= frequency * f64::from(*count) + if *count > 0 { presence } else { 0.0 };
    }
    for (token, bias) in &row.bias {
        logits[*token as usize] += if *bias <= -100.0 { f64::NEG_INFINITY } else { *bias };
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    let largest = logits[order[0]];
    if temperature == 0.0 || top_p == 0.0 || largest == f64::NEG_INFINITY {
        return vec![(order[0], 1.0)];
    }
    let odds = |token: usize| ((logits[token] - largest) / temperature).exp();
    order.retain(|token| odds(*token) > 0.0 && odds(*token) >= min_p);
    if row.top_k > 0 {
        order.truncate(row.top_k);
    }
    let mass: f64 = order.iter().map(|token| odds(*token)).sum();
    let mut kept = Vec::new();
    let mut reached = 0.0;
    for token in order {
        if reached < top_p * mass || top_p == 1.0 {
            reached += odds(token);
            kept.push((token, reached));
        }
    }
    kept.into_iter().map(|(token, cumulative)| (token, cumulative / reached)).collect()
}

fn uniform(row: &Row) -> f64 {
    let words = [row.seed as u32, (row.seed >> 32) as u32, row.position as u32];
    let hash = words.into_iter().fold(0u32, |hash, word| {
        let mut h = hash.wrapping_add(0x9e37_79b9) ^ word;
        h = (h ^ (h >> 16)).wrapping_mul(0x7feb_352d);
        h = (h ^ (h >> 15)).wrapping_mul(0x846c_a68b);
        h ^ (h >> 16)
    });
    f64::from(hash >> 8) / f64::from(1 << 24)
}

pub fn matches_reference<D: Lab>(lab: &D) {
    let shapes = (0..6usize, 1..60usize, 0..21usize, any::<u64>());
    proptest!(cases(150), |((rows, vocab, top, seed) in shapes)| {
        let mut rng = Rng(seed);
        let rows: Vec<Row> = (0..rows).map(|_| Row::random(vocab, &mut rng)).collect();
        for (row, drawn) in rows.iter().zip(run(lab, &rows, top)) {
            let kept = distribution(row);
            let place = kept.iter().position(|(token, _)| *token == drawn.token);
            let Some(place) = place else { panic!("{} is not among {kept:?}", drawn.token) };
            let below = if place == 0 { 0.0 } else { kept[place - 1].1 };
            let slack = 10.0 * D::WIDE_TOLERANCE;
            let u = uniform(row);
            prop_assert!(u >= below - slack && u <= kept[place].1 + slack, "{} {:?}", u, kept);
            check_logprobs::<D>(row, &drawn);
        }
    });
}

fn check_logprobs<D: Lab>(row: &Row, drawn: &Drawn) {
    let total = row.logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
    // Compared with 1 beside them: a log-probability near 0 is a difference of large numbers.
    let near = |got: f64, expected: f64| {
        assert_close("logprob", &[got, 1.0], &[expected, 1.0], D::WIDE_TOLERANCE);
    };
    near(drawn.logprob, row.logits[drawn.token] - total);
    let mut order: Vec<usize> = (0..row.logits.len()).collect();
    order.sort_by(|a, b| row.logits[*b].total_cmp(&row.logits[*a]));
    for (index, id) in drawn.top_ids.iter().enumerate() {
        let Some(expected) = order.get(index) else {
            assert_eq!((*id, drawn.top_logprobs[index]), (-1, f64::NEG_INFINITY));
            continue;
        };
        assert_eq!(*id, *expected as i32);
        near(drawn.top_logprobs[index], row.logits[*expected] - total);
    }
}

/// Frequencies over many positions fit the probabilities (chi-square, 5 standard deviations).
pub fn draws_follow_the_probabilities<D: Lab>(lab: &D) {
    let mut rng = Rng(70);
    for (top_p, top_k) in [(1.0, 0), (0.8, 0), (1.0, 5)] {
        let mut row = Row::new(rng.values(12).iter().map(|x| 2.0 * x).collect(), rng.next());
        (row.wide[SampleRow::TOP_P], row.top_k) = (top_p, top_k);
        let kept = distribution(&row);
        let draws = 4000;
        let rows: Vec<Row> = (0..draws).map(|position| Row { position, ..row.clone() }).collect();
        let mut counts = vec![0.0; row.logits.len()];
        run(lab, &rows, 0).iter().for_each(|drawn| counts[drawn.token] += 1.0);
        let mut below = 0.0;
        let chi_square: f64 = kept
            .iter()
            .map(|(token, cumulative)| {
                let expected = (cumulative - below) * f64::from(draws as u32);
                below = *cumulative;
                (counts[*token] - expected).powi(2) / expected
            })
            .sum();
        let freedom = kept.len() as f64 - 1.0;
        assert!(chi_square < freedom + 5.0 * (2.0 * freedom).sqrt(), "{chi_square} of {freedom}");
        let inside: f64 = kept.iter().map(|(token, _)| counts[*token]).sum();
        assert_eq!(inside, f64::from(draws as u32), "a token that was cut off was drawn");
    }
}

pub fn draws_are_a_function_of_seed_and_position<D: Lab>(lab: &D) {
    let mut rng = Rng(71);
    let rows: Vec<Row> = (0..20).map(|_| Row::random(50, &mut rng)).collect();
    let together: Vec<usize> = run(lab, &rows, 0).iter().map(|drawn| drawn.token).collect();
    let alone: Vec<usize> =
        rows.iter().map(|row| run(lab, std::slice::from_ref(row), 3)[0].token).collect();
    assert_eq!(together, alone);
    let flat = |seed, position| {
        let row = Row { position, ..Row::new(vec![0.0; 1000], seed) };
        run(lab, &[row], 0)[0].token
    };
    assert_ne!([flat(1, 0), flat(1, 1)], [flat(2, 0), flat(2, 1)]);
    assert_ne!(flat(1, 0), flat(1, 1));
}

pub fn ties_go_to_the_lower_id<D: Lab>(lab: &D) {
    let mut row = Row::new(vec![1.0, 3.0, 3.0, 2.0], 5);
    row.wide[SampleRow::TEMPERATURE] = 0.0;
    let drawn = &run(lab, &[row], 4)[0];
    assert_eq!((drawn.token, drawn.top_ids.clone()), (1, vec![1, 2, 3, 0]));
}

pub fn not_finite_logits_are_no_fault<D: Lab>(lab: &D) {
    let (nan, high, low) = (f64::NAN, f64::INFINITY, f64::NEG_INFINITY);
    for temperature in [0.0, 1.0] {
        let mut rows: Vec<Row> =
            [vec![nan, 1.0, low, nan], vec![1.0, nan, high, 2.0], vec![nan; 4], vec![low; 4]]
                .map(|logits| Row::new(logits, 6))
                .to_vec();
        rows.iter_mut().for_each(|row| row.wide[SampleRow::TEMPERATURE] = temperature);
        let drawn = run(lab, &rows, 2);
        let tokens: Vec<usize> = drawn.iter().map(|drawn| drawn.token).collect();
        assert_eq!(tokens, [1, 2, 0, 0]);
        assert_eq!(
            drawn.iter().map(|drawn| drawn.logprob).collect::<Vec<_>>(),
            [0.0, 0.0, low, low]
        );
    }
    let mut banned = Row::new(vec![0.0, 1.0], 7);
    banned.bias = vec![(0, -100.0), (1, -100.0), (9, 5.0)];
    banned.history = vec![(-3, 1), (77, 2)];
    assert_eq!(run(lab, &[banned], 0)[0].token, 0);
}

/// The vocabulary of an 8B base: every draw lies where the specification's distribution has it.
pub fn model_shapes<D: Lab>(lab: &D) {
    let mut rng = Rng(73);
    let rows: Vec<Row> = (0..12).map(|_| Row::random(128_256, &mut rng)).collect();
    for (row, drawn) in rows.iter().zip(run(lab, &rows, 20)) {
        let kept = distribution(row);
        let Some(place) = kept.iter().position(|(token, _)| *token == drawn.token) else {
            panic!("{} cannot be drawn from {} tokens", drawn.token, kept.len());
        };
        let below = if place == 0 { 0.0 } else { kept[place - 1].1 };
        // Sums of many weights in f32.
        let (slack, u) = (2e-3, uniform(row));
        assert!(u >= below - slack && u <= kept[place].1 + slack, "{u} {below} {}", kept[place].1);
        check_logprobs::<D>(row, &drawn);
    }
}

#[test]
fn threads_change_no_bit() {
    let mut rng = Rng(72);
    let rows: Vec<Row> = (0..30).map(|_| Row::random(900, &mut rng)).collect();
    let [one, two] = [1, 2].map(|threads| run(&Cpu::<f32>::new(threads).unwrap(), &rows, 20));
    for (one, two) in one.iter().zip(&two) {
        assert_eq!((one.token, &one.top_ids), (two.token, &two.top_ids));
        assert_bits("logprobs", &[one.logprob], &[two.logprob]);
        assert_bits("top", &one.top_logprobs, &two.top_logprobs);
    }
}
