//! The journal: turns "written" into "durable and recorded".
//!
//! Chunks that the data path wrote are collected per blob file; a commit makes the file durable and only then sets
//! their bits in its ready map. A thread of its own does it, because a sync may take seconds.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc as tokio_mpsc, oneshot};

use super::ready;
use crate::blob::{BlobId, ReadyBits};
use crate::driver::ReadySink;
use crate::frontend::Mode;

/// How long written chunks wait for others to be recorded with.
const BATCH: Duration = Duration::from_millis(500);

/// The two things a commit does to a disk. A trait, so that a test can stop between them.
pub trait Disk: Send {
    /// An open file.
    type File: Send;
    /// Makes the data of a file durable.
    ///
    /// # Errors
    /// What the system says.
    fn sync(&mut self, file: &Self::File) -> io::Result<()>;
    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// What the system says.
    fn write_at(&mut self, file: &Self::File, bytes: &[u8], offset: u64) -> io::Result<()>;
}

/// The real disk.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemDisk;

impl Disk for SystemDisk {
    type File = File;

    fn sync(&mut self, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    fn write_at(&mut self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }
}

/// A blob file, its ready map, and what of it is not recorded yet.
pub struct Tracked<F> {
    /// The blob.
    pub blob: BlobId,
    /// The blob file, for syncing only.
    pub data: F,
    /// Its ready map, with a header.
    pub map: F,
    /// What the map says.
    pub recorded: ReadyBits,
    /// Written, not recorded.
    pending: BTreeSet<u32>,
    /// The first failure; nothing is recorded after it until the file is [renewed](Self::renew). A failed sync may have
    /// lost data that a later one, which succeeds, does not bring back.
    broken: Option<String>,
}

impl<F> Tracked<F> {
    /// A file whose map says `recorded`.
    pub fn new(blob: BlobId, data: F, map: F, recorded: ReadyBits) -> Self {
        Self { blob, data, map, recorded, pending: BTreeSet::new(), broken: None }
    }

    /// Chunks that were written and lie in the file, or will after its next sync.
    pub fn wrote(&mut self, chunks: &[u32]) {
        if self.broken.is_none() {
            self.pending.extend(chunks.iter().copied().filter(|chunk| !self.recorded.contains(*chunk)));
        }
    }

    /// What is not recorded is written anew: what comes from now on can be recorded again.
    pub fn renew(&mut self) {
        self.broken = None;
    }

    /// Makes the pending chunks durable, then records them. Returns which those are.
    ///
    /// # Errors
    /// The failure that broke this file's record, now or earlier.
    pub fn commit<D: Disk<File = F>>(&mut self, disk: &mut D) -> Result<Vec<u32>, String> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        if self.pending.is_empty() {
            return Ok(Vec::new());
        }
        self.try_commit(disk).map_err(|error| {
            let what = format!("blob {}: chunks on disk cannot be recorded: {error}", self.blob);
            self.broken = Some(what.clone());
            self.pending.clear();
            what
        })
    }

    fn try_commit<D: Disk<File = F>>(&mut self, disk: &mut D) -> io::Result<Vec<u32>> {
        disk.sync(&self.data)?;
        let mut bits = self.recorded.clone();
        for chunk in &self.pending {
            bits.insert(*chunk);
        }
        for sector in ready::sectors_of(self.pending.iter().copied()) {
            disk.write_at(&self.map, &ready::sector(self.blob, sector, &bits), ready::offset_of(sector))?;
        }
        disk.sync(&self.map)?;
        self.recorded = bits;
        Ok(std::mem::take(&mut self.pending).into_iter().collect())
    }
}

/// What the journal tells the rest of the daemon.
#[derive(Debug)]
pub enum Notice {
    /// These chunks of the blob file are durable and recorded.
    Durable(BlobId, Vec<u32>),
    /// Every chunk of the file that images refer to is durable and recorded.
    Complete(Mode, BlobId),
    /// The disk failed: only these chunks of the file are on record, and others that were written may be lost.
    Lost(Mode, BlobId, ReadyBits),
    /// Something a person should know.
    Fault(Option<BlobId>, String),
    /// Nothing more comes of a file. To be dropped once everything before it is dealt with: whoever let go of the file
    /// waits for that, and may then have another one made.
    Over(oneshot::Sender<()>),
}

