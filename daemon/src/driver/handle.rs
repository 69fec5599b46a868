//! The way into the driver thread: what the rest of the daemon may ask of the data path.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use skimmer_fetcher::source::Source;
use tokio::sync::{mpsc, oneshot};

use super::recording::Recorded;
use super::{DriverError, Status};
use crate::blob::{BlobId, BlobSpec, ReadyBits};
use crate::frontend::{CookieRole, FscacheSetup, Mode};
use crate::requests::Ahead;
use crate::ring::Waker;

pub(crate) type Reply<T> = oneshot::Sender<Result<T, DriverError>>;

/// A request to the driver thread; each carries the way back for its answer.
pub(crate) enum Command {
    AddBlob { spec: BlobSpec, ready: ReadyBits, sources: Vec<Arc<dyn Source>>, reply: Reply<()> },
    SetChunks { spec: BlobSpec, reply: Reply<()> },
    RemoveBlob { blob: BlobId, reply: Reply<()> },
    Watch { blob: BlobId, writer: OwnedFd, reply: Reply<()> },
    Unwatch { blob: BlobId, reply: Reply<()> },
    BindFscache { setup: FscacheSetup, reply: Reply<()> },
    ExpectCookie { volume: String, cookie: String, role: CookieRole, reply: Reply<()> },
    ForgetCookie { volume: String, cookie: String, reply: Reply<()> },
    Prefetch { blob: BlobId, range: Range<u64>, background: bool, reply: Reply<()> },
    Offer { ahead: Ahead, until: u64, reply: Reply<()> },
    StopFill { blob: BlobId, reply: Reply<()> },
    Allow { until: u64, reply: Reply<()> },
    Durable { blob: BlobId, chunks: Vec<u32>, reply: Reply<()> },
    Lost { mode: Mode, blob: BlobId, kept: ReadyBits, reply: Reply<()> },
    Missing { blob: BlobId, ranges: Vec<Range<u64>>, reply: Reply<(u64, u64)> },
    Prove { blob: BlobId, range: Range<u64>, seen: oneshot::Sender<()>, reply: Reply<()> },
    EndProof { blob: BlobId, reply: Reply<()> },
    Record { number: u64, blobs: Vec<BlobId>, exact: bool, reply: Reply<()> },
    Recorded { number: u64, reply: Reply<Recorded> },
    EndRecording { number: u64, reply: Reply<()> },
    Status { reply: Reply<Status> },
    Shutdown { reply: Reply<()> },
}

/// A clonable way to talk to the driver thread. Every method waits for the driver's answer; all fail with
/// [`DriverError::Stopped`] once it has ended.
#[derive(Clone)]
pub struct Handle {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) waker: Waker,
}

