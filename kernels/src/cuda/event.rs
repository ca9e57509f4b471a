//! Events: points in a stream that the host may wait for or ask about.

use std::sync::Arc;

use cudarc::driver::{CudaContext, result, sys};

use super::fault::device_fault;
use crate::Result;

/// A recorded point of a stream.
pub(super) struct Event {
    event: sys::CUevent,
    context: Arc<CudaContext>,
}

// SAFETY: handles of the driver, which may be used from any thread.
unsafe impl Send for Event {}
unsafe impl Sync for Event {}

impl Event {
    /// Records the end of what `stream` holds now. Only a timed event can be measured.
    pub fn record(context: &Arc<CudaContext>, stream: sys::CUstream, timed: bool) -> Result<Self> {
        let flags = match timed {
            true => sys::CUevent_flags::CU_EVENT_DEFAULT,
            false => sys::CUevent_flags::CU_EVENT_DISABLE_TIMING,
        };
        let event = result::event::create(flags).map_err(device_fault)?;
        let event = Self { event, context: context.clone() };
        // SAFETY: a live event and stream.
        unsafe { result::event::record(event.event, stream) }.map_err(device_fault)?;
        Ok(event)
    }

    /// Whether the point has been passed; also where the device failed, which waiting then tells.
    pub fn is_passed(&self) -> bool {
        if self.context.bind_to_thread().is_err() {
            return true;
        }
        // SAFETY: a live event.
        match unsafe { result::event::query(self.event) } {
            Err(error) => error.0 != sys::CUresult::CUDA_ERROR_NOT_READY,
            Ok(()) => true,
        }
    }

    /// Blocks until the point has been passed.
    pub fn wait(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(device_fault)?;
        // SAFETY: a live event.
        unsafe { result::event::synchronize(self.event) }.map_err(device_fault)
    }

    /// Seconds from `earlier` to this point, both passed and timed.
    pub fn seconds_since(&self, earlier: &Self) -> Result<f64> {
        self.context.bind_to_thread().map_err(device_fault)?;
        // SAFETY: live, timed events of one device.
        let milliseconds =
            unsafe { result::event::elapsed(earlier.event, self.event) }.map_err(device_fault)?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: owned; destroyed once.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}

/// Seconds since the device was opened, from events. An event measures against an anchor that is
/// renewed now and then, for the driver's milliseconds are single precision.
pub(super) struct Clock {
    anchor: Arc<Anchor>,
    latest: Option<(Arc<Event>, Arc<Anchor>)>,
}

struct Anchor {
    event: Event,
    seconds: f64,
}

/// Age at which an anchor is renewed.
const ANCHOR_SECONDS: f64 = 30.0;

/// An event whose time will be known.
pub(super) struct Mark {
    event: Arc<Event>,
    anchor: Arc<Anchor>,
}

impl Mark {
    pub fn is_passed(&self) -> bool {
        self.event.is_passed()
    }
    /// Blocks; seconds since the clock's start.
    pub fn wait(&self) -> Result<f64> {
        self.event.wait()?;
        Ok(self.anchor.seconds + self.event.seconds_since(&self.anchor.event)?)
    }
}

impl Clock {
    pub fn new(context: &Arc<CudaContext>, stream: sys::CUstream) -> Result<Self> {
        let event = Event::record(context, stream, true)?;
        Ok(Self { anchor: Arc::new(Anchor { event, seconds: 0.0 }), latest: None })
    }

    /// Marks the end of what `stream` holds now.
    pub fn mark(&mut self, context: &Arc<CudaContext>, stream: sys::CUstream) -> Result<Mark> {
        if let Some((event, anchor)) = self.latest.take()
            && event.is_passed()
        {
            let seconds = Mark { event: event.clone(), anchor: anchor.clone() }.wait()?;
            if seconds - self.anchor.seconds > ANCHOR_SECONDS {
                let event = Event::record(context, stream, true)?;
                // The new anchor lies behind the mark just measured, by what the stream holds.
                event.wait()?;
                let seconds = anchor.seconds + event.seconds_since(&anchor.event)?;
                self.anchor = Arc::new(Anchor { event, seconds });
            }
        }
        let event = Arc::new(Event::record(context, stream, true)?);
        self.latest = Some((event.clone(), self.anchor.clone()));
        Ok(Mark { event, anchor: self.anchor.clone() })
    }
}
