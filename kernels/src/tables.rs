//! Layouts of the integer and float tables that tell an operation what the batch holds.
//!
//! The host fills them once per step; every layer's ops read the same ones. A row of a table is a
//! fixed number of i32 (or wide) values; the constants below name the columns.

use crate::device::Device;
use crate::view::{In, Out};

/// The seven linear modules of a decoder layer that an adapter may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Module {
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Attention output projection.
    O,
    /// Gate projection of the feed-forward.
    Gate,
    /// Up projection.
    Up,
    /// Down projection.
    Down,
}

impl Module {
    /// All modules in canonical order.
    pub const ALL: [Module; 7] =
        [Module::Q, Module::K, Module::V, Module::O, Module::Gate, Module::Up, Module::Down];
    /// Position in [`Module::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }
}

/// Columns of the slot table, `SlotRow::WIDTH` i32 per slot.
///
/// An adapter is one flat run of the pool in canonical layout: layers ascending; in a layer its
/// target modules in [`Module::ALL`] order; of a module first A `(R, in)`, then B `(out, R)`, both
/// row-major. The element where A of `module` in `layer` starts is
/// `page * PAGE + layer * layer_stride + module_offset[module]`.
pub struct SlotRow;

impl SlotRow {
    /// i32 values per row.
    pub const WIDTH: usize = 12;
    /// First page of the run in the adapter pool.
    pub const PAGE: usize = 0;
    /// True rank R.
    pub const RANK: usize = 1;
    /// Bits of the f32 scale (alpha / R, or alpha / sqrt(R) for rsLoRA).
    pub const SCALE_BITS: usize = 2;
    /// Elements from one layer to the next.
    pub const LAYER_STRIDE: usize = 3;
    /// First page of the run in the training pool (gradients); −1 when not training.
    pub const GRAD_PAGE: usize = 4;
    /// Seven columns: offset of a module's A in its layer, −1 when it is no target.
    pub const MODULE_OFFSET: usize = 5;
}

/// Elements of a page of the adapter pool and of the training pool.
pub const PAGE: usize = 4096;

/// Columns of the segment table, `SegmentRow::WIDTH` i32 per segment.
///
/// A segment is a run of batch rows with one slot; in training it is (a chunk of) one example.
/// Segments are ascending and do not overlap; rows may belong to none.
pub struct SegmentRow;

impl SegmentRow {
    /// i32 values per row.
    pub const WIDTH: usize = 8;
    /// First batch row.
    pub const ROW: usize = 0;
    /// Number of rows.
    pub const ROWS: usize = 1;
    /// Slot, −1: base only.
    pub const SLOT: usize = 2;
    /// Where its part of S starts, in units of (rank × row): see [`SmlmGroup`].
    pub const S_START: usize = 3;
    /// Low and high halves of the dropout seed, a hash of (job seed, optimizer step, example). An
    /// input is dropped by a hash of (low, high, position, layer, module, column): every module of
    /// a group has a mask of its own.
    pub const SEED_LO: usize = 4;
    /// High half.
    pub const SEED_HI: usize = 5;
    /// Bits of the f32 dropout probability, 0.0: none.
    pub const DROPOUT_BITS: usize = 6;
    /// Position in its example (or sequence) of the segment's first row.
    pub const POSITION: usize = 7;
}

/// Columns of the sequence table of paged attention.
pub struct SequenceRow;

impl SequenceRow {
    /// i32 values per row.
    pub const WIDTH: usize = 4;
    /// First batch row of the sequence.
    pub const ROW: usize = 0;
    /// Number of rows.
    pub const ROWS: usize = 1;
    /// Position of its first row, that is tokens already cached before this step.
    pub const POSITION: usize = 2;
    /// Where its block numbers start in the block list.
    pub const BLOCKS: usize = 3;
}

/// One module of a group: where its columns lie in the group's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupModule {
    /// Which module.
    pub module: Module,
    /// First output column.
    pub column: usize,
    /// Number of output columns.
    pub width: usize,
}

