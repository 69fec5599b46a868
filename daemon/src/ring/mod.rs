//! The driver's only wait point and only writer.

mod sys;

use std::sync::Arc;

/// Wakes the driver thread from any thread.
#[derive(Clone)]
pub struct Waker(Arc<()>);

impl Waker {
    /// Makes the driver look at its queues.
    pub fn wake(&self) {
        let _ = &self.0;
    }
}
