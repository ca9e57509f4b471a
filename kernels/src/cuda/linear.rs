//! Linear layers through cuBLASLt. The algorithm of a shape is asked for once and then kept: it
//! never depends on timing, so equal batches give equal bits.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::{result, sys};
use cudarc::driver::CudaContext;
use half::bf16;

use super::Cuda;
use super::fault::blas_fault;
use super::memory::{Address, Buf};
use crate::{In, LinearShape, Out, Result};

/// Memory that cuBLASLt may use; its guide asks for 32 MiB on Hopper.
const WORKSPACE_BYTES: usize = 64 << 20;
/// Rows whose algorithm all numbers of rows take where a row must not depend on its neighbours.
const USUAL_ROWS: usize = 256;
/// Shapes whose plans are kept. More are possible only where row counts vary without end.
const MAX_PLANS: usize = 4096;

/// What decides a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    /// `dy W` rather than `x Wᵀ`.
    backward: bool,
    shape: (usize, usize, usize),
    bias: bool,
    /// Alignments in bytes of weight, input, output.
    alignment: [u32; 3],
}

impl Key {
    /// The key that stands for all numbers of rows: with the alignment that any row has.
    fn usual(self) -> Self {
        let (_, input, output) = self.shape;
        let (from, to) = if self.backward { (output, input) } else { (input, output) };
        let of_rows = |width: usize, own: u32| alignment(2 * width as u64).min(own).min(16);
        let [weight, x, y] = self.alignment;
        let alignment = [weight.min(16), of_rows(from, x), of_rows(to, y)];
        Self { shape: (USUAL_ROWS, input, output), alignment, ..self }
    }
}

/// Descriptors and algorithm of one product, column-major as the library sees it.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    input: sys::cublasLtMatrixLayout_t,
    output: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// The library's handle, its workspace and all plans.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    workspace: Buf<u8>,
    plans: RefCell<HashMap<Key, Plan>>,
}

// SAFETY: handles of the library, used by the one thread that owns the device.
unsafe impl Send for Products {}

