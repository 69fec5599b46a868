//! How the data path is set up, and what it tells the rest of the daemon.

use std::time::Duration;

use super::Follower;
use crate::blob::BlobId;
use crate::frontend::Mode;

/// Settings of one driver.
#[derive(Debug, Clone)]
pub struct DriverConfig {
    /// Bytes of buffer memory: everything that is being fetched, verified or written lies in it. A multiple of
    /// 4096, from 1 MiB to 1 GiB (the largest buffer io_uring registers).
    pub budget_bytes: u64,
    /// Planning limits. `budget_bytes` and `max_flight` in it are replaced by what the buffer memory allows.
    pub engine: skimmer_engine::Config,
    /// How long a fanotify event may wait for its blob to be added again after a restart; then it is denied (EIO).
    pub park_limit: Duration,
    /// Writes under way at once; also the size of the submission queue. A power of two.
    pub ring_entries: u32,
    /// Who is told of each request, if anybody.
    pub follower: Option<Follower>,
}

impl Default for DriverConfig {
    fn default() -> Self {
        Self {
            budget_bytes: 64 << 20,
            engine: skimmer_engine::Config::default(),
            park_limit: Duration::from_secs(60),
            ring_entries: 256,
            follower: None,
        }
    }
}

/// Hears what became durable-to-be. Called on the driver thread: must not block, so hand it on and return.
pub trait ReadySink: Send {
    /// These chunks ([`crate::blob::BlobChunk::index`]) were verified and written to the file that `mode` uses for
    /// `blob`. The bytes may still be in the page cache: make the file durable before recording them.
    fn ready(&self, mode: Mode, blob: BlobId, chunks: &[u32]);
    /// Every referenced chunk of the file is written. Comes after the last `ready`; comes again when an image with
    /// more chunks was added and those too are written, and at once when a blob is watched that is already complete.
    fn complete(&self, mode: Mode, blob: BlobId);
    /// What was said to be lost of the file is counted as missing: chunks that come from now on are whole.
    fn renewed(&self, mode: Mode, blob: BlobId);
    /// A write failed because the file system is full.
    fn full(&self);
    /// Flights wait, because all was written that is allowed ([`Handle::allow`](super::Handle::allow)).
    fn short(&self);
    /// Something a person should know: a read that had to be failed, a source that lies, a cache file that refuses
    /// writes. `blob` is `None` where no blob is concerned.
    fn fault(&self, blob: Option<BlobId>, message: &str);
}

/// What the driver holds and does, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Every known blob, by name.
    pub blobs: Vec<BlobStatus>,
    /// Size of the buffer memory.
    pub budget_bytes: u64,
    /// Bytes of it in use.
    pub in_flight_bytes: u64,
    /// Kernel requests that wait for their bytes.
    pub pending_reads: u64,
    /// fanotify events that wait for their blob to be added.
    pub parked_events: u64,
    /// Whether a keeper is connected, so that blobs can be watched.
    pub fanotify: bool,
    /// Whether the cachefiles device is bound.
    pub fscache: bool,
}

/// One blob in [`Status`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobStatus {
    /// The blob.
    pub id: BlobId,
    /// Size of the uncompressed device.
    pub device_bytes: u64,
    /// Size of the stored blob.
    pub stored_bytes: u64,
    /// Device bytes that known images refer to.
    pub referenced_bytes: u64,
    /// Its files that are watched or open now.
    pub files: Vec<FileStatus>,
}

/// One attach mode's file of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileStatus {
    /// The attach mode.
    pub mode: Mode,
    /// Referenced bytes that are on disk and verified.
    pub ready_bytes: u64,
    /// Kernel requests for its data since it was watched or opened.
    pub reads: u64,
    /// Kernel requests for it that wait.
    pub pending_reads: u64,
    /// Fetches of it under way.
    pub flights: u64,
}
