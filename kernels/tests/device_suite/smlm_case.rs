//! Batches of segments with adapters: their tables, runs on a device, and a plain reference with
//! its own statement of the dropout hash.

use std::fmt;

use kernels::tables::{PAGE, SegmentRow, SlotRow};
use kernels::{GroupModule, In, Module, Out, SmlmGroup};

use crate::lab::{Lab, Rng};

#[derive(Clone, Debug)]
pub struct Adapter {
    pub rank: usize,
    pub scale: f32,
    pub trained: bool,
    /// Which modules of the group are targets.
    pub targets: Vec<bool>,
    page: usize,
}

#[derive(Clone, Debug)]
pub struct Segment {
    /// First batch row.
    pub row: usize,
    pub rows: usize,
    pub adapter: Option<usize>,
    pub seed: u64,
    pub dropout: f32,
    pub position: usize,
}

#[derive(Clone)]
pub struct Case {
    pub layer: usize,
    pub input: usize,
    pub modules: Vec<GroupModule>,
    pub width: usize,
    pub rows: usize,
    pub adapters: Vec<Adapter>,
    pub segments: Vec<Segment>,
    /// NaN wherever no weight of this layer lies.
    pub pool: Vec<f64>,
    pub x: Vec<f64>,
    pub y: Vec<f64>,
    pub dy: Vec<f64>,
}

/// What names a case, not its values.
impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer, input, modules, adapters, segments, .. } = self;
        write!(f, "layer {layer}, input {input}, {modules:?}, {adapters:?}, {segments:?}")
    }
}

pub const GROUPS: [&[Module]; 4] = [
    &[Module::Q, Module::K, Module::V],
    &[Module::O],
    &[Module::Gate, Module::Up],
    &[Module::Down],
];

impl Case {
    /// Adapters are (rank, trained); segments (rows, adapter), with a stray row before every third.
    pub fn new(
        modules: &[Module],
        adapters: &[(usize, bool)],
        segments: &[(usize, Option<usize>)],
        dropout: f32,
        seed: u64,
    ) -> Self {
        let mut rng = Rng(seed);
        let (layer, input) = (rng.below(3), 1 + rng.below(60));
        let modules: Vec<_> = modules.iter().map(|module| (*module, 1 + rng.below(60))).collect();
        Self::sized(&modules, (layer, input), adapters, segments, dropout, rng.next())
    }

    /// The same with given widths.
    pub fn sized(
        modules: &[(Module, usize)],
        (layer, input): (usize, usize),
        adapters: &[(usize, bool)],
        segments: &[(usize, Option<usize>)],
        dropout: f32,
        seed: u64,
    ) -> Self {
        let mut rng = Rng(seed);
        let mut width = 0;
        let place = |(module, columns): &(Module, usize)| {
            width += columns;
            GroupModule { module: *module, column: width - columns, width: *columns }
        };
        let modules: Vec<GroupModule> = modules.iter().map(place).collect();
        let mut case = Self {
            layer,
            input,
            modules,
            width: width + 1,
            rows: 0,
            adapters: Vec::new(),
            segments: Vec::new(),
            pool: Vec::new(),
            x: Vec::new(),
            y: Vec::new(),
            dy: Vec::new(),
        };
        for (index, (rank, trained)) in adapters.iter().enumerate() {
            case.add_adapter(*rank, *trained, index == 0, &mut rng);
        }
        for (index, (rows, adapter)) in segments.iter().enumerate() {
            let row = case.rows + usize::from(index % 3 == 2);
            let (seed, position) = (rng.next(), rng.below(100));
            let (rows, adapter) = (*rows, *adapter);
            case.segments.push(Segment { row, rows, adapter, seed, dropout, position });
            case.rows = row + rows;
        }
        case.x = rng.values(case.rows * input);
        case.y = rng.values(case.rows * case.width);
        case.dy = rng.values(case.rows * case.width);
        case
    }

    fn add_adapter(&mut self, rank: usize, trained: bool, all: bool, rng: &mut Rng) {
        let targets = self.modules.iter().map(|_| all || rng.below(3) > 0).collect();
        let page = self.pool.len() / PAGE + rng.below(2);
        let scale = 0.25 + rng.below(8) as f32 / 4.0;
        self.adapters.push(Adapter { rank, scale, trained, targets, page });
        let adapter = self.adapters.len() - 1;
        let pages = ((self.layer + 1) * self.stride(adapter)).div_ceil(PAGE);
        self.pool.resize((page + pages) * PAGE, f64::NAN);
        for module in 0..self.modules.len() {
            if let Some((a, b)) = self.weights(adapter, module) {
                self.pool[a.clone()].copy_from_slice(&rng.values(a.len()));
                self.pool[b.clone()].copy_from_slice(&rng.values(b.len()));
            }
        }
    }

