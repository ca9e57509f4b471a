//! Segmented multi-LoRA multiplication: values, gradients, and independence of neighbours.

use kernels::{Cpu, Module};
use proptest::prelude::*;

use crate::lab::{
    Lab, Rng, assert_bits, assert_close, assert_gradient, assert_rows, cases, exact, inner,
    specification,
};
use crate::smlm_case::{Case, GROUPS};

const RANKS: [usize; 7] = [1, 2, 5, 8, 16, 17, 50];

fn batches() -> impl Strategy<Value = Case> {
    let segments = prop::collection::vec((0..40usize, 0..4usize), 0..6);
    let ranks = prop::collection::vec((prop::sample::select(&RANKS[..]), any::<bool>()), 3);
    let dropout = prop::sample::select(vec![0.0f32, 0.1, 0.5]);
    (0..GROUPS.len(), ranks, segments, dropout, any::<u64>()).prop_map(
        |(group, adapters, segments, dropout, seed)| {
            // Slot 3 stands for no slot.
            let segments: Vec<_> = segments
                .into_iter()
                .map(|(rows, slot)| (rows, (slot < 3).then_some(slot)))
                .collect();
            Case::new(GROUPS[group], &adapters, &segments, dropout, seed)
        },
    )
}

/// Where a value is NaN in both, it counts as equal: parts of S and of pools that nobody owns.
fn without_poison(values: &[f64]) -> Vec<f64> {
    values.iter().map(|value| if value.is_nan() { 0.0 } else { *value }).collect()
}

pub fn matches_reference<D: Lab>(lab: &D) {
    proptest!(cases(40), |(case in batches())| {
        let y = case.forward(lab).0;
        assert_close("y", &y, &case.reference(), D::TOLERANCE);
        for segment in case.segments.iter().filter(|segment| segment.adapter.is_none()) {
            let rows = segment.row * case.width..(segment.row + segment.rows) * case.width;
            assert_bits("untouched y", &y[rows.clone()], &case.y[rows]);
        }
        let dx = Rng(1).values(case.x.len());
        let grads = Rng(2).values(case.pool.len());
        let (got_dx, got_grads) = case.backward(lab, &dx, &grads);
        let (expected_dx, expected_grads) = case.backward(&exact(), &dx, &grads);
        assert_close("dx", &got_dx, &expected_dx, D::TOLERANCE);
        assert_close("grads", &got_grads, &expected_grads, D::TOLERANCE);
        let live = case.live();
        let dead = (0..grads.len()).filter(|index| !live.contains(index)).step_by(7);
        for index in dead {
            prop_assert_eq!(got_grads[index].to_bits(), grads[index].to_bits());
        }
    });
}

/// A segment alone, and any chunk of it, gives the bits it gives in a batch.
pub fn neighbours_and_chunks_change_no_bit<D: Lab>(lab: &D) {
    let ranks = [(5, true), (17, true), (16, false)];
    let segments =
        [(33, Some(0)), (1, Some(1)), (7, None), (16, Some(2)), (20, Some(0)), (0, Some(1))];
    for (seed, dropout) in [(50, 0.0), (51, 0.3)] {
        let case = Case::new(GROUPS[0], &ranks, &segments, dropout, seed);
        let nothing = vec![0.0; case.pool.len()];
        let (y, _) = case.forward(lab);
        let (dx, _) = case.backward(lab, &vec![0.0; case.x.len()], &nothing);
        for (index, segment) in case.segments.iter().enumerate() {
            let rows = segment.rows;
            let parts =
                [(0, rows), (0, rows.min(1)), (rows / 2, rows - rows / 2), (rows / 3, rows / 3)];
            for (first, rows) in parts {
                let part = case.part(index, first, rows);
                let start = segment.row + first;
                assert_bits(
                    "y",
                    &part.forward(lab).0,
                    &y[start * case.width..][..rows * case.width],
                );
                let (part_dx, _) = part.backward(lab, &vec![0.0; part.x.len()], &nothing);
                assert_bits("dx", &part_dx, &dx[start * case.input..][..rows * case.input]);
            }
        }
    }
}

/// Examples in one call or in a call each, beside others or not: the same gradient bits.
pub fn packings_give_the_same_gradient_bits<D: Lab>(lab: &D) {
    let ranks = [(8, true), (33, true)];
    let segments =
        [(33, Some(0)), (5, Some(1)), (16, Some(0)), (9, None), (50, Some(1)), (1, Some(0))];
    let case = Case::new(GROUPS[2], &ranks, &segments, 0.2, 52);
    let (_, together) = case.backward(lab, &vec![0.0; case.x.len()], &vec![0.0; case.pool.len()]);
    let mut apart = vec![0.0; case.pool.len()];
    for segment in 0..case.segments.len() {
        let example = case.part(segment, 0, case.segments[segment].rows);
        (_, apart) = example.backward(lab, &vec![0.0; example.x.len()], &apart);
    }
    assert_bits("gradients", &apart, &together);
}