enum Message {
    Track(Mode, Box<Tracked<File>>, oneshot::Sender<()>),
    Untrack(Mode, BlobId, oneshot::Sender<()>),
    Ready(Mode, BlobId, Vec<u32>),
    Complete(Mode, BlobId),
    Renewed(Mode, BlobId),
    Recorded(Mode, BlobId, oneshot::Sender<Option<ReadyBits>>),
    Flush(oneshot::Sender<Vec<(BlobId, Vec<u32>)>>),
    Stop,
}

/// The way to the journal thread; also the data path's [`ReadySink`].
#[derive(Clone)]
pub struct Journal {
    messages: mpsc::Sender<Message>,
    faults: tokio_mpsc::UnboundedSender<Notice>,
    thread: Arc<Mutex<Option<JoinHandle<bool>>>>,
    grown: Arc<Notify>,
    full: Arc<AtomicBool>,
    short: Arc<AtomicBool>,
}

impl Journal {
    /// Comes back when chunks were written, or could not be for want of space or allowance, since the last time.
    pub async fn grown(&self) {
        self.grown.notified().await;
    }

    /// Whether a write failed for want of space since the last time.
    pub fn was_full(&self) -> bool {
        self.full.swap(false, Ordering::Relaxed)
    }

    /// Whether flights wait for an allowance since the last time.
    pub fn was_short(&self) -> bool {
        self.short.swap(false, Ordering::Relaxed)
    }

    /// Starts the thread. Notices come out of the receiver.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start() -> io::Result<(Self, tokio_mpsc::UnboundedReceiver<Notice>)> {
        let (messages, inbox) = mpsc::channel();
        let (notices, outbox) = tokio_mpsc::unbounded_channel();
        let faults = notices.clone();
        let thread = std::thread::Builder::new().name("journal".into()).spawn(move || {
            Worker { files: HashMap::new(), disk: SystemDisk, notices, whole: true }.run(&inbox)
        })?;
        let thread = Arc::new(Mutex::new(Some(thread)));
        Ok((
            Self {
                messages,
                faults,
                thread,
                grown: Arc::default(),
                full: Arc::default(),
                short: Arc::default(),
            },
            outbox,
        ))
    }

    /// Takes over a file's record. Call it before the data path may write the file. A file that is tracked already
    /// stays as it is.
    pub async fn track(&self, mode: Mode, file: Tracked<File>) {
        self.ask(|reply| Message::Track(mode, Box::new(file), reply)).await;
    }

    /// Records what is pending and lets go of the file. Every notice of what it holds has been dealt with then.
    pub async fn untrack(&self, mode: Mode, blob: BlobId) {
        self.ask(|reply| Message::Untrack(mode, blob, reply)).await;
    }

    /// What is recorded of a file that is tracked.
    pub async fn recorded(&self, mode: Mode, blob: BlobId) -> Option<ReadyBits> {
        self.ask(|reply| Message::Recorded(mode, blob, reply)).await.flatten()
    }

    /// Records everything that is pending. Gives what that is of blob files, which [`Notice::Durable`] tells too.
    pub async fn flush(&self) -> Vec<(BlobId, Vec<u32>)> {
        self.ask(Message::Flush).await.unwrap_or_default()
    }

    /// Records everything that is pending and ends the thread. Later calls do nothing.
    ///
    /// Returns whether all that was ever reported as written is durable and recorded; `false` of a later call.
    pub fn stop(&self) -> bool {
        let _ = self.messages.send(Message::Stop);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        thread.is_some_and(|thread| {
            thread.join().unwrap_or_else(|_| {
                tracing::error!("the journal thread panicked");
                false
            })
        })
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.messages.send(message(reply)).ok()?;
        answer.await.ok()
    }
}

impl ReadySink for Journal {
    fn ready(&self, mode: Mode, blob: BlobId, chunks: &[u32]) {
        let _ = self.messages.send(Message::Ready(mode, blob, chunks.to_vec()));
        self.grown.notify_one();
    }

    fn complete(&self, mode: Mode, blob: BlobId) {
        let _ = self.messages.send(Message::Complete(mode, blob));
    }

