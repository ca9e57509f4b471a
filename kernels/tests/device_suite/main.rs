//! One suite for every device: each operation against plain f64 references, gradients against
//! finite differences, and the equalities that batches, packings, chunks and threads must keep.

#![allow(clippy::unwrap_used, reason = "a call that fails fails the test")]

mod attention;
mod lab;
mod linear;
mod loss;
mod norm;
mod optimizer;
mod rope;
mod rows;
mod sample;
mod silu;
mod smlm;
mod smlm_case;

/// The suite on one device.
macro_rules! device_suite {
    ($name:ident, $device:expr, $mark:tt, { $($family:ident: $($test:ident),+;)+ }) => {
        mod $name {
            $(mod $family {
                $(#[test]
                #$mark
                fn $test() {
                    crate::$family::$test(&$device);
                })+
            })+
        }
    };
}

macro_rules! suite {
    ($name:ident, $device:expr, $mark:tt) => {
        device_suite!($name, $device, $mark, {
            attention: matches_reference, packing_and_chunks_change_no_bit, paged_equals_training;
            linear: matches_reference, rows_do_not_depend_on_each_other;
            loss: matches_reference, chunks_change_no_bit, far_logits_are_finite;
            norm: matches_reference, rows_do_not_depend_on_each_other;
            optimizer: matches_reference, not_finite_gradients_change_nothing;
            rope: matches_reference, cache_holds_turned_keys_and_values;
            rows: rows_are_copied, no_rows_are_no_fault, memory_moves, bf16_is_exact,
                random_fill_is_a_function_of_the_seed, marks_follow_each_other,
                replay_runs_each_time;
            sample: matches_reference, draws_follow_the_probabilities,
                draws_are_a_function_of_seed_and_position, ties_go_to_the_lower_id,
                not_finite_logits_are_no_fault;
            silu: matches_reference, far_gates_do_not_overflow;
            smlm: matches_reference, neighbours_and_chunks_change_no_bit,
                packings_give_the_same_gradient_bits, empty_tables_touch_nothing,
                everything_dropped_is_zero;
        });
    };
}

suite!(cpu_f32, kernels::Cpu::<f32>::new(2).unwrap(), [cfg(test)]);
suite!(cpu_f64, kernels::Cpu::<f64>::new(2).unwrap(), [cfg(test)]);
suite!(cuda, kernels::Cuda::open(0).unwrap(), [ignore = "needs a GPU"]);
suite!(
    cuda_batch_invariant,
    kernels::Cuda::open(0).unwrap().batch_invariant(),
    [ignore = "needs a GPU"]
);

// Sizes that the specification takes seconds for: only to compare another device with it.
device_suite!(cuda_shapes, kernels::Cuda::open(0).unwrap(), [ignore = "needs a GPU"], {
    attention: model_shapes;
    linear: model_shapes;
    loss: model_shapes;
    norm: model_shapes;
    rope: model_shapes;
    sample: model_shapes;
    silu: model_shapes;
    smlm: model_shapes;
});

device_suite!(
    cuda_batch_invariant_shapes,
    kernels::Cuda::open(0).unwrap().batch_invariant(),
    [ignore = "needs a GPU"],
    {
        attention: model_rows_stand_alone;
        linear: model_rows_stand_alone, model_shapes;
        smlm: model_rows_stand_alone;
    }
);
