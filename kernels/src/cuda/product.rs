//! One matrix product as cuBLASLt sees it: its descriptors, and the choice of an algorithm, which
//! follows from shapes alone and never from timing.

use std::ffi::c_void;

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::{result, sys};

type Blas<T> = std::result::Result<T, CublasError>;

/// Memory that cuBLASLt may use; its guide asks for 32 MiB on Hopper.
pub(super) const WORKSPACE_BYTES: usize = 64 << 20;
/// Rows done at once where a row must not depend on its neighbours, the first that goes: one
/// algorithm does them and any fewer. None that the library has does every number.
const USUAL_ROWS: [usize; 4] = [256, 128, 64, 16];
/// Fewer rows that such an algorithm has to be able to do.
const PROBED_ROWS: [usize; 9] = [1, 7, 15, 16, 33, 64, 127, 130, 255];
/// Proposals that are looked through for it.
const PROPOSALS: usize = 64;

/// What decides an algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// `dy W` rather than `x Wᵀ`.
    pub backward: bool,
    /// Rows, input and output.
    pub shape: (usize, usize, usize),
    pub bias: bool,
    /// Alignments in bytes of weight, input, output.
    pub alignment: [u32; 3],
}

impl Key {
    /// The key that stands for all numbers of rows: with the alignment of any row.
    pub fn of_any_rows(self) -> Self {
        let (from, to) = self.widths();
        let of_rows = |width: usize, own: u32| alignment(2 * width as u64).min(own).min(16);
        let [weight, x, y] = self.alignment;
        let alignment = [weight.min(16), of_rows(from, x), of_rows(to, y)];
        Self { alignment, ..self.of_rows(0) }
    }

    /// The same product of so many rows.
    pub fn of_rows(self, rows: usize) -> Self {
        Self { shape: (rows, self.shape.1, self.shape.2), ..self }
    }

    /// Columns of what is read and of what is written.
    pub fn widths(self) -> (usize, usize) {
        let (_, input, output) = self.shape;
        if self.backward { (output, input) } else { (input, output) }
    }
}

/// Largest power of two, 256 at most, that divides an address.
pub(super) fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

/// Descriptors of one product, column-major as the library sees it: row-major
/// `y (N, out) = x Wᵀ` is column-major `yᵀ (out, N) = Wᵀ' xᵀ`, where the library sees W as
/// `(in, out)` and transposes it; backward takes it as it is.
pub(super) struct Descriptors {
    pub product: sys::cublasLtMatmulDesc_t,
    pub weight: sys::cublasLtMatrixLayout_t,
    pub input: sys::cublasLtMatrixLayout_t,
    pub output: sys::cublasLtMatrixLayout_t,
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: each was made once.
        unsafe {
            let _ = result::destroy_matmul_desc(self.product);
            for layout in [self.weight, self.input, self.output] {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

impl Descriptors {
    pub fn new(key: Key) -> Blas<Self> {
        let (rows, input, output) = key.shape;
        let (from, to) = key.widths();
        let layout = |height: usize, width: usize| {
            let kind = sys::cudaDataType_t::CUDA_R_16BF;
            result::create_matrix_layout(kind, height as u64, width as u64, height as i64)
        };
        let descriptors = Self {
            product: result::create_matmul_desc(
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cudaDataType_t::CUDA_R_32F,
            )?,
            weight: layout(input, output)?,
            input: layout(from, rows)?,
            output: layout(to, rows)?,
        };
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let transpose = i32::from(!key.backward);
        descriptors.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transpose)?;
        if key.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            descriptors.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        }
        Ok(descriptors)
    }

    pub fn set<T>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Blas<()> {
        let value: *const T = value;
        // SAFETY: a live descriptor and a value of the attribute's size.
        unsafe {
            result::set_matmul_desc_attribute(self.product, attribute, value.cast(), size_of::<T>())
        }
    }

    /// Errors unless the algorithm can do this product in so much workspace.
    pub fn check(
        &self,
        handle: sys::cublasLtHandle_t,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        workspace: usize,
    ) -> Blas<()> {
        // SAFETY: plain data, written by the call.
        let mut found: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        let Self { product, weight, input, output } = *self;
        // SAFETY: live descriptors and valid pointers.
        unsafe {
            sys::cublasLtMatmulAlgoCheck(
                handle, product, weight, input, output, output, algorithm, &mut found,
            )
        }
        .result()?;
        found.state.result()?;
        if found.workspaceSize <= workspace { Ok(()) } else { Err(not_supported()) }
    }

    /// The library's proposals, best first by its own reckoning: a function of the shape alone.
    fn proposals(
        &self,
        handle: sys::cublasLtHandle_t,
        key: Key,
        workspace: usize,
        most: usize,
    ) -> Blas<Vec<sys::cublasLtMatmulAlgo_t>> {
        let preference = Preference::new(key, workspace)?;
        let mut found: Vec<sys::cublasLtMatmulHeuristicResult_t> = Vec::with_capacity(most);
        let mut count = 0;
        let Self { product, weight, input, output } = *self;
        // SAFETY: live descriptors, and room for as many results as are asked for.
        unsafe {
            let (most, results) = (most as i32, found.as_mut_ptr());
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                product,
                weight,
                input,
                output,
                output,
                preference.0,
                most,
                results,
                &mut count,
            )
            .result()?;
            found.set_len(count as usize);
        }
        Ok(found.iter().filter(|one| one.state.result().is_ok()).map(|one| one.algo).collect())
    }
}