pub fn empty_tables_touch_nothing<D: Lab>(lab: &D) {
    let mut case = Case::new(GROUPS[1], &[(4, true)], &[(3, Some(0))], 0.0, 53);
    case.segments.clear();
    let (y, s) = case.forward(lab);
    assert_bits("y", &y, &case.y);
    assert!(s.is_empty());
    let (dx, grads) = case.backward(lab, &case.x, &vec![1.5; case.pool.len()]);
    assert_bits("dx", &dx, &case.x);
    assert_bits("grads", &grads, &vec![1.5; case.pool.len()]);
}

/// With everything dropped LoRA adds exactly nothing, forward and backward.
pub fn everything_dropped_is_zero<D: Lab>(lab: &D) {
    let case = Case::new(GROUPS[1], &[(4, true)], &[(20, Some(0))], 1.0, 54);
    assert_bits("y", &case.forward(lab).0, &case.y);
    let (dx, grads) = case.backward(lab, &case.x, &vec![0.0; case.pool.len()]);
    assert_bits("dx", &dx, &case.x);
    assert!(grads.iter().all(|grad| *grad == 0.0));
}

/// The four groups of an 8B base: decode over many adapters, mixed ranks, long examples.
pub fn model_shapes<D: Lab>(lab: &D) {
    use Module::{Down, Gate, K, O, Q, Up, V};
    let groups: [(&[(Module, usize)], usize); 4] = [
        (&[(Q, 4096), (K, 1024), (V, 1024)], 4096),
        (&[(O, 4096)], 4096),
        (&[(Gate, 14_336), (Up, 14_336)], 4096),
        (&[(Down, 4096)], 14_336),
    ];
    let decode: Vec<_> =
        (0..300usize).map(|index| (1 + index % 3, (index % 9).checked_sub(1))).collect();
    let long = [(200, Some(0)), (65, Some(3)), (1, Some(1)), (130, Some(0)), (30, Some(2))];
    let ranks = [16, 16, 64, 8, 1, 17, 256, 32].map(|rank| (rank, true));
    for (index, (modules, input)) in groups.into_iter().enumerate() {
        for (layer, segments, dropout) in
            [(0, &decode[..], 0.0), (0, &long[..], 0.0), (1, &long[..2], 0.1)]
        {
            let seed = index as u64;
            let mut case =
                Case::sized(modules, (layer, input), &ranks, segments, dropout, 64 + seed);
            // The size of real adapters' parts beside that of y.
            case.pool.iter_mut().for_each(|weight| *weight /= 32.0);
            let what = |name: &str| format!("{name} of group {index}, {} segments", segments.len());
            check_rows(lab, &case, what);
        }
    }
}

/// Rows of an 8B base's groups, alone and in batches so large that other kernels do them.
pub fn model_rows_stand_alone<D: Lab>(lab: &D) {
    let groups: [(&[(Module, usize)], usize); 2] = [
        (&[(Module::Q, 4096), (Module::K, 1024), (Module::V, 1024)], 4096),
        (&[(Module::Down, 4096)], 14_336),
    ];
    let ranks = [16, 64, 8, 256].map(|rank| (rank, true));
    let segments = [(3900, Some(0)), (1, Some(1)), (200, Some(3)), (33, Some(2)), (90, Some(0))];
    for (modules, input) in groups {
        let case = Case::sized(modules, (1, input), &ranks, &segments, 0.1, 70);
        let nothing = vec![0.0; case.pool.len()];
        let y = case.forward(lab).0;
        let dx = case.backward(lab, &vec![0.0; case.x.len()], &nothing).0;
        for (index, first, rows) in [
            (0, 0, 1),
            (0, 3800, 64),
            (0, 100, 900),
            (0, 0, 3000),
            (1, 0, 1),
            (2, 70, 100),
            (3, 5, 28),
        ] {
            let (part, start) = (case.part(index, first, rows), case.segments[index].row + first);
            let (part_y, _) = part.forward(lab);
            assert_bits("y", &part_y, &y[start * case.width..][..rows * case.width]);
            let (part_dx, _) = part.backward(lab, &vec![0.0; part.x.len()], &nothing);
            assert_bits("dx", &part_dx, &dx[start * case.input..][..rows * case.input]);
        }
    }
}

