//! The one thread that owns engine, ring and frontends: it turns what the kernel, the fetch tasks and the daemon say
//! into engine inputs, and does what the engine puts out.

mod config;
mod error;
mod handle;

use std::thread::JoinHandle;

pub use config::{BlobStatus, DriverConfig, FileStatus, ReadySink, Status};
pub use error::DriverError;
pub use handle::Handle;

use crate::frontend::Frontends;
use crate::metrics::Metrics;

/// The data path. All of its state lives on the thread that [`Driver::start`] makes.
pub struct Driver {}

impl Driver {
    /// Starts the driver thread and returns when it serves. Fetches run on `runtime`. Join the thread after
    /// [`Handle::shutdown`]; its result tells why it ended when nobody asked it to.
    pub fn start(
        config: DriverConfig,
        frontends: Frontends,
        sink: Box<dyn ReadySink>,
        metrics: Metrics,
        runtime: tokio::runtime::Handle,
    ) -> Result<(Handle, JoinHandle<Result<(), DriverError>>), DriverError> {
        let _ = (config, frontends, sink, metrics, runtime);
        Err(DriverError::Stopped)
    }
}