/// What an algorithm may need.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(key: Key, workspace: usize) -> Blas<Self> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Self(result::create_matmul_pref()?);
        let [weight, input, output] = key.alignment;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &weight)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &input)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &output)?;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &output)?;
        Ok(preference)
    }

    fn set<T>(&self, attribute: sys::cublasLtMatmulPreferenceAttributes_t, value: &T) -> Blas<()> {
        let value: *const T = value;
        let value: *const c_void = value.cast();
        // SAFETY: a live preference and a value of the attribute's size.
        unsafe { result::set_matmul_pref_attribute(self.0, attribute, value, size_of::<T>()) }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

/// The library's first proposal for this very shape.
pub(super) fn best(
    handle: sys::cublasLtHandle_t,
    descriptors: &Descriptors,
    key: Key,
) -> Blas<sys::cublasLtMatmulAlgo_t> {
    let proposals = descriptors.proposals(handle, key, WORKSPACE_BYTES, 1)?;
    proposals.into_iter().next().ok_or_else(not_supported)
}

/// An algorithm for rows that stand alone, and how many it does at once.
#[derive(Clone, Copy)]
pub(super) struct Usual {
    pub rows: usize,
    pub algorithm: sys::cublasLtMatmulAlgo_t,
}

/// The first proposal that can do so many rows and any fewer, and that adds up each element in one
/// order, whatever their number: without workspace there are no partial sums of slices to add up,
/// whose number the library could make depend on the rows.
pub(super) fn usual(handle: sys::cublasLtHandle_t, key: Key) -> Blas<Usual> {
    for rows in USUAL_ROWS {
        let key = key.of_rows(rows);
        let proposals = Descriptors::new(key)?.proposals(handle, key, 0, PROPOSALS);
        let fewer = PROBED_ROWS.into_iter().filter(|probed| *probed < rows);
        let probes = fewer.map(|fewer| Descriptors::new(key.of_rows(fewer)));
        let probes = probes.collect::<Blas<Vec<_>>>()?;
        let fits = |algorithm: &sys::cublasLtMatmulAlgo_t| {
            let able = probes.iter().all(|probe| probe.check(handle, algorithm, 0).is_ok());
            able && whole_sums(algorithm)
        };
        // That there are no proposals for so many rows is no fault while there are fewer.
        if let Some(algorithm) = proposals.unwrap_or_default().into_iter().find(fits) {
            return Ok(Usual { rows, algorithm });
        }
    }
    Err(not_supported())
}

/// Whether no sum is cut into slices.
fn whole_sums(algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
    use sys::cublasLtMatmulAlgoConfigAttributes_t as Attribute;
    let (mut slices, mut written) = (0i32, 0);
    // SAFETY: plain data, and room for the attribute's value.
    let read = unsafe {
        sys::cublasLtMatmulAlgoConfigGetAttribute(
            algorithm,
            Attribute::CUBLASLT_ALGO_CONFIG_SPLITK_NUM,
            (&raw mut slices).cast(),
            size_of::<i32>(),
            &mut written,
        )
    };
    read.result().is_ok() && slices <= 1
}

fn not_supported() -> CublasError {
    CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)
}