fn check_rows<D: Lab>(lab: &D, case: &Case, what: impl Fn(&str) -> String) {
    let cpu = specification();
    let (got, expected) = (case.forward(lab).0, case.forward(&cpu).0);
    assert_rows(&what("y"), &got, &expected, case.width, D::ROW_TOLERANCE);
    let nothing = vec![0.0; case.pool.len()];
    let dx = vec![0.0; case.x.len()];
    let (got, expected) = (case.backward(lab, &dx, &nothing), case.backward(&cpu, &dx, &nothing));
    let rows_of = |values: &[f64]| -> Vec<f64> {
        // Rows without an adapter stay zero: nothing to compare.
        let live = case.segments.iter().filter(|segment| segment.adapter.is_some());
        live.flat_map(|s| values[s.row * case.input..(s.row + s.rows) * case.input].to_vec())
            .collect()
    };
    let (got_dx, expected_dx) = (rows_of(&got.0), rows_of(&expected.0));
    assert_rows(&what("dx"), &got_dx, &expected_dx, case.input, D::ROW_TOLERANCE);
    for adapter in 0..case.adapters.len() {
        for module in 0..case.modules.len() {
            let Some((a, b)) = case.weights(adapter, module) else { continue };
            for (name, range) in [("dA", a), ("dB", b)] {
                let (got, expected) = (&got.1[range.clone()], &expected.1[range.clone()]);
                if expected.iter().any(|gradient| *gradient != 0.0) {
                    assert_rows(&what(name), got, expected, range.len(), D::ROW_TOLERANCE);
                }
            }
        }
    }
}

#[test]
fn gradients_are_right() {
    let cpu = exact();
    let segments = [(3, Some(0)), (2, Some(1)), (18, Some(0))];
    for (seed, dropout) in [(60, 0.0), (61, 0.4)] {
        let case = Case::new(GROUPS[0], &[(2, true), (3, true)], &segments, dropout, seed);
        let none = vec![0.0; case.pool.len()];
        let (dx, grads) = case.backward(&cpu, &vec![0.0; case.x.len()], &none);
        let loss = |case: &Case| inner(&case.forward(&cpu).0, &case.dy);
        assert_gradient("dx", &case.x, &dx, |x| loss(&Case { x: x.to_vec(), ..case.clone() }));
        let live = case.live();
        let pick = |values: &[f64]| live.iter().map(|index| values[*index]).collect::<Vec<_>>();
        assert_gradient("dA, dB", &pick(&case.pool), &pick(&grads), |weights| {
            let mut moved = case.clone();
            for (index, weight) in live.iter().zip(weights) {
                moved.pool[*index] = *weight;
            }
            loss(&moved)
        });
    }
}

#[test]
fn threads_change_no_bit() {
    let segments: Vec<_> = (0..12).map(|index| (25 + index, Some(index % 3))).collect();
    let case = Case::new(GROUPS[0], &[(8, true), (33, true), (64, true)], &segments, 0.1, 62);
    let zeros = vec![0.0; case.pool.len()];
    let runs = [1, 2, 3].map(|threads| {
        let cpu = Cpu::<f32>::new(threads).unwrap();
        (case.forward(&cpu), case.backward(&cpu, &case.x, &zeros))
    });
    for run in &runs[1..] {
        assert_bits("y", &run.0.0, &runs[0].0.0);
        assert_bits("S", &without_poison(&run.0.1), &without_poison(&runs[0].0.1));
        assert_bits("dx", &run.1.0, &runs[0].1.0);
        assert_bits("grads", &run.1.1, &runs[0].1.1);
    }
}

/// A dropped share near its probability, and a mask of its own for each module, row and seed.
#[test]
fn masks_are_fair_and_differ() {
    let cpu = exact();
    let mut case = Case::new(GROUPS[2], &[(1, false)], &[(400, Some(0))], 0.25, 63);
    let (a, b) =
        (0..2).map(|m| case.weights(0, m).unwrap()).fold((vec![], vec![]), |mut all, w| {
            all.0.push(w.0);
            all.1.push(w.1);
            all
        });
    // S becomes the kept share of each row and module.
    case.x.fill(1.0);
    a.into_iter().chain(b).for_each(|range| case.pool[range].fill(1.0 / case.input as f64));
    let (_, s) = case.forward(&cpu);
    let mean = s.iter().sum::<f64>() / s.len() as f64;
    let deviation = (0.25 / 0.75 / (s.len() * case.input) as f64).sqrt();
    assert!((mean - 1.0).abs() < 4.0 * deviation, "mean {mean}, deviation {deviation}");
    let kept = |seed| {
        let mut case = case.clone();
        case.segments[0].seed = seed;
        case.reference()
    };
    assert_ne!(kept(1), kept(2));
    assert!(s.chunks(2).any(|row| row[0] != row[1]), "modules share a mask");
    assert!(s.chunks(2).any(|row| row[0] != s[0]), "rows share a mask");
}
