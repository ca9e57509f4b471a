//! A value that a device will have computed by the time it is waited for.

use crate::Result;

/// A pending download. Dropping it abandons the value, not the work.
pub struct Ticket<T> {
    wait: Box<dyn FnOnce() -> Result<T> + Send>,
    poll: Box<dyn Fn() -> bool + Send>,
}

impl<T: Send + 'static> Ticket<T> {
    /// A value that is there already.
    pub fn ready(value: T) -> Self {
        Self { wait: Box::new(move || Ok(value)), poll: Box::new(|| true) }
    }
    /// A value that `wait` blocks for and `poll` asks about.
    pub fn pending(
        wait: impl FnOnce() -> Result<T> + Send + 'static,
        poll: impl Fn() -> bool + Send + 'static,
    ) -> Self {
        Self { wait: Box::new(wait), poll: Box::new(poll) }
    }
    /// Whether [`Ticket::wait`] would return at once.
    pub fn is_ready(&self) -> bool {
        (self.poll)()
    }
    /// Blocks until the value is there.
    pub fn wait(self) -> Result<T> {
        (self.wait)()
    }
}
