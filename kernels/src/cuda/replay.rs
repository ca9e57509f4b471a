//! Graphs: what was enqueued once under a key is enqueued again in one call.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};

use super::Cuda;
use super::fault::device_fault;
use crate::Result;

/// A recorded graph, ready to run.
struct Recorded {
    graph: sys::CUgraph,
    runnable: sys::CUgraphExec,
}

/// All graphs by key.
pub(super) struct Graphs {
    recorded: RefCell<HashMap<u64, Recorded>>,
    context: Arc<CudaContext>,
}

// SAFETY: handles of the driver, used by the one thread that owns the device.
unsafe impl Send for Graphs {}

impl Graphs {
    pub fn new(context: &Arc<CudaContext>) -> Self {
        Self { recorded: RefCell::default(), context: context.clone() }
    }
}

impl Drop for Graphs {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_err() {
            return;
        }
        for (_, recorded) in self.recorded.get_mut().drain() {
            // SAFETY: owned; destroyed once.
            let _ = unsafe { result::graph::exec_destroy(recorded.runnable) };
            let _ = unsafe { result::graph::destroy(recorded.graph) };
        }
    }
}

/// See [`crate::Device::replay`].
pub(super) fn replay(
    cuda: &Cuda,
    key: u64,
    ops: &mut dyn FnMut(&Cuda) -> Result<()>,
) -> Result<()> {
    if !cuda.graphs.recorded.borrow().contains_key(&key) {
        let recorded = record(cuda, ops)?;
        cuda.graphs.recorded.borrow_mut().insert(key, recorded);
    }
    let graphs = cuda.graphs.recorded.borrow();
    let recorded = &graphs[&key];
    // SAFETY: a live graph and stream.
    unsafe { result::graph::launch(recorded.runnable, cuda.stream()) }.map_err(device_fault)
}

fn record(cuda: &Cuda, ops: &mut dyn FnMut(&Cuda) -> Result<()>) -> Result<Recorded> {
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    // SAFETY: a live stream that is not recording.
    unsafe { result::stream::begin_capture(cuda.stream(), mode) }.map_err(device_fault)?;
    let enqueued = ops(cuda);
    // SAFETY: the stream records. The recording ends even where an operation failed.
    let graph = unsafe { result::stream::end_capture(cuda.stream()) }.map_err(device_fault);
    enqueued?;
    let graph = graph?;
    // SAFETY: the graph just recorded.
    let runnable = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) }
        .map_err(device_fault)?;
    Ok(Recorded { graph, runnable })
}
