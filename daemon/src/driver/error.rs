//! What can go wrong on the way from a request of the daemon to the data path.

use crate::blob::{BlobId, SpecError};

/// A request that the driver could not do, or why it could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The driver thread has ended.
    #[error("the data path has stopped")]
    Stopped,
    /// The blob was never added, or was removed.
    #[error("blob {0} is not known to the data path")]
    UnknownBlob(BlobId),
    /// No such recording goes on.
    #[error("no such recording goes on")]
    NoRecording,
    /// The blob is still in use.
    #[error("blob {blob} is in use: {why}")]
    Busy {
        /// The blob.
        blob: BlobId,
        /// What uses it.
        why: &'static str,
    },
    /// The chunks of an image cannot be served.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// One chunk is larger than all buffer memory.
    #[error(
        "blob {blob}: a chunk of {bytes} bytes does not fit the buffer memory of {budget} bytes; raise the memory budget"
    )]
    ChunkTooLarge {
        /// The blob.
        blob: BlobId,
        /// The chunk's size on the device.
        bytes: u64,
        /// The budget.
        budget: u64,
    },
    /// This attach mode was not set up.
    #[error("{mode} is not available: {why}")]
    Unavailable {
        /// `fanotify` or `fscache`.
        mode: &'static str,
        /// Why, and what to do.
        why: String,
    },
    /// The kernel or the keeper refused.
    #[error("{what}: {source}")]
    System {
        /// What was tried, on what.
        what: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The keeper ended or cannot be talked to.
    #[error(
        "the keeper (skimmer-keeper) is lost: {0}; start skimmerd again: it connects to the keeper or starts another. Reads of incomplete blobs may have seen zeros since then, so unmount images in fanotify or fscache mode and mount them again"
    )]
    KeeperLost(String),
    /// A setting that cannot work.
    #[error("{0}")]
    Config(String),
}

impl DriverError {
    pub(crate) fn system(what: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::System { what: what.into(), source: source.into() }
    }
}
