//! The [`Device`] trait: the fused operations the model is written in.
//!
//! Policy:
//! - An operation *enqueues*; only [`Ticket::wait`] blocks. On the CPU everything is done at once.
//! - Outputs are parameters; nothing is allocated inside a step. Shapes are explicit arguments.
//! - All that varies from batch to batch (segments, slots, positions, block tables) is read from
//!   integer buffers in device memory, never from host arguments, so that a recorded graph stays
//!   valid when adapters come and go. The layouts of those buffers are in [`crate::tables`].
//! - Forward stands beside backward. An op documents what it accumulates; the rest overwrites.
//! - Activation gradients overwrite, except where an op says "adds to".
//! - Weights of linear layers are `(out, in)` row-major, as Hugging Face stores them.
//!
//! Letters: N rows, H hidden, Q and K query and key/value heads, D head dim, F ffn, V vocabulary,
//! R rank.

use crate::arguments::{
    AdamW, AdamWState, HeadShape, KvOut, LinearShape, LossArgs, PagedKv, QkNorm, Rope,
};
use crate::tables::{SampleShape, SmlmGroup};
use crate::view::{In, Out};
use crate::{Result, Ticket};

/// A block of device memory holding elements of one type.
pub trait Buffer {
    /// Number of elements.
    fn len(&self) -> usize;
    /// Whether the buffer holds no element.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What [`Device::memory`] reports, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Not taken by anyone.
    pub free: u64,
    /// In all.
    pub total: u64,
}