impl Handle {
    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, DriverError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| DriverError::Stopped)?;
        self.waker.wake();
        answer.await.map_err(|_| DriverError::Stopped)?
    }

    /// Makes a blob known. `ready` are the chunks that the blob file (the sparse file of fanotify mounts) already
    /// holds, durable and verified; what fscache cache files hold is read from them when the kernel opens them.
    ///
    /// Idempotent: a second call, for another image over the same blob, adds its chunks, its ready chunks and those
    /// of its sources whose name is not known yet. Sources are tried in order, the next one at each new attempt.
    pub async fn add_blob(
        &self,
        spec: BlobSpec,
        ready: ReadyBits,
        sources: Vec<Arc<dyn Source>>,
    ) -> Result<(), DriverError> {
        self.ask(|reply| Command::AddBlob { spec, ready, sources, reply }).await
    }

    /// Makes `spec` all that is needed of a known blob, after an unmount: chunks that it does not name are forgotten, so
    /// that the blob can become complete without them. Their bytes stay in the files, and what is ready stays so.
    ///
    /// [`DriverError::Busy`] while the blob is being read or filled; nothing has changed then, so try again later.
    pub async fn set_chunks(&self, spec: BlobSpec) -> Result<(), DriverError> {
        self.ask(|reply| Command::SetChunks { spec, reply }).await
    }

    /// Forgets a blob. [`DriverError::Busy`] while it is watched or open in the kernel.
    pub async fn remove_blob(&self, blob: BlobId) -> Result<(), DriverError> {
        self.ask(|reply| Command::RemoveBlob { blob, reply }).await
    }

    /// fanotify: marks the blob file behind `writer` through the keeper and serves its events from now on. `writer`
    /// is open for reading and writing and was opened **before** any mark on that file; its length is already the
    /// device size. Returns when the mark is set: open the file for the mount only after that.
    ///
    /// Idempotent while the blob is watched, also by an earlier daemon: then `writer` is closed unused.
    pub async fn watch(&self, blob: BlobId, writer: OwnedFd) -> Result<(), DriverError> {
        self.ask(|reply| Command::Watch { blob, writer, reply }).await
    }

    /// fanotify: removes the mark and forgets the writing descriptor, once no read of the blob waits and no write of
    /// it is under way. Call it when every referenced chunk is durable and recorded, or after the last unmount.
    /// A blob that is not watched is a success.
    pub async fn unwatch(&self, blob: BlobId) -> Result<(), DriverError> {
        self.ask(|reply| Command::Unwatch { blob, reply }).await
    }

    /// fscache: takes `/dev/cachefiles` into use: binds it, or, when the keeper held it bound for an earlier daemon,
    /// has the kernel deliver its unanswered requests again. Call it after the cookies of all present mounts are
    /// expected, because the first requests may come at once.
    pub async fn bind_fscache(&self, setup: FscacheSetup) -> Result<(), DriverError> {
        self.ask(|reply| Command::BindFscache { setup, reply }).await
    }

    /// fscache: allows the kernel to open `cookie` in `volume` (as in `erofs,skimmer`) as `role`. A cookie that is
    /// not expected is refused. Idempotent; the last role counts for later opens.
    pub async fn expect_cookie(
        &self,
        volume: impl Into<String> + Send,
        cookie: impl Into<String> + Send,
        role: CookieRole,
    ) -> Result<(), DriverError> {
        let (volume, cookie) = (volume.into(), cookie.into());
        self.ask(|reply| Command::ExpectCookie { volume, cookie, role, reply }).await
    }

    /// fscache: no longer allows the cookie to be opened; objects that are open stay served.
    pub async fn forget_cookie(
        &self,
        volume: impl Into<String> + Send,
        cookie: impl Into<String> + Send,
    ) -> Result<(), DriverError> {
        let (volume, cookie) = (volume.into(), cookie.into());
        self.ask(|reply| Command::ForgetCookie { volume, cookie, reply }).await
    }

    /// Asks for a device range of a blob ahead of need, in every file of it that is open or watched. Returns at once.
    /// With `background` it is fetched when nobody reads, at the pace that the engine is set to.
    pub async fn prefetch(
        &self,
        blob: BlobId,
        range: Range<u64>,
        background: bool,
    ) -> Result<(), DriverError> {
        self.ask(|reply| Command::Prefetch { blob, range, background, reply }).await
    }

    /// Bytes of the chunks in these device ranges, and of those the bytes that are not written yet.
    pub async fn missing(&self, blob: BlobId, ranges: Vec<Range<u64>>) -> Result<(u64, u64), DriverError> {
        self.ask(|reply| Command::Missing { blob, ranges, reply }).await
    }

    /// How many bytes may have been written to cache files in all ([`Metrics::written`](crate::metrics::Metrics)) before
    /// flights wait for another allowance, two seconds at most. [`ReadySink::short`](super::ReadySink::short) asks for it.
    pub async fn allow(&self, until: u64) -> Result<(), DriverError> {
        self.ask(|reply| Command::Allow { until, reply }).await
    }

    /// These chunks of the blob's file are on disk and on record: the keeper serves them whether a daemon lives or not.
    pub async fn durable(&self, blob: BlobId, chunks: Vec<u32>) -> Result<(), DriverError> {
        self.ask(|reply| Command::Durable { blob, chunks, reply }).await
    }

    /// Counts as missing what is written to the blob's file, except `kept`: the disk failed. Readers wait on.
    pub async fn lost(&self, mode: Mode, blob: BlobId, kept: ReadyBits) -> Result<(), DriverError> {
        self.ask(|reply| Command::Lost { mode, blob, kept, reply }).await
    }

    /// Drops what background prefetches of the blob have not begun to fetch.
    pub async fn stop_fill(&self, blob: BlobId) -> Result<(), DriverError> {
        self.ask(|reply| Command::StopFill { blob, reply }).await
    }

    /// fanotify: accesses to `range` of the blob are denied (EIO) without any fetch until [`Self::end_proof`], and the
    /// first one is told of by the result. Nobody but the caller may read the blob meanwhile.
    pub async fn prove(&self, blob: BlobId, range: Range<u64>) -> Result<oneshot::Receiver<()>, DriverError> {
        let (seen, told) = oneshot::channel();
        self.ask(|reply| Command::Prove { blob, range, seen, reply }).await?;
        Ok(told)
    }

    /// Gives a body that is there, or is coming, to the first flight that reads its blob; it ends at `until`.
    pub(crate) async fn offer(&self, ahead: Ahead, until: u64) -> Result<(), DriverError> {
        self.ask(|reply| Command::Offer { ahead, until, reply }).await
    }

    /// Ends what [`Self::prove`] began.
    pub async fn end_proof(&self, blob: BlobId) -> Result<(), DriverError> {
        self.ask(|reply| Command::EndProof { blob, reply }).await
    }

    /// Begins to write down what is read and fetched of these blobs; `exact` turns enlarging off for them.
    pub async fn record(&self, number: u64, blobs: Vec<BlobId>, exact: bool) -> Result<(), DriverError> {
        self.ask(|reply| Command::Record { number, blobs, exact, reply }).await
    }

    /// What a recording holds so far; it goes on.
    pub async fn recorded(&self, number: u64) -> Result<Recorded, DriverError> {
        self.ask(|reply| Command::Recorded { number, reply }).await
    }

    /// Forgets a recording.
    pub async fn end_recording(&self, number: u64) -> Result<(), DriverError> {
        self.ask(|reply| Command::EndRecording { number, reply }).await
    }

    /// What the driver holds and does now.
    pub async fn status(&self) -> Result<Status, DriverError> {
        self.ask(|reply| Command::Status { reply }).await
    }

    /// Ends the driver thread, after the writes under way have ended. Requests not answered yet stay with the keeper
    /// (fanotify) and in the kernel (fscache) for the next daemon: nothing is denied and nothing is allowed.
    /// The keeper's socket is closed when the thread has ended: join it.
    pub async fn shutdown(&self) -> Result<(), DriverError> {
        match self.ask(|reply| Command::Shutdown { reply }).await {
            Err(DriverError::Stopped) => Ok(()),
            other => other,
        }
    }
}
