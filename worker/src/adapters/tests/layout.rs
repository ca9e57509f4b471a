//! The canonical layout, tiled for random shapes.

use kernels::Module;
use kernels::tables::{PAGE, SlotRow};
use proptest::prelude::*;

use super::dims;
use crate::adapters::layout::{AdapterLayout, AdapterShape, Part, ShapeError};
use crate::adapters::layout::{module_by_name, module_name};

fn shape(rank: usize, targets: &[Module]) -> AdapterShape {
    AdapterShape::new(rank, 2.0 * rank as f64, false, targets.to_vec()).unwrap()
}

#[test]
fn shapes_are_checked_and_sorted() {
    let build =
        |rank, alpha, targets: &[Module]| AdapterShape::new(rank, alpha, false, targets.to_vec());
    assert_eq!(build(0, 1.0, &[Module::Q]), Err(ShapeError::Rank(0)));
    assert_eq!(build(257, 1.0, &[Module::Q]), Err(ShapeError::Rank(257)));
    assert_eq!(build(1, 0.0, &[Module::Q]), Err(ShapeError::Alpha(0.0)));
    assert_eq!(build(1, 1e39, &[Module::Q]), Err(ShapeError::Alpha(1e39)));
    assert!(build(1, f64::NAN, &[Module::Q]).is_err());
    assert_eq!(build(1, 1.0, &[]), Err(ShapeError::NoTarget));
    let sorted = build(256, 1.0, &[Module::Down, Module::Q, Module::Down]).unwrap();
    assert_eq!(sorted.targets, [Module::Q, Module::Down]);
}

#[test]
fn scale_divides_by_rank_or_its_root() {
    let plain = AdapterShape::new(4, 6.0, false, vec![Module::Q]).unwrap();
    assert_eq!(plain.scale(), 1.5);
    let stable = AdapterShape { use_rslora: true, ..plain };
    assert_eq!(stable.scale(), 3.0);
}

#[test]
fn names_go_both_ways() {
    let names = Module::ALL.map(module_name);
    let expected = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    assert_eq!(names, expected);
    assert_eq!(names.map(module_by_name), Module::ALL.map(Some));
    assert_eq!(module_by_name("lm_head"), None);
}

#[test]
fn slot_row_of_a_known_adapter() {
    // qwen3: q (32 → 64), k (32 → 32), 3 layers.
    let layout = AdapterLayout::new(&dims("qwen3"), &shape(3, &[Module::K, Module::Q]));
    let stride = 3 * (32 + 64) + 3 * (32 + 32);
    assert_eq!(layout.len(), 3 * stride);
    assert_eq!(layout.pages(), 1);
    let row = layout.slot_row(7, Some(9));
    let scale = 2f32.to_bits() as i32;
    let k = 3 * (32 + 64);
    assert_eq!(row, [7, 3, scale, stride as i32, 9, 0, k, -1, -1, -1, -1, -1]);
    assert_eq!(layout.slot_row(7, None)[SlotRow::GRAD_PAGE], -1);
}

proptest! {
    /// Tensors tile the run without gap or overlap, in the order that the slot table promises.
    #[test]
    fn tensors_tile_the_run(
        base in prop::sample::select(vec!["llama3", "qwen3", "odd"]),
        rank in 1usize..=256,
        picks in prop::collection::btree_set(0usize..7, 1..=7),
    ) {
        let targets: Vec<Module> = picks.into_iter().rev().map(|at| Module::ALL[at]).collect();
        let dims = dims(base);
        let layout = AdapterLayout::new(&dims, &shape(rank, &targets));
        let row = layout.slot_row(0, None);
        let mut next = 0;
        for spot in layout.tensors() {
            prop_assert_eq!(spot.offset, next);
            next += spot.len();
            let (input, output) = dims.of(spot.module);
            let offset = row[SlotRow::MODULE_OFFSET + spot.module.index()];
            prop_assert!(offset >= 0 && targets.contains(&spot.module));
            let a = spot.layer * row[SlotRow::LAYER_STRIDE] as usize + offset as usize;
            match spot.part {
                Part::A => {
                    prop_assert_eq!((spot.rows, spot.cols), (rank, input));
                    prop_assert_eq!(spot.offset, a);
                }
                Part::B => {
                    prop_assert_eq!((spot.rows, spot.cols), (output, rank));
                    prop_assert_eq!(spot.offset, a + rank * input);
                }
            }
        }
        prop_assert_eq!(next, layout.len());
        prop_assert_eq!(layout.tensors().count(), dims.layers * targets.len() * 2);
        prop_assert!(layout.pages() * PAGE >= next && (layout.pages() - 1) * PAGE < next);
    }
}
