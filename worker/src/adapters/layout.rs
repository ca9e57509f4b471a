//! Where each number of an adapter lies: one flat run in canonical order, as
//! [`kernels::tables::SlotRow`] defines it. Everything that holds adapter values uses this order.

use kernels::Module;
use kernels::tables::{PAGE, SlotRow};

use crate::base::{ModuleDims, module_path};

/// Largest rank.
pub const RANK_LIMIT: usize = 256;

/// Why there can be no such adapter.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ShapeError {
    /// Rank out of range.
    #[error("rank {0} is not within 1 to {RANK_LIMIT}")]
    Rank(usize),
    /// Alpha is not a positive number.
    #[error("alpha {0} is not a finite number above 0")]
    Alpha(f64),
    /// No module is changed.
    #[error("no target module is named")]
    NoTarget,
}

/// What a LoRA adapter changes and how strongly.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterShape {
    /// Rank (R), 1 to 256.
    pub rank: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Whether the scale divides by the root of the rank (rsLoRA, Kalajdzievski 2023).
    pub use_rslora: bool,
    /// Changed modules, in [`Module::ALL`] order, each once, in every layer.
    pub targets: Vec<Module>,
}

impl AdapterShape {
    /// Checks the values and sorts the targets.
    pub fn new(
        rank: usize,
        alpha: f64,
        use_rslora: bool,
        mut targets: Vec<Module>,
    ) -> Result<Self, ShapeError> {
        if !(1..=RANK_LIMIT).contains(&rank) {
            return Err(ShapeError::Rank(rank));
        }
        // Devices hold the scale as f32.
        if !((alpha as f32).is_finite() && alpha as f32 > 0.0) {
            return Err(ShapeError::Alpha(alpha));
        }
        targets.sort_unstable();
        targets.dedup();
        if targets.is_empty() {
            return Err(ShapeError::NoTarget);
        }
        Ok(Self { rank, alpha, use_rslora, targets })
    }

    /// Factor of the product `B A x`.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

/// Name of a module as PEFT and the API write it, as in `q_proj`.
pub fn module_name(module: Module) -> &'static str {
    let path = module_path(module);
    path.rsplit_once('.').map_or(path, |(_, name)| name)
}

/// The module called `name`, as in `q_proj`.
pub fn module_by_name(name: &str) -> Option<Module> {
    Module::ALL.into_iter().find(|module| module_name(*module) == name)
}

/// Which of a module's two matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// Down to the rank: `(R, in)`.
    A,
    /// Up from the rank: `(out, R)`.
    B,
}

/// One matrix of an adapter, row-major in the flat run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorSpot {
    /// Layer number.
    pub layer: usize,
    /// Module.
    pub module: Module,
    /// Which matrix.
    pub part: Part,
    /// Its first element.
    pub offset: usize,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

impl TensorSpot {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether it holds no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The canonical layout of one adapter shape over one base.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterLayout {
    shape: AdapterShape,
    dims: ModuleDims,
    offsets: [Option<usize>; Module::ALL.len()],
    layer_stride: usize,
}

impl AdapterLayout {
    /// Lays `shape` out over a base with modules of sizes `dims`.
    pub fn new(dims: &ModuleDims, shape: &AdapterShape) -> Self {
        let mut offsets = [None; Module::ALL.len()];
        let mut layer_stride = 0;
        for module in &shape.targets {
            let (input, output) = dims.of(*module);
            offsets[module.index()] = Some(layer_stride);
            layer_stride += shape.rank * (input + output);
        }
        Self { shape: shape.clone(), dims: *dims, offsets, layer_stride }
    }

    /// The shape laid out.
    pub fn shape(&self) -> &AdapterShape {
        &self.shape
    }

    /// Elements of the whole adapter.
    pub fn len(&self) -> usize {
        self.layer_stride * self.dims.layers
    }

    /// Whether it holds no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Pages of [`PAGE`] elements that it takes in a pool.
    pub fn pages(&self) -> usize {
        self.len().div_ceil(PAGE)
    }

    /// Elements from one layer to the next.
    pub fn layer_stride(&self) -> usize {
        self.layer_stride
    }

    /// Where A of `module` starts in its layer; none: not a target.
    pub fn module_offset(&self, module: Module) -> Option<usize> {
        self.offsets[module.index()]
    }

    /// All matrices in order of their offsets.
    pub fn tensors(&self) -> impl Iterator<Item = TensorSpot> + '_ {
        let rank = self.shape.rank;
        (0..self.dims.layers)
            .flat_map(move |layer| {
                let start = layer * self.layer_stride;
                Module::ALL.into_iter().filter_map(move |module| {
                    let (input, output) = self.dims.of(module);
                    let offset = start + self.module_offset(module)?;
                    let a = TensorSpot {
                        layer,
                        module,
                        part: Part::A,
                        offset,
                        rows: rank,
                        cols: input,
                    };
                    let offset = offset + a.len();
                    Some([a, TensorSpot { part: Part::B, offset, rows: output, cols: rank, ..a }])
                })
            })
            .flatten()
    }

    /// The row of the slot table for a run that starts at pool page `page` and, while it is
    /// trained, at page `grad_page` of the training pool.
    pub fn slot_row(&self, page: u32, grad_page: Option<u32>) -> [i32; SlotRow::WIDTH] {
        let int = |value: usize| i32::try_from(value).expect("the limits of a base's sizes hold");
        let mut row = [0; SlotRow::WIDTH];
        row[SlotRow::PAGE] = int(page as usize);
        row[SlotRow::RANK] = int(self.shape.rank);
        row[SlotRow::SCALE_BITS] = (self.shape.scale() as f32).to_bits().cast_signed();
        row[SlotRow::LAYER_STRIDE] = int(self.layer_stride);
        row[SlotRow::GRAD_PAGE] = grad_page.map_or(-1, |page| int(page as usize));
        for module in Module::ALL {
            let offset = self.module_offset(module).map_or(-1, int);
            row[SlotRow::MODULE_OFFSET + module.index()] = offset;
        }
        row
    }
}