impl Products {
    pub fn new(context: &Arc<CudaContext>) -> Result<Self> {
        Ok(Self {
            handle: result::create_handle().map_err(blas_fault("start"))?,
            workspace: Buf::zeroed(context, WORKSPACE_BYTES)?,
            plans: RefCell::default(),
        })
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        self.plans.get_mut().clear();
        // SAFETY: made once, destroyed once, after everything made with it.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Drop for Plan {
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

/// `y = x Wᵀ + bias`.
pub(super) fn linear(
    cuda: &Cuda,
    y: Out<'_, Buf<bf16>>,
    x: In<'_, Buf<bf16>>,
    weight: In<'_, Buf<bf16>>,
    bias: Option<In<'_, Buf<bf16>>>,
    shape: LinearShape,
) -> Result<()> {
    check(y.len, x.len, weight.len, shape);
    assert!(bias.is_none_or(|bias| bias.len == shape.output), "bias of a linear layer");
    let bias = bias.map(|bias| bias.address());
    product(cuda, false, (y.address(), x.address(), weight.address(), bias), shape)
}

/// `dx = dy W`.
pub(super) fn linear_backward(
    cuda: &Cuda,
    dx: Out<'_, Buf<bf16>>,
    dy: In<'_, Buf<bf16>>,
    weight: In<'_, Buf<bf16>>,
    shape: LinearShape,
) -> Result<()> {
    check(dy.len, dx.len, weight.len, shape);
    product(cuda, true, (dx.address(), dy.address(), weight.address(), None), shape)
}

fn check(y: usize, x: usize, weight: usize, shape: LinearShape) {
    let LinearShape { rows, input, output } = shape;
    let wanted = (rows * output, rows * input, output * input);
    assert_eq!((y, x, weight), wanted, "shapes of a linear layer {shape:?}");
}

/// Largest power of two, 256 at most, that divides an address.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

fn product(
    cuda: &Cuda,
    backward: bool,
    (output, input, weight, bias): (u64, u64, u64, Option<u64>),
    shape: LinearShape,
) -> Result<()> {
    if shape.rows == 0 {
        return Ok(());
    }
    cuda.bind()?;
    let key = Key {
        backward,
        shape: (shape.rows, shape.input, shape.output),
        bias: bias.is_some(),
        alignment: [weight, input, output].map(alignment),
    };
    let products = &cuda.products;
    let mut plans = products.plans.borrow_mut();
    if !plans.contains_key(&key) {
        if plans.len() >= MAX_PLANS {
            plans.clear();
        }
        let model = cuda.is_batch_invariant().then(|| key.usual());
        plans.insert(key, Plan::new(products.handle, key, model)?);
    }
    let plan = &plans[&key];
    let what = format!("{key:?}");
    if let Some(bias) = bias {
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
        plan.set(attribute, &bias).map_err(blas_fault(&what))?;
    }
    let (one, zero) = (1.0f32, 0.0f32);
    let address = |address: u64| address as *const c_void;
    let workspace = In::all(&products.workspace);
    // SAFETY: live descriptors; the addresses hold the lengths that `check` compared.
    unsafe {
        result::matmul(
            products.handle,
            plan.product,
            (&raw const one).cast(),
            (&raw const zero).cast(),
            address(weight),
            plan.weight,
            address(input),
            plan.input,
            address(output),
            plan.output,
            output as *mut c_void,
            plan.output,
            &plan.algorithm,
            workspace.address() as *mut c_void,
            WORKSPACE_BYTES,
            cuda.stream().cast(),
        )
    }
    .map_err(blas_fault(&what))
}

impl Plan {
    /// Row-major `y (N, out) = x Wᵀ` is column-major `yᵀ (out, N) = Wᵀ' xᵀ`, where the library
    /// sees W as `(in, out)` and transposes it; backward takes it as it is.
    /// Takes the algorithm of `model` where one is given, as it is.
    fn new(handle: sys::cublasLtHandle_t, key: Key, model: Option<Key>) -> Result<Self> {
        let what = format!("{key:?}");
        let fault = blas_fault(&what);
        let (rows, input, output) = key.shape;
        let (from, to) = if key.backward { (output, input) } else { (input, output) };
        let layout = |height: usize, width: usize| {
            let kind = sys::cudaDataType_t::CUDA_R_16BF;
            result::create_matrix_layout(kind, height as u64, width as u64, height as i64)
        };
        let product = result::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType_t::CUDA_R_32F,
        )
        .map_err(&fault)?;
        let mut plan = Self {
            product,
            weight: layout(input, output).map_err(&fault)?,
            input: layout(from, rows).map_err(&fault)?,
            output: layout(to, rows).map_err(&fault)?,
            // SAFETY: plain data, overwritten below before use.
            algorithm: unsafe { std::mem::zeroed() },
        };
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let transpose = i32::from(!key.backward);
        plan.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transpose).map_err(&fault)?;
        if key.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue).map_err(&fault)?;
        }
        let Some(model) = model else {
            plan.algorithm = plan.choose(handle, key).map_err(&fault)?;
            return Ok(plan);
        };
        plan.algorithm = Self::new(handle, model, None)?.algorithm;
        plan.check(handle).map_err(&fault)?;
        Ok(plan)
    }

    /// Errors unless the algorithm can do this product in the workspace there is.
    fn check(&self, handle: sys::cublasLtHandle_t) -> std::result::Result<(), result::CublasError> {
        // SAFETY: plain data, written by the call.
        let mut found: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        // SAFETY: live descriptors and valid pointers.
        unsafe {
            sys::cublasLtMatmulAlgoCheck(
                handle,
                self.product,
                self.weight,
                self.input,
                self.output,
                self.output,
                &self.algorithm,
                &mut found,
            )
        }
        .result()?;
        found.state.result()?;
        match found.workspaceSize <= WORKSPACE_BYTES {
            true => Ok(()),
            false => Err(result::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)),
        }
    }

    fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> std::result::Result<(), result::CublasError> {
        let value: *const T = value;
        // SAFETY: a live descriptor and a value of the attribute's size.
        unsafe {
            result::set_matmul_desc_attribute(self.product, attribute, value.cast(), size_of::<T>())
        }
    }

    /// The library's first proposal: a function of the shape alone.
    fn choose(
        &self,
        handle: sys::cublasLtHandle_t,
        key: Key,
    ) -> std::result::Result<sys::cublasLtMatmulAlgo_t, result::CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = result::create_matmul_pref()?;
        let [weight, input, output] = key.alignment;
        let limits = [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, weight),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, input),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, output),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, output),
        ];
        let workspace = WORKSPACE_BYTES;
        let set = |attribute, value: *const c_void, len| {
            // SAFETY: a live preference and a value of the attribute's size.
            unsafe { result::set_matmul_pref_attribute(preference, attribute, value, len) }
        };
        let mut chosen = set(
            Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const workspace).cast(),
            size_of::<usize>(),
        );
        for (attribute, bytes) in &limits {
            let value: *const u32 = bytes;
            chosen = chosen.and_then(|()| set(*attribute, value.cast(), size_of::<u32>()));
        }
        let found = chosen.and_then(|()| {
            // SAFETY: live descriptors.
            unsafe {
                result::get_matmul_algo_heuristic(
                    handle,
                    self.product,
                    self.weight,
                    self.input,
                    self.output,
                    self.output,
                    preference,
                )
            }
        });
        // SAFETY: made above, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        Ok(found?.algo)
    }
}
