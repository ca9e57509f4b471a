//! The kernels' sources, embedded, and what each of them holds.

use super::{attention, smlm};

/// One kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    /// Its name in the source and in launches.
    pub name: &'static str,
    /// Dynamic shared memory that a launch may ask for, bytes; 0 where 48 KiB are enough.
    pub shared: u32,
}

/// One translation unit.
#[derive(Debug)]
pub(super) struct Source {
    /// File name, for messages.
    pub name: &'static str,
    /// Texts that NVRTC compiles as one, in order.
    pub parts: &'static [&'static str],
    /// Its kernels.
    pub kernels: &'static [Kernel],
}

const COMMON: &str = include_str!("../../cuda/common.cuh");
const ATTENTION: &str = include_str!("../../cuda/attention.cuh");
const SMLM: &str = include_str!("../../cuda/smlm.cuh");

/// A kernel that is content with 48 KiB of shared memory.
const fn kernel(name: &'static str) -> Kernel {
    Kernel { name, shared: 0 }
}

/// Everything that is compiled.
pub(super) const SOURCES: &[Source] = &[
    Source {
        name: "rows.cu",
        parts: &[COMMON, include_str!("../../cuda/rows.cu")],
        kernels: &[
            kernel("rows_gather"),
            kernel("rows_scatter"),
            kernel("rows_fill"),
            kernel("rows_copy"),
            kernel("rows_narrow"),
            kernel("rows_fill_uniform"),
        ],
    },
    Source {
        name: "norm.cu",
        parts: &[COMMON, include_str!("../../cuda/norm.cu")],
        kernels: &[
            kernel("norm_rms"),
            kernel("norm_add_rms"),
            kernel("norm_rms_backward"),
            kernel("norm_add"),
        ],
    },
    Source {
        name: "rope.cu",
        parts: &[COMMON, include_str!("../../cuda/rope.cu")],
        kernels: &[kernel("rope_forward"), kernel("rope_backward")],
    },
    Source {
        name: "silu.cu",
        parts: &[COMMON, include_str!("../../cuda/silu.cu")],
        kernels: &[kernel("silu_mul"), kernel("silu_mul_backward")],
    },
    Source {
        name: "loss.cu",
        parts: &[COMMON, include_str!("../../cuda/loss.cu")],
        kernels: &[kernel("loss_rows")],
    },
    Source {
        name: "sample_scan.cu",
        parts: &[
            COMMON,
            include_str!("../../cuda/sample.cuh"),
            include_str!("../../cuda/sample_scan.cu"),
        ],
        kernels: &[kernel("sample_scan")],
    },
    Source {
        name: "sample_draw.cu",
        parts: &[
            COMMON,
            include_str!("../../cuda/sample.cuh"),
            include_str!("../../cuda/sample_select.cuh"),
            include_str!("../../cuda/sample_draw.cu"),
        ],
        kernels: &[kernel("sample_draw")],
    },
    Source {
        name: "optimizer.cu",
        parts: &[COMMON, include_str!("../../cuda/optimizer.cu")],
        kernels: &[
            kernel("optimizer_squares"),
            kernel("optimizer_norm"),
            kernel("optimizer_adamw"),
        ],
    },
    Source {
        name: "attention_train.cu",
        parts: &[
            COMMON,
            ATTENTION,
            include_str!("../../cuda/attention_forward.cuh"),
            include_str!("../../cuda/attention_train.cu"),
        ],
        kernels: &[
            Kernel { name: "attention_train_64", shared: attention::train_shared(64) },
            Kernel { name: "attention_train_128", shared: attention::train_shared(128) },
        ],
    },
    Source {
        name: "attention_backward.cu",
        parts: &[COMMON, ATTENTION, include_str!("../../cuda/attention_backward.cu")],
        kernels: &[
            kernel("attention_backward_sums"),
            Kernel {
                name: "attention_backward_keys_64",
                shared: attention::backward_keys_shared(64),
            },
            Kernel {
                name: "attention_backward_keys_128",
                shared: attention::backward_keys_shared(128),
            },
            Kernel {
                name: "attention_backward_queries_64",
                shared: attention::backward_queries_shared(64),
            },
            Kernel {
                name: "attention_backward_queries_128",
                shared: attention::backward_queries_shared(128),
            },
        ],
    },
    Source {
        name: "attention_paged.cu",
        parts: &[
            COMMON,
            ATTENTION,
            include_str!("../../cuda/attention_forward.cuh"),
            include_str!("../../cuda/attention_paged.cu"),
        ],
        kernels: &[
            Kernel { name: "attention_prefill_64", shared: attention::train_shared(64) },
            Kernel { name: "attention_prefill_128", shared: attention::train_shared(128) },
        ],
    },
    Source {
        name: "attention_decode.cu",
        parts: &[COMMON, ATTENTION, include_str!("../../cuda/attention_decode.cu")],
        kernels: &[
            Kernel { name: "attention_decode_64", shared: attention::decode_shared(64) },
            Kernel { name: "attention_decode_128", shared: attention::decode_shared(128) },
            kernel("attention_combine"),
        ],
    },
    Source {
        name: "smlm_shrink.cu",
        parts: &[COMMON, SMLM, include_str!("../../cuda/smlm_shrink.cu")],
        kernels: &[kernel("smlm_shrink"), kernel("smlm_shrink_few")],
    },
    Source {
        name: "smlm_expand.cu",
        parts: &[COMMON, SMLM, include_str!("../../cuda/smlm_expand.cu")],
        kernels: &[kernel("smlm_expand")],
    },
    Source {
        name: "smlm_backward.cu",
        parts: &[COMMON, SMLM, include_str!("../../cuda/smlm_backward.cu")],
        kernels: &[
            kernel("smlm_backward_s"),
            kernel("smlm_backward_round"),
            kernel("smlm_backward_x"),
        ],
    },
    Source {
        name: "smlm_gradients.cu",
        parts: &[COMMON, SMLM, include_str!("../../cuda/smlm_gradients.cu")],
        kernels: &[Kernel { name: "smlm_gradients", shared: smlm::GRADIENTS_SHARED }],
    },
];