/// A group of modules that share an input (q/k/v; o; gate/up; down), for one layer.
///
/// S of segment g holds, for each of its rows, `modules.len()` runs of its rank: element
/// `(row, m, j)` lies at `S_START(g) * modules.len() + (row * modules.len() + m) * R + j`.
/// Host code gives each segment `S_START` = sum over earlier segments of rows × rank.
pub struct SmlmGroup<'a, D: Device> {
    /// Layer number.
    pub layer: usize,
    /// Width of the shared input.
    pub input: usize,
    /// Width of an output row.
    pub width: usize,
    /// The modules.
    pub modules: &'a [GroupModule],
    /// Weights of all resident adapters.
    pub pool: In<'a, D::Act>,
    /// Slot table.
    pub slots: In<'a, D::Int>,
    /// Segment table; its length gives the number of segments.
    pub segments: In<'a, D::Int>,
}

/// Float columns of one sampled row, `SampleRow::WIDE` wide values per row.
///
/// Repetition, frequency and presence penalties come first, then biases. Greedy where temperature
/// or top-p is not above 0. Else min-p and top-k cut the sorted list, and top-p what they leave.
/// NaN logits count as −∞; where no token is possible, token 0 is drawn with log-probability −∞.
pub struct SampleRow;

impl SampleRow {
    /// Wide values per row.
    pub const WIDE: usize = 6;
    /// Temperature; 0 is greedy.
    pub const TEMPERATURE: usize = 0;
    /// Nucleus mass; 1 off.
    pub const TOP_P: usize = 1;
    /// Least probability relative to the largest; 0 off.
    pub const MIN_P: usize = 2;
    /// Subtracted once from logits of generated tokens.
    pub const PRESENCE: usize = 3;
    /// Subtracted per occurrence from logits of generated tokens.
    pub const FREQUENCY: usize = 4;
    /// Divides positive, multiplies negative logits of tokens in prompt or output; 1 off.
    pub const REPETITION: usize = 5;

    /// i32 values per row.
    pub const INT: usize = 8;
    /// Low half of the seed (already derived per choice).
    pub const SEED_LO: usize = 0;
    /// High half.
    pub const SEED_HI: usize = 1;
    /// Index of the generated token: randomness is a function of (seed, this).
    pub const POSITION: usize = 2;
    /// Keep the k likeliest; 0 off.
    pub const TOP_K: usize = 3;
    /// Where this row's entries of the history list start.
    pub const HISTORY: usize = 4;
    /// Number of history entries.
    pub const HISTORY_LEN: usize = 5;
    /// Where this row's bias entries start.
    pub const BIAS: usize = 6;
    /// Number of bias entries.
    pub const BIAS_LEN: usize = 7;
}

/// What sampling reads beside the logits.
pub struct SampleArgs<'a, D: Device> {
    /// `(N, SampleRow::WIDE)`.
    pub wide: In<'a, D::Wide>,
    /// `(N, SampleRow::INT)`.
    pub int: In<'a, D::Int>,
    /// History: pairs (token, count among generated; 0 = in the prompt only).
    pub history: In<'a, D::Int>,
    /// Biased token ids.
    pub bias_ids: In<'a, D::Int>,
    /// Their biases, added to the logits (−100 and below bans the token).
    pub bias: In<'a, D::Wide>,
}

/// Results of sampling.
pub struct SampleOut<'a, D: Device> {
    /// Drawn token per row `(N)`.
    pub tokens: Out<'a, D::Int>,
    /// Log-softmax of the raw logits at the drawn token `(N)`.
    pub logprobs: Out<'a, D::Wide>,
    /// Ids of the `top` likeliest raw tokens per row, descending, ties by lower id `(N, top)`; −1
    /// (and −∞) where the vocabulary ends before.
    pub top_ids: Out<'a, D::Int>,
    /// Their log-probabilities `(N, top)`.
    pub top_logprobs: Out<'a, D::Wide>,
}

/// Sizes of a sampling call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleShape {
    /// Rows (N).
    pub rows: usize,
    /// Vocabulary (V).
    pub vocab: usize,
    /// Alternatives reported per row, 0–20.
    pub top: usize,
}
