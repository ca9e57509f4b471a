//! Shapes and grouped arguments of the operations of [`Device`].

use crate::device::Device;
use crate::view::{In, Out};

/// Rows and heads of an attention call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadShape {
    /// Query heads (Q).
    pub q_heads: usize,
    /// Key/value heads (K); divides `q_heads`.
    pub kv_heads: usize,
    /// Head dimension (D), even.
    pub head_dim: usize,
}

impl HeadShape {
    /// Width of a fused query/key/value row: `(Q + 2K) * D`.
    #[inline]
    pub fn qkv_width(&self) -> usize {
        (self.q_heads + 2 * self.kv_heads) * self.head_dim
    }
    /// Width of the query part: `Q * D`.
    #[inline]
    pub fn q_width(&self) -> usize {
        self.q_heads * self.head_dim
    }
    /// Width of the key (or value) part: `K * D`.
    #[inline]
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// QK norm weights of one layer (Qwen3): each `(D)`.
pub struct QkNorm<'a, D: Device> {
    /// RMSNorm weight of query heads.
    pub q: In<'a, D::Act>,
    /// RMSNorm weight of key heads.
    pub k: In<'a, D::Act>,
    /// Added to the mean square.
    pub eps: f64,
}

/// Rotary tables `(max_positions, D/2)` each, rotate-half convention of Hugging Face.
pub struct Rope<'a, D: Device> {
    /// Cosines, already times the attention factor.
    pub cos: In<'a, D::Wide>,
    /// Sines, likewise.
    pub sin: In<'a, D::Wide>,
    /// One position per row `(N)`.
    pub positions: In<'a, D::Int>,
}

/// One layer's paged key/value cache: each `(blocks * block_size, K * D)`.
pub struct KvOut<'a, D: Device> {
    /// Keys after rotation.
    pub k: Out<'a, D::Act>,
    /// Values.
    pub v: Out<'a, D::Act>,
    /// Destination row of each batch row `(N)`, −1: this row is not cached.
    pub rows: In<'a, D::Int>,
}

/// What paged attention reads beside the queries.
pub struct PagedKv<'a, D: Device> {
    /// Keys `(blocks * block_size, K * D)`.
    pub k: In<'a, D::Act>,
    /// Values, same shape.
    pub v: In<'a, D::Act>,
    /// Sequence table, see [`crate::tables::SequenceRow`].
    pub sequences: In<'a, D::Int>,
    /// Concatenated block numbers of the sequences.
    pub blocks: In<'a, D::Int>,
    /// Rows of one block.
    pub block_size: usize,
}

/// Adam's constants for one optimizer step of one adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step, schedule applied.
    pub learning_rate: f64,
    /// First-moment decay.
    pub beta1: f64,
    /// Second-moment decay.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay (Loshchilov & Hutter 2019).
    pub weight_decay: f64,
    /// Largest allowed gradient norm; 0 turns clipping off.
    pub max_grad_norm: f64,
    /// Step number from 1, for bias correction.
    pub step: u64,
}

/// One adapter's optimizer state, all flat in the adapter's canonical layout, equal lengths.
pub struct AdamWState<'a, D: Device> {
    /// Master weights.
    pub params: Out<'a, D::Wide>,
    /// Summed gradients; zeroed by the caller before the next step.
    pub grads: In<'a, D::Wide>,
    /// First moments.
    pub m: Out<'a, D::Wide>,
    /// Second moments.
    pub v: Out<'a, D::Wide>,
    /// Compute copy in the adapter pool, rewritten from the masters.
    pub weights: Out<'a, D::Act>,
    /// `(2)`: gradient norm, and 1 where it is finite else 0; made by [`Device::grad_norm`].
    pub norm: In<'a, D::Wide>,
}

/// Arguments of [`Device::lm_head_loss`].
pub struct LossArgs<'a, D: Device> {
    /// Summed cross-entropy per row `(N)`, not scaled.
    pub loss: Out<'a, D::Wide>,
    /// 1 where the arg max equals the label, else 0, per row `(N)`.
    pub correct: Out<'a, D::Int>,
    /// Gradient of `scale * loss` to the hidden rows `(N, H)`; absent: evaluation.
    pub d_hidden: Option<Out<'a, D::Act>>,
    /// Final-normed hidden rows `(N, H)`.
    pub hidden: In<'a, D::Act>,
    /// Output weights `(V, H)`.
    pub lm_head: In<'a, D::Act>,
    /// Label of each row `(N)`, all valid.
    pub labels: In<'a, D::Int>,
    /// Factor of each row in the gradient `(N)`: 1 / trained tokens of its optimizer step.
    pub scale: In<'a, D::Wide>,
    /// Scratch for logits of one chunk of rows, at least `(1, V)`; its length sets the chunk.
    pub logits: Out<'a, D::Act>,
}

/// Sizes of a linear layer call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// Rows (N).
    pub rows: usize,
    /// Input width.
    pub input: usize,
    /// Output width.
    pub output: usize,
}
