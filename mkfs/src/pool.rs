//! A few threads that hash and compress chunks. Results are asked for in the order in which chunks were given, so the
//! output does not depend on how many threads there are.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;

use sha2::{Digest as _, Sha256};

use crate::options::{Compression, Digest};
use crate::pack::{ChunkKey, ChunkRef};
use crate::{MkfsError, Options};

/// Chunks the image already holds. Entries are never taken out, so a thread that finds one need not compress.
pub(crate) type Known = Arc<RwLock<HashMap<ChunkKey, ChunkRef>>>;

/// A chunk after its way through a thread.
pub(crate) struct Encoded {
    pub(crate) key: ChunkKey,
    pub(crate) crc32: u32,
    /// The chunk as it was given.
    pub(crate) data: Vec<u8>,
    /// The smaller form, if there is one. Left out for chunks that were known already.
    pub(crate) compressed: Option<Vec<u8>>,
}

struct Job {
    data: Vec<u8>,
    reply: SyncSender<Result<Encoded, MkfsError>>,
}

/// A chunk that is on its way.
pub(crate) struct Ticket(Receiver<Result<Encoded, MkfsError>>);

impl Ticket {
    pub(crate) fn wait(self) -> Result<Encoded, MkfsError> {
        self.0.recv().unwrap_or_else(|_| Err(gone()))
    }
}

fn gone() -> MkfsError {
    MkfsError::Compress { reason: "a compression thread ended before its work was done".to_owned() }
}

pub(crate) struct Pool {
    jobs: Option<SyncSender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts the threads. `depth` chunks may wait for one before [`Pool::submit`] blocks.
    pub(crate) fn start(
        options: &Options,
        known: &Known,
        count: usize,
        depth: usize,
    ) -> Result<Self, MkfsError> {
        let (jobs, queue) = sync_channel::<Job>(depth);
        let queue = Arc::new(Mutex::new(queue));
        let mut threads = Vec::with_capacity(count);
        for _ in 0..count {
            let mut encoder = Encoder::new(options)?;
            let (queue, known) = (Arc::clone(&queue), Arc::clone(known));
            let thread = std::thread::Builder::new().name("mkfs-chunk".to_owned()).spawn(move || {
                loop {
                    // The guard ends with the statement: the work itself is done outside of the lock.
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(job) = job else { return };
                    let encoded = encoder.encode(job.data, &known);
                    // Nobody waits for it when the build was given up.
                    let _ = job.reply.send(encoded);
                }
            });
            threads.push(thread.map_err(|e| MkfsError::io("start a thread for", "compression", e))?);
        }
        Ok(Self { jobs: Some(jobs), threads })
    }

    pub(crate) fn submit(&self, data: Vec<u8>) -> Result<Ticket, MkfsError> {
        let (reply, result) = sync_channel(1);
        let jobs = self.jobs.as_ref().ok_or_else(gone)?;
        jobs.send(Job { data, reply }).map_err(|_| gone())?;
        Ok(Ticket(result))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A panic in the thread has been reported by the ticket it left unanswered.
            let _ = thread.join();
        }
    }
}

struct Encoder {
    digest: Digest,
    crc32: bool,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Encoder {
    fn new(options: &Options) -> Result<Self, MkfsError> {
        let zstd = match options.compression {
            Compression::None => None,
            Compression::Zstd { level } => Some(
                zstd::bulk::Compressor::new(level)
                    .map_err(|e| MkfsError::Compress { reason: e.to_string() })?,
            ),
        };
        Ok(Self { digest: options.digest, crc32: options.crc32, zstd })
    }

    fn encode(&mut self, data: Vec<u8>, known: &Known) -> Result<Encoded, MkfsError> {
        let digest: [u8; 32] = match self.digest {
            Digest::Sha256 => Sha256::digest(&data).into(),
            Digest::Blake3 => blake3::hash(&data).into(),
        };
        let len = u32::try_from(data.len())
            .map_err(|_| MkfsError::Compress { reason: format!("chunk of {} bytes", data.len()) })?;
        let key = ChunkKey { digest, len };
        let crc32 = if self.crc32 { crc32c::crc32c(&data) } else { 0 };
        let is_known = known.read().unwrap_or_else(PoisonError::into_inner).contains_key(&key);
        let compressed = match &mut self.zstd {
            Some(zstd) if !is_known => {
                let small =
                    zstd.compress(&data).map_err(|e| MkfsError::Compress { reason: e.to_string() })?;
                (small.len() < data.len()).then_some(small)
            }
            _ => None,
        };
        Ok(Encoded { key, crc32, data, compressed })
    }
}