    fn renewed(&self, mode: Mode, blob: BlobId) {
        let _ = self.messages.send(Message::Renewed(mode, blob));
    }

    fn full(&self) {
        self.full.store(true, Ordering::Relaxed);
        self.grown.notify_one();
    }

    fn short(&self) {
        self.short.store(true, Ordering::Relaxed);
        self.grown.notify_one();
    }

    fn fault(&self, blob: Option<BlobId>, message: &str) {
        let _ = self.faults.send(Notice::Fault(blob, message.into()));
    }
}

struct Worker {
    files: HashMap<(Mode, BlobId), Tracked<File>>,
    disk: SystemDisk,
    notices: tokio_mpsc::UnboundedSender<Notice>,
    /// Everything that was written is on record, or will be with the next commit.
    whole: bool,
}

impl Worker {
    fn run(mut self, inbox: &mpsc::Receiver<Message>) -> bool {
        let mut commit_at: Option<Instant> = None;
        loop {
            let message = match commit_at {
                None => inbox.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
                Some(at) => inbox.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            match message {
                Ok(Message::Ready(mode, blob, chunks)) => {
                    if let Some(file) = self.files.get_mut(&(mode, blob)) {
                        file.wrote(&chunks);
                        commit_at.get_or_insert_with(|| Instant::now() + BATCH);
                    } else {
                        self.whole = false;
                    }
                }
                Ok(Message::Complete(mode, blob)) => {
                    // A file without a record is never complete: its watch must stay.
                    if self.files.contains_key(&(mode, blob)) && self.commit(mode, blob).is_ok() {
                        let _ = self.notices.send(Notice::Complete(mode, blob));
                    }
                }
                Ok(Message::Renewed(mode, blob)) => {
                    if let Some(file) = self.files.get_mut(&(mode, blob)) {
                        file.renew();
                    }
                }
                Ok(Message::Track(mode, file, reply)) => {
                    self.files.entry((mode, file.blob)).or_insert(*file);
                    let _ = reply.send(());
                }
                Ok(Message::Untrack(mode, blob, reply)) => {
                    let _ = self.commit(mode, blob);
                    self.files.remove(&(mode, blob));
                    let _ = self.notices.send(Notice::Over(reply));
                }
                Ok(Message::Recorded(mode, blob, reply)) => {
                    let _ = reply.send(self.files.get(&(mode, blob)).map(|file| file.recorded.clone()));
                }
                Ok(Message::Flush(reply)) => {
                    let recorded = self.commit_all();
                    commit_at = None;
                    let _ = reply.send(recorded);
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    self.commit_all();
                    commit_at = None;
                }
                Ok(Message::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => {
                    self.commit_all();
                    return self.whole;
                }
            }
        }
    }

    /// Commits every file; what of blob files that put on record.
    fn commit_all(&mut self) -> Vec<(BlobId, Vec<u32>)> {
        let files: Vec<_> = self.files.keys().copied().collect();
        let recorded = files.into_iter().filter_map(|(mode, blob)| {
            let chunks = self.commit(mode, blob).ok()?;
            (mode == Mode::Fanotify && !chunks.is_empty()).then_some((blob, chunks))
        });
        recorded.collect()
    }

    /// Puts on record what is pending of a file; gives what that is.
    ///
    /// # Errors
    /// The disk failed, now or earlier.
    fn commit(&mut self, mode: Mode, blob: BlobId) -> Result<Vec<u32>, String> {
        let Some(file) = self.files.get_mut(&(mode, blob)) else { return Ok(Vec::new()) };
        let was_broken = file.broken.is_some();
        let done = file.commit(&mut self.disk);
        match &done {
            Ok(chunks) if mode == Mode::Fanotify && !chunks.is_empty() => {
                let _ = self.notices.send(Notice::Durable(blob, chunks.clone()));
            }
            Ok(_) => {}
            Err(what) => {
                self.whole = false;
                if !was_broken {
                    tracing::error!("{what}");
                    let _ = self.notices.send(Notice::Lost(mode, blob, file.recorded.clone()));
                    let _ = self.notices.send(Notice::Fault(Some(blob), what.clone()));
                }
            }
        }
        done
    }
}