/// A device that runs the model. Implemented by [`crate::cpu::Cpu`], the readable specification.
pub trait Device: Sized + Send + 'static {
    /// Activations and weights: compute precision (f32 or f64 on the CPU, bf16 on CUDA).
    type Act: Buffer + Send;
    /// Master weights, moments, gradients, losses, rotary tables: at least f32.
    type Wide: Buffer + Send;
    /// Indices and tables: i32.
    type Int: Buffer + Send;

    /// Short name for logs and `/v1/workers`, for example `cpu` or `cuda:0 NVIDIA H200`.
    fn name(&self) -> String;
    /// Goes into `system_fingerprint`: changes when results may change (kernels, precision).
    fn numerics(&self) -> String;

    /// Bytes free and in all, where the device says so: the basis of the memory plan.
    fn memory(&self) -> Result<Option<Memory>>;

    // ---- memory: only at start ----

    /// Takes `len` zeroed elements. Errors when memory runs out.
    fn alloc_act(&self, len: usize) -> Result<Self::Act>;
    /// As [`Device::alloc_act`].
    fn alloc_wide(&self, len: usize) -> Result<Self::Wide>;
    /// As [`Device::alloc_act`].
    fn alloc_int(&self, len: usize) -> Result<Self::Int>;

    // ---- transfers ----

    /// Host f32 → activations, rounded to compute precision. Enqueued; `src` may be reused at
    /// return.
    fn upload_act(&self, dst: Out<'_, Self::Act>, src: &[f32]) -> Result<()>;
    /// Host bf16 bits → activations: base weights as files hold them.
    fn upload_act_bf16(&self, dst: Out<'_, Self::Act>, src: &[half::bf16]) -> Result<()>;
    /// Host f32 → wide.
    fn upload_wide(&self, dst: Out<'_, Self::Wide>, src: &[f32]) -> Result<()>;
    /// Host → integers.
    fn upload_int(&self, dst: Out<'_, Self::Int>, src: &[i32]) -> Result<()>;
    /// Activations → host f32, after everything enqueued before.
    fn download_act(&self, src: In<'_, Self::Act>) -> Result<Ticket<Vec<f32>>>;
    /// Wide → host f32.
    fn download_wide(&self, src: In<'_, Self::Wide>) -> Result<Ticket<Vec<f32>>>;
    /// Integers → host.
    fn download_int(&self, src: In<'_, Self::Int>) -> Result<Ticket<Vec<i32>>>;
    /// Device copy of activations, equal lengths.
    fn copy_act(&self, dst: Out<'_, Self::Act>, src: In<'_, Self::Act>) -> Result<()>;
    /// Device copy within one buffer: `len` elements from `from` to `to`, ranges may overlap.
    fn move_act(&self, buffer: &mut Self::Act, from: usize, to: usize, len: usize) -> Result<()>;
    /// As [`Device::move_act`].
    fn move_wide(&self, buffer: &mut Self::Wide, from: usize, to: usize, len: usize) -> Result<()>;
    /// Device copy of wide values, equal lengths.
    fn copy_wide(&self, dst: Out<'_, Self::Wide>, src: In<'_, Self::Wide>) -> Result<()>;
    /// Wide → compute precision, equal lengths.
    fn narrow(&self, dst: Out<'_, Self::Act>, src: In<'_, Self::Wide>) -> Result<()>;
    /// Sets every element to `value` (zero, or NaN as poison in tests).
    fn fill_act(&self, dst: Out<'_, Self::Act>, value: f32) -> Result<()>;
    /// As [`Device::fill_act`].
    fn fill_wide(&self, dst: Out<'_, Self::Wide>, value: f32) -> Result<()>;

    /// Sets element `i` to `bound · (2u − 1)` with u in [0, 1) a hash of (seed, i), rounded to
    /// compute precision: the same values on every device.
    fn fill_uniform(&self, dst: Out<'_, Self::Act>, seed: u64, bound: f32) -> Result<()>;

    /// Seconds since the device was opened at which everything enqueued so far will have ended.
    fn mark(&self) -> Result<Ticket<f64>>;

    /// Whether the device records graphs and works while the host goes on: then steps that only
    /// decode are padded to few sizes, and steps are launched before results are handed out.
    fn graphs(&self) -> bool {
        false
    }
    /// Runs `ops`, or replays the graph recorded under `key`. On the CPU it just runs them.
    fn replay(&self, key: u64, ops: &mut dyn FnMut(&Self) -> Result<()>) -> Result<()>;

    // ---- embedding, norms ----

    /// `x[i] = table[ids[i]]`; x `(N, H)`, table `(V, H)`, ids `(N)`.
    fn embed(
        &self,
        x: Out<'_, Self::Act>,
        table: In<'_, Self::Act>,
        ids: In<'_, Self::Int>,
        hidden: usize,
    ) -> Result<()>;

    /// RMSNorm (Zhang & Sennrich 2019): `y = x / sqrt(mean(x²) + eps) * weight`, rows of width H.
    fn rms_norm(
        &self,
        y: Out<'_, Self::Act>,
        x: In<'_, Self::Act>,
        weight: In<'_, Self::Act>,
        eps: f64,
    ) -> Result<()>;
    /// `x += delta`, then `y = rms_norm(x)`. The residual stream's only writer.
    fn add_rms_norm(
        &self,
        y: Out<'_, Self::Act>,
        x: Out<'_, Self::Act>,
        delta: In<'_, Self::Act>,
        weight: In<'_, Self::Act>,
        eps: f64,
    ) -> Result<()>;
    /// Adds to `dx` the gradient through [`Device::rms_norm`] (the residual stream accumulates).
    fn rms_norm_backward(
        &self,
        dx: Out<'_, Self::Act>,
        dy: In<'_, Self::Act>,
        x: In<'_, Self::Act>,
        weight: In<'_, Self::Act>,
        eps: f64,
    ) -> Result<()>;
    /// `x += delta`, equal lengths.
    fn add(&self, x: Out<'_, Self::Act>, delta: In<'_, Self::Act>) -> Result<()>;

    // ---- linear and SMLM ----

    /// `y = x Wᵀ + bias`; x `(N, in)`, W `(out, in)`, bias `(out)`, y `(N, out)`.
    fn linear(
        &self,
        y: Out<'_, Self::Act>,
        x: In<'_, Self::Act>,
        weight: In<'_, Self::Act>,
        bias: Option<In<'_, Self::Act>>,
        shape: LinearShape,
    ) -> Result<()>;
    /// `dx = dy W`; the base is frozen, so there is no dW.
    fn linear_backward(
        &self,
        dx: Out<'_, Self::Act>,
        dy: In<'_, Self::Act>,
        weight: In<'_, Self::Act>,
        shape: LinearShape,
    ) -> Result<()>;

    /// Segmented multi-LoRA multiplication of all modules of `group` for all its segments:
    /// `S = drop(x) Aᵀ`, `y += scale · S Bᵀ`. x `(N, in)`, y `(N, group.width)`, s as
    /// [`SmlmGroup`] says. Rows of segments without a slot are untouched.
    fn smlm(
        &self,
        y: Out<'_, Self::Act>,
        s: Out<'_, Self::Act>,
        x: In<'_, Self::Act>,
        group: &SmlmGroup<'_, Self>,
    ) -> Result<()>;
    /// Backward of [`Device::smlm`]: `dS = scale · dy B`, `dB += scale · dyᵀ S`,
    /// `dA += dSᵀ drop(x)`, and, where `dx` is given, adds `drop'(dS A)` to it.
    /// `grads` is the training pool's gradient buffer; partial sums per
    /// (segment, [`crate::ROW_TILE`] rows from its start) are added in segment order.
    fn smlm_backward(
        &self,
        dx: Option<Out<'_, Self::Act>>,
        grads: Out<'_, Self::Wide>,
        dy: In<'_, Self::Act>,
        x: In<'_, Self::Act>,
        s: In<'_, Self::Act>,
        group: &SmlmGroup<'_, Self>,
    ) -> Result<()>;

    // ---- attention ----

    /// In place on fused rows `qkv (N, (Q+2K)·D)`: QK norm where given, then rotary embedding of
    /// the query and key parts; then the key and value parts are written to the cache.
    fn qk_norm_rope_kv_write(
        &self,
        qkv: Out<'_, Self::Act>,
        kv: Option<KvOut<'_, Self>>,
        norm: Option<&QkNorm<'_, Self>>,
        rope: &Rope<'_, Self>,
        heads: HeadShape,
    ) -> Result<()>;
    /// Backward of the norm and rotation, in place on `d_qkv`. `qkv_raw` holds the rows before
    /// the norm; it is read only where `norm` is given.
    fn qk_norm_rope_backward(
        &self,
        d_qkv: Out<'_, Self::Act>,
        qkv_raw: Option<In<'_, Self::Act>>,
        norm: Option<&QkNorm<'_, Self>>,
        rope: &Rope<'_, Self>,
        heads: HeadShape,
    ) -> Result<()>;

    /// Causal attention of training rows. `o (n, Q·D)` and `lse (n, Q)` (natural log of the sum of
    /// exponents of scaled scores) for rows `[first, first + n)` of the micro-batch; `qkv` is the
    /// arena `(rows, (Q+2K)·D)` after rotation, filled at least up to row `first + n`. `examples`
    /// gives for every arena row the arena row where its example starts `(rows)`: a row attends to
    /// its example from that start to itself.
    fn attention_train(
        &self,
        o: Out<'_, Self::Act>,
        lse: Out<'_, Self::Wide>,
        qkv: In<'_, Self::Act>,
        examples: In<'_, Self::Int>,
        first: usize,
        heads: HeadShape,
    ) -> Result<()>;
    /// Backward of [`Device::attention_train`] over all rows of the micro-batch:
    /// `d_qkv (rows, (Q+2K)·D)` before the rotation is undone.
    fn attention_train_backward(
        &self,
        d_qkv: Out<'_, Self::Act>,
        d_o: In<'_, Self::Act>,
        qkv: In<'_, Self::Act>,
        o: In<'_, Self::Act>,
        lse: In<'_, Self::Wide>,
        examples: In<'_, Self::Int>,
        heads: HeadShape,
    ) -> Result<()>;
    /// Causal attention of prefill and decode rows over the paged cache, which already holds these
    /// rows' own keys. `qkv (N, (Q+2K)·D)` gives the queries; rows outside every sequence of the
    /// table are untouched. o `(N, Q·D)`.
    fn attention_paged(
        &self,
        o: Out<'_, Self::Act>,
        qkv: In<'_, Self::Act>,
        kv: &PagedKv<'_, Self>,
        heads: HeadShape,
    ) -> Result<()>;

    // ---- feed-forward ----

    /// SwiGLU: `y = silu(gate) * up`; `gate_up (N, 2F)` holds gate then up, y `(N, F)`.
    fn silu_mul(&self, y: Out<'_, Self::Act>, gate_up: In<'_, Self::Act>, ffn: usize)
    -> Result<()>;
    /// Backward of [`Device::silu_mul`]: `d_gate_up (N, 2F)` from `dy (N, F)`.
    fn silu_mul_backward(
        &self,
        d_gate_up: Out<'_, Self::Act>,
        dy: In<'_, Self::Act>,
        gate_up: In<'_, Self::Act>,
        ffn: usize,
    ) -> Result<()>;

    // ---- rows, loss, sampling ----

    /// `y[i] = x[rows[i]]`, rows of width `width`.
    fn gather_rows(
        &self,
        y: Out<'_, Self::Act>,
        x: In<'_, Self::Act>,
        rows: In<'_, Self::Int>,
        width: usize,
    ) -> Result<()>;
    /// `y[rows[i]] = x[i]`; `rows` has no value twice. Other rows of `y` are untouched.
    fn scatter_rows(
        &self,
        y: Out<'_, Self::Act>,
        x: In<'_, Self::Act>,
        rows: In<'_, Self::Int>,
        width: usize,
    ) -> Result<()>;
    /// Output head and cross-entropy over labelled rows, logits never whole (row chunks).
    fn lm_head_loss(&self, args: LossArgs<'_, Self>, hidden: usize, vocab: usize) -> Result<()>;
    /// Draws one token per row from `logits (N, V)`, which it may overwrite. See
    /// [`crate::tables::SampleRow`] for parameters and [`SampleShape`] for outputs.
    fn sample(
        &self,
        out: crate::tables::SampleOut<'_, Self>,
        logits: Out<'_, Self::Act>,
        args: &crate::tables::SampleArgs<'_, Self>,
        shape: SampleShape,
    ) -> Result<()>;

    // ---- optimizer ----

    /// `norm = [‖grads‖₂, finite ? 1 : 0]`, summed in a fixed order.
    fn grad_norm(&self, norm: Out<'_, Self::Wide>, grads: In<'_, Self::Wide>) -> Result<()>;
    /// One AdamW step; nothing changes where `state.norm` says the gradient is not finite.
    fn adamw(&self, state: AdamWState<'_, Self>, step: AdamW) -> Result<()>;
}