    fn module_size(&self, adapter: usize, module: usize) -> usize {
        match self.adapters[adapter].targets[module] {
            true => self.adapters[adapter].rank * (self.input + self.modules[module].width),
            false => 0,
        }
    }
    /// Elements of one layer, and some more that belong to other modules.
    fn stride(&self, adapter: usize) -> usize {
        (0..self.modules.len()).map(|module| self.module_size(adapter, module)).sum::<usize>() + 3
    }
    /// Where A and B of a target lie in the pool, and their gradients in the training pool.
    pub fn weights(
        &self,
        adapter: usize,
        module: usize,
    ) -> Option<(std::ops::Range<usize>, std::ops::Range<usize>)> {
        let Adapter { rank, page, ref targets, .. } = self.adapters[adapter];
        targets[module].then(|| {
            let before: usize = (0..module).map(|m| self.module_size(adapter, m)).sum();
            let a = page * PAGE + self.layer * self.stride(adapter) + before;
            let b = a + rank * self.input;
            (a..b, b..b + rank * self.modules[module].width)
        })
    }
    /// Every weight of this layer that trained segments reach.
    pub fn live(&self) -> Vec<usize> {
        let reached = |adapter: &usize| self.segments.iter().any(|s| s.adapter == Some(*adapter));
        let trained = (0..self.adapters.len()).filter(|adapter| self.adapters[*adapter].trained);
        trained
            .filter(reached)
            .flat_map(|adapter| {
                (0..self.modules.len()).filter_map(move |m| self.weights(adapter, m))
            })
            .flat_map(|(a, b)| a.chain(b))
            .collect()
    }

    /// Rows `first .. first + rows` of one segment, alone in a batch.
    pub fn part(&self, segment: usize, first: usize, rows: usize) -> Self {
        let Segment { row, position, .. } = self.segments[segment];
        let cut =
            |values: &[f64], width: usize| values[(row + first) * width..][..rows * width].to_vec();
        Self {
            rows,
            segments: vec![Segment {
                row: 0,
                rows,
                position: position + first,
                ..self.segments[segment].clone()
            }],
            x: cut(&self.x, self.input),
            y: cut(&self.y, self.width),
            dy: cut(&self.dy, self.width),
            ..self.clone()
        }
    }

    fn slots(&self) -> Vec<i32> {
        let row = |adapter: usize| {
            let Adapter { rank, scale, trained, page, .. } = self.adapters[adapter];
            let mut row = [-1; SlotRow::WIDTH];
            row[SlotRow::PAGE] = page as i32;
            row[SlotRow::RANK] = rank as i32;
            row[SlotRow::SCALE_BITS] = scale.to_bits() as i32;
            row[SlotRow::LAYER_STRIDE] = self.stride(adapter) as i32;
            row[SlotRow::GRAD_PAGE] = if trained { page as i32 } else { -1 };
            for (index, module) in self.modules.iter().enumerate() {
                if let Some((a, _)) = self.weights(adapter, index) {
                    let offset = a.start - page * PAGE - self.layer * self.stride(adapter);
                    row[SlotRow::MODULE_OFFSET + module.module.index()] = offset as i32;
                }
            }
            row
        };
        (0..self.adapters.len()).flat_map(row).collect()
    }

    /// The segment table and the number of elements of S.
    fn segment_table(&self) -> (Vec<i32>, usize) {
        let (mut table, mut s_start) = (Vec::new(), 0);
        for segment in &self.segments {
            let mut row = [0; SegmentRow::WIDTH];
            row[SegmentRow::ROW] = segment.row as i32;
            row[SegmentRow::ROWS] = segment.rows as i32;
            row[SegmentRow::SLOT] = segment.adapter.map_or(-1, |adapter| adapter as i32);
            row[SegmentRow::S_START] = s_start as i32;
            row[SegmentRow::SEED_LO] = segment.seed as i32;
            row[SegmentRow::SEED_HI] = (segment.seed >> 32) as i32;
            row[SegmentRow::DROPOUT_BITS] = segment.dropout.to_bits() as i32;
            row[SegmentRow::POSITION] = segment.position as i32;
            table.extend(row);
            s_start += segment.rows * segment.adapter.map_or(0, |a| self.adapters[a].rank);
        }
        (table, s_start * self.modules.len())
    }

