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
use super::product::{Descriptors, Key, Usual, WORKSPACE_BYTES, alignment, best, usual};
use crate::{In, LinearShape, Out, Result};

/// Shapes whose plans are kept. More are possible only where row counts vary without end.
const MAX_PLANS: usize = 4096;

/// How one product is done.
struct Plan {
    descriptors: Descriptors,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// The library's handle, its workspace and all plans.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    workspace: Buf<u8>,
    plans: RefCell<HashMap<Key, Plan>>,
    /// Algorithms of rows that stand alone, by [`Key::of_any_rows`].
    usual: RefCell<HashMap<Key, Usual>>,
}
// SAFETY: handles of the library, used by the one thread that owns the device.
unsafe impl Send for Products {}

impl Products {
    pub fn new(context: &Arc<CudaContext>) -> Result<Self> {
        Ok(Self {
            handle: result::create_handle().map_err(blas_fault("start"))?,
            workspace: Buf::zeroed(context, WORKSPACE_BYTES)?,
            plans: RefCell::default(),
            usual: RefCell::default(),
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

impl Products {
    fn plan(&self, key: Key, rows_stand_alone: bool) -> Result<Plan> {
        let what = format!("{key:?}");
        let fault = blas_fault(&what);
        let descriptors = Descriptors::new(key).map_err(&fault)?;
        let algorithm = if rows_stand_alone {
            let Usual { algorithm, .. } = self.usual(key)?;
            descriptors.check(self.handle, &algorithm, 0).map_err(&fault)?;
            algorithm
        } else {
            best(self.handle, &descriptors, key).map_err(&fault)?
        };
        Ok(Plan { descriptors, algorithm })
    }

    /// Asked for once for each weight, bias and alignment.
    fn usual(&self, key: Key) -> Result<Usual> {
        let key = key.of_any_rows();
        let mut known = self.usual.borrow_mut();
        if let Some(usual) = known.get(&key) {
            return Ok(*usual);
        }
        let found = usual(self.handle, key).map_err(blas_fault(&format!("{key:?}")))?;
        known.insert(key, found);
        Ok(found)
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
    if !cuda.is_batch_invariant() {
        return rows_at_once(cuda, key, (output, input, weight, bias));
    }
    let at_once = cuda.products.usual(key)?.rows;
    let (from, to) = key.widths();
    let bytes = |rows: usize, width: usize| (rows * width * size_of::<bf16>()) as u64;
    for first in (0..shape.rows).step_by(at_once) {
        let (output, input) = (output + bytes(first, to), input + bytes(first, from));
        let rows = at_once.min(shape.rows - first);
        let key = Key { alignment: [weight, input, output].map(alignment), ..key.of_rows(rows) };
        rows_at_once(cuda, key, (output, input, weight, bias))?;
    }
    Ok(())
}

fn rows_at_once(
    cuda: &Cuda,
    key: Key,
    (output, input, weight, bias): (u64, u64, u64, Option<u64>),
) -> Result<()> {
    let products = &cuda.products;
    let mut plans = products.plans.borrow_mut();
    if !plans.contains_key(&key) {
        if plans.len() >= MAX_PLANS {
            plans.clear();
        }
        plans.insert(key, products.plan(key, cuda.is_batch_invariant())?);
    }
    let Plan { descriptors, algorithm } = &plans[&key];
    let what = format!("{key:?}");
    if let Some(bias) = bias {
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
        descriptors.set(attribute, &bias).map_err(blas_fault(&what))?;
    }
    let (one, zero) = (1.0f32, 0.0f32);
    let address = |address: u64| address as *const c_void;
    let workspace = In::all(&products.workspace);
    // SAFETY: live descriptors; the addresses hold the lengths that `check` compared.
    unsafe {
        result::matmul(
            products.handle,
            descriptors.product,
            (&raw const one).cast(),
            (&raw const zero).cast(),
            address(weight),
            descriptors.weight,
            address(input),
            descriptors.input,
            address(output),
            descriptors.output,
            output as *mut c_void,
            descriptors.output,
            algorithm,
            workspace.address() as *mut c_void,
            WORKSPACE_BYTES,
            cuda.stream().cast(),
        )
    }
    .map_err(blas_fault(&what))
}
