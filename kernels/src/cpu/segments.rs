//! Reads the segment and slot tables: which rows, which adapter, where its weights lie.

use super::Host;
use super::float::Float;
use super::random::DropoutRow;
use crate::ROW_TILE;
use crate::tables::{GroupModule, PAGE, SegmentRow, SlotRow, SmlmGroup};

/// One row of the segment table.
#[derive(Clone, Copy)]
pub(super) struct Segment {
    pub row: usize,
    pub rows: usize,
    slot: Option<usize>,
    s_start: usize,
    seed: [u32; 2],
    dropout: f32,
    position: u32,
}

impl Segment {
    fn read(table: &[i32]) -> Self {
        Self {
            row: table[SegmentRow::ROW] as usize,
            rows: table[SegmentRow::ROWS] as usize,
            slot: usize::try_from(table[SegmentRow::SLOT]).ok(),
            s_start: table[SegmentRow::S_START] as usize,
            seed: [table[SegmentRow::SEED_LO] as u32, table[SegmentRow::SEED_HI] as u32],
            dropout: f32::from_bits(table[SegmentRow::DROPOUT_BITS] as u32),
            position: table[SegmentRow::POSITION] as u32,
        }
    }
    /// First rows, counted in the segment, of its tiles.
    pub fn tiles(&self) -> impl Iterator<Item = usize> + use<> {
        (0..self.rows).step_by(ROW_TILE)
    }
}

/// One module of one segment's adapter.
#[derive(Clone, Copy)]
pub(super) struct Lora<'a, T> {
    /// A `(R, in)`.
    pub a: &'a [T],
    /// B `(out, R)`.
    pub b: &'a [T],
    pub rank: usize,
    pub scale: T,
    /// Where the gradient of A starts in the training pool; that of B follows. None: not trained.
    pub grad: Option<usize>,
}

/// An [`SmlmGroup`] as slices.
pub(super) struct Group<'a, T> {
    pub layer: usize,
    pub input: usize,
    pub width: usize,
    pub modules: &'a [GroupModule],
    pool: &'a [T],
    slots: &'a [i32],
}

/// The tables of a group, read once per call.
pub(super) struct Tables<'a, T: Float> {
    pub group: Group<'a, T>,
    pub segments: Vec<Segment>,
}

impl<'a, T: Float> Tables<'a, T> {
    pub fn read<D: Host<T>>(group: &SmlmGroup<'a, D>) -> Self {
        let rows = group.segments.slice().chunks_exact(SegmentRow::WIDTH);
        let segments = rows.map(Segment::read).collect();
        let &SmlmGroup { layer, input, width, modules, pool, slots, .. } = group;
        let group =
            Group { layer, input, width, modules, pool: pool.slice(), slots: slots.slice() };
        Self { group, segments }
    }

    /// Every tile of every segment that has a slot: (segment, its first row in the segment).
    pub fn tiles(&self) -> Vec<(Segment, usize)> {
        let with_slot = self.segments.iter().filter(|segment| segment.slot.is_some());
        with_slot.flat_map(|segment| segment.tiles().map(|first| (*segment, first))).collect()
    }

    /// Scalar operations per pass over A and B of all segments, roughly.
    pub fn work(&self) -> usize {
        let work = |segment: &Segment| {
            let adapted = |module| self.lora(segment, module).map_or(0, |lora| lora.rank);
            let ranks: usize = self.group.modules.iter().map(adapted).sum();
            2 * segment.rows.next_multiple_of(ROW_TILE) * ranks
        };
        self.segments.iter().map(work).sum::<usize>() * (self.group.input + self.group.width)
    }

    /// Weights of `module` for `segment`; None where it has no slot or the module is no target.
    #[inline]
    pub fn lora(&self, segment: &Segment, module: &GroupModule) -> Option<Lora<'a, T>> {
        let slots = self.group.slots;
        let slot = &slots[segment.slot? * SlotRow::WIDTH..][..SlotRow::WIDTH];
        let offset = usize::try_from(slot[SlotRow::MODULE_OFFSET + module.module.index()]).ok()?;
        let offset = offset + self.group.layer * slot[SlotRow::LAYER_STRIDE] as usize;
        let rank = slot[SlotRow::RANK] as usize;
        let weights = &self.group.pool[slot[SlotRow::PAGE] as usize * PAGE + offset..];
        let (a, b) = weights.split_at(rank * self.group.input);
        let grad_page = usize::try_from(slot[SlotRow::GRAD_PAGE]).ok();
        Some(Lora {
            a,
            b: &b[..module.width * rank],
            rank,
            scale: T::from_f32(f32::from_bits(slot[SlotRow::SCALE_BITS] as u32)),
            grad: grad_page.map(|page| page * PAGE + offset),
        })
    }

    /// Where element `(row, module, 0)` of S lies.
    pub fn s_index(&self, segment: &Segment, row: usize, module: usize, rank: usize) -> usize {
        let modules = self.group.modules.len();
        segment.s_start * modules + (row * modules + module) * rank
    }

    /// Dropout of one module's input.
    pub fn dropout(&self, segment: &Segment, module: &GroupModule) -> Dropout<T> {
        let [seed_lo, seed_hi] = segment.seed;
        Dropout {
            words: [
                seed_lo,
                seed_hi,
                segment.position,
                self.group.layer as u32,
                module.module.index() as u32,
            ],
            probability: segment.dropout,
            kept_scale: T::from_f64(1.0 / (1.0 - f64::from(segment.dropout))),
        }
    }
}

/// The dropout mask of one module over a segment.
#[derive(Clone, Copy)]
pub(super) struct Dropout<T> {
    words: [u32; 5],
    probability: f32,
    kept_scale: T,
}

impl<T: Float> Dropout<T> {
    /// Whether nothing is dropped.
    pub fn is_off(&self) -> bool {
        self.probability <= 0.0
    }
    /// The mask of one row of the segment.
    #[inline(always)]
    pub fn row(&self, row: usize) -> DropoutRow {
        let [seed_lo, seed_hi, position, layer, module] = self.words;
        let position = position.wrapping_add(row as u32);
        DropoutRow::new([seed_lo, seed_hi, position, layer, module], self.probability)
    }
    /// `value` as dropout leaves it: zero, or scaled up.
    #[inline(always)]
    pub fn apply(&self, mask: DropoutRow, column: usize, value: T) -> T {
        match self.is_off() {
            true => value,
            false if mask.keeps(column) => value * self.kept_scale,
            false => T::ZERO,
        }
    }
}