    fn with_group<D: Lab, R>(&self, lab: &D, op: impl FnOnce(&SmlmGroup<'_, D>, usize) -> R) -> R {
        let (segments, s_len) = self.segment_table();
        let (pool, slots) = (lab.act(&self.pool), lab.ints(&self.slots()));
        let segments = lab.ints(&segments);
        let group = SmlmGroup {
            layer: self.layer,
            input: self.input,
            width: self.width,
            modules: &self.modules,
            pool: In::all(&pool),
            slots: In::all(&slots),
            segments: In::all(&segments),
        };
        op(&group, s_len)
    }

    /// (y, S)
    pub fn forward<D: Lab>(&self, lab: &D) -> (Vec<f64>, Vec<f64>) {
        let x = lab.act(&self.x);
        self.with_group(lab, |group, s_len| {
            let mut s = Vec::new();
            let y = lab.changed(&self.y, |y| {
                s = lab.written_partly(s_len, |s| lab.smlm(y, s, In::all(&x), group).unwrap());
            });
            (y, s)
        })
    }

    /// (dx added to `dx`, gradients added to `grads`)
    pub fn backward<D: Lab>(&self, lab: &D, dx: &[f64], grads: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let s = lab.act(&self.forward(lab).1);
        let (x, dy) = (lab.act(&self.x), lab.act(&self.dy));
        self.with_group(lab, |group, _| {
            let (mut grads_after, mut grads_alone) = (Vec::new(), lab.wide(grads));
            let dx = lab.changed(dx, |dx| {
                grads_after = lab.changed_wide(grads, |grads| {
                    let (dy, x, s) = (In::all(&dy), In::all(&x), In::all(&s));
                    lab.smlm_backward(Some(dx), grads, dy, x, s, group).unwrap();
                });
            });
            let (dy, x, s) = (In::all(&dy), In::all(&x), In::all(&s));
            lab.smlm_backward(None, Out::all(&mut grads_alone), dy, x, s, group).unwrap();
            crate::lab::assert_bits("without dx", &lab.read_wide(&grads_alone), &grads_after);
            (dx, grads_after)
        })
    }

    /// y as plain loops give it.
    pub fn reference(&self) -> Vec<f64> {
        let mut y = self.y.clone();
        for segment in &self.segments {
            let Some(adapter) = segment.adapter else { continue };
            let Adapter { rank, scale, .. } = self.adapters[adapter];
            for (index, module) in self.modules.iter().enumerate() {
                let Some((a, b)) = self.weights(adapter, index) else { continue };
                let (a, b) = (&self.pool[a], &self.pool[b]);
                for row in 0..segment.rows {
                    let x: Vec<f64> = (0..self.input)
                        .map(|column| {
                            let x = self.x[(segment.row + row) * self.input + column];
                            x * self.dropout_factor(segment, row, module.module, column)
                        })
                        .collect();
                    let s: Vec<f64> =
                        a.chunks(self.input).map(|a| crate::lab::inner(a, &x)).collect();
                    let y = &mut y[(segment.row + row) * self.width + module.column..];
                    for (y, b) in y.iter_mut().zip(b.chunks(rank)) {
                        *y += f64::from(scale) * crate::lab::inner(b, &s);
                    }
                }
            }
        }
        y
    }

    /// 0, or 1 / (1 − p): the hash absorbs one word per round, `h = mix((h + φ) xor word)`.
    fn dropout_factor(&self, segment: &Segment, row: usize, module: Module, column: usize) -> f64 {
        let words = [
            segment.seed as u32,
            (segment.seed >> 32) as u32,
            (segment.position + row) as u32,
            self.layer as u32,
            module.index() as u32,
            column as u32,
        ];
        let hash = words.into_iter().fold(0u32, |hash, word| {
            let mut h = hash.wrapping_add(0x9e37_79b9) ^ word;
            h = (h ^ (h >> 16)).wrapping_mul(0x7feb_352d);
            h = (h ^ (h >> 15)).wrapping_mul(0x846c_a68b);
            h ^ (h >> 16)
        });
        let draw = f64::from(hash >> 8) / f64::from(1 << 24);
        let probability = f64::from(segment.dropout);
        if draw < probability { 0.0 } else { 1.0 / (1.0 - probability) }
    }
}
