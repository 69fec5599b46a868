//! Pre-content events on sparse blob files, through the keeper, which is the only one that reads and answers them.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use skimmer_keeper::client::{Command, HeldFile, Keeper, KeeperError, Notice, Welcome};
use skimmer_keeper::protocol::{Errno, EventId, FileId, Fill};

use crate::blob::BlobId;
use crate::ring::{Ring, WriteFile};

/// What the keeper told.
pub(crate) enum Told {
    /// An access to a watched file waits.
    Read { event: EventId, file: FileId, offset: u64, count: u64 },
    /// The mark of a blob is set, or could not be.
    Watched { blob: BlobId, result: Result<(), Errno> },
    /// The mark of a blob is gone, or could not be removed.
    Unwatched { blob: BlobId, result: Result<(), Errno> },
    /// The cachefiles device, or why there is none.
    Device(Result<OwnedFd, Errno>),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum WatchState {
    /// The keeper was asked to mark the file.
    Asked,
    Watched,
    /// The keeper was asked to remove the mark.
    Leaving,
}

struct Watched {
    file: FileId,
    writer: WriteFile,
    state: WatchState,
}

enum Asked {
    Watch(BlobId),
    Unwatch { blob: BlobId, complete: bool },
    Device,
}

/// The keeper's connection and the files it watches for us.
pub(crate) struct Fanotify {
    keeper: Keeper,
    /// The same socket, for the ring to poll.
    socket: Arc<OwnedFd>,
    blobs: HashMap<BlobId, Watched>,
    files: HashMap<FileId, BlobId>,
    /// Files with a label that is no blob id: somebody else's, whose events we can only deny.
    strangers: HashSet<FileId>,
    /// Files whose mark was removed because all of them was there. An access that the kernel had let out before may
    /// still come.
    finished: HashSet<FileId>,
    asked: HashMap<u32, Asked>,
    next_file: u64,
}

impl Fanotify {
    pub(crate) fn new(keeper: Keeper, welcome: Welcome, ring: &mut Ring) -> std::io::Result<Self> {
        let socket = Arc::new(keeper.as_fd().try_clone_to_owned()?);
        let mut this = Self {
            keeper,
            socket,
            blobs: HashMap::new(),
            files: HashMap::new(),
            strangers: HashSet::new(),
            finished: HashSet::new(),
            asked: HashMap::new(),
            next_file: 1,
        };
        for HeldFile { label, file, fd } in welcome.files {
            this.next_file = this.next_file.max(file.0.saturating_add(1));
            match label.parse() {
                Ok(blob) if !this.blobs.contains_key(&blob) => {
                    let writer = ring.file(Arc::new(fd), true);
                    this.files.insert(file, blob);
                    this.blobs.insert(blob, Watched { file, writer, state: WatchState::Watched });
                }
                _ => {
                    tracing::error!(
                        label,
                        file = file.0,
                        "the keeper watches a file that is no blob of ours"
                    );
                    this.strangers.insert(file);
                }
            }
        }
        Ok(this)
    }

    /// Whether the lost keeper has a successor with everything that it held.
    pub(crate) fn keeper_goes_on(&self) -> bool {
        self.keeper.goes_on()
    }

    /// What the ring polls.
    pub(crate) fn socket(&self) -> &Arc<OwnedFd> {
        &self.socket
    }

    /// Whether commands wait for room in the socket.
    pub(crate) fn wants_room(&self) -> bool {
        self.keeper.wants_write()
    }

    /// Sends commands that waited for room.
    pub(crate) fn flush(&mut self) -> Result<(), KeeperError> {
        self.keeper.flush()
    }

    pub(crate) fn state(&self, blob: BlobId) -> Option<WatchState> {
        self.blobs.get(&blob).map(|watched| watched.state)
    }

    /// Whether any file may raise events.
    pub(crate) fn watches_anything(&self) -> bool {
        !self.files.is_empty() || !self.strangers.is_empty()
    }

    /// The blob of a watched file.
    pub(crate) fn blob(&self, file: FileId) -> Option<BlobId> {
        self.files.get(&file).copied()
    }

    /// Whether the file was complete when its mark was removed: its accesses need nothing.
    pub(crate) fn is_finished(&self, file: FileId) -> bool {
        self.finished.contains(&file)
    }

    /// Whether events of the file can never be served.
    pub(crate) fn is_stranger(&self, file: FileId) -> bool {
        self.strangers.contains(&file)
    }

    /// Where the blob is written.
    pub(crate) fn writer(&self, blob: BlobId) -> Option<&WriteFile> {
        self.blobs.get(&blob).map(|watched| &watched.writer)
    }

    /// Asks for the mark; [`Told::Watched`] answers.
    pub(crate) fn watch(&mut self, blob: BlobId, writer: WriteFile) -> Result<(), KeeperError> {
        let file = FileId(self.next_file);
        self.next_file += 1;
        let label = blob.hex();
        let seq = self.keeper.send(Command::Watch { file, label: &label, fd: writer.fd() })?;
        self.asked.insert(seq, Asked::Watch(blob));
        self.files.insert(file, blob);
        self.blobs.insert(blob, Watched { file, writer, state: WatchState::Asked });
        Ok(())
    }

    /// Tells the keeper what is filled, so that it answers such accesses itself.
    pub(crate) fn fill(&mut self, blob: BlobId, range: &Range<u64>, fill: Fill) -> Result<(), KeeperError> {
        let Some(watched) = self.blobs.get(&blob) else { return Ok(()) };
        let (offset, count) = (range.start, range.end.saturating_sub(range.start));
        self.keeper.send(Command::Fill { file: watched.file, offset, count, fill }).map(|_| ())
    }

    /// Asks for the mark to be removed; [`Told::Unwatched`] answers. Nothing is asked for a blob that is not watched.
    pub(crate) fn unwatch(&mut self, blob: BlobId, complete: bool) -> Result<(), KeeperError> {
        let Some(watched) = self.blobs.get_mut(&blob) else { return Ok(()) };
        let seq = self.keeper.send(Command::Unwatch { file: watched.file, complete })?;
        watched.state = WatchState::Leaving;
        self.asked.insert(seq, Asked::Unwatch { blob, complete });
        Ok(())
    }

    /// Asks for the cachefiles device; [`Told::Device`] answers.
    pub(crate) fn ask_device(&mut self) -> Result<(), KeeperError> {
        let seq = self.keeper.send(Command::OpenDevice)?;
        self.asked.insert(seq, Asked::Device);
        Ok(())
    }

    /// Lets an access go on, its bytes being in the file, or makes it fail.
    pub(crate) fn answer(&mut self, event: EventId, result: Result<(), Errno>) -> Result<(), KeeperError> {
        self.keeper.send(Command::Answer { event, result }).map(|_| ())
    }

    /// The next thing the keeper tells; `None` when there is nothing now.
    pub(crate) fn next(&mut self) -> Result<Option<Told>, KeeperError> {
        while let Some(notice) = self.keeper.recv()? {
            match notice {
                Notice::Event { event, file, offset, count } => {
                    return Ok(Some(Told::Read { event, file, offset, count }));
                }
                Notice::Done { seq, result } => match self.asked.remove(&seq) {
                    Some(Asked::Watch(blob)) => {
                        match &result {
                            Ok(()) => {
                                if let Some(watched) = self.blobs.get_mut(&blob) {
                                    watched.state = WatchState::Watched;
                                }
                            }
                            Err(_) => self.forget(blob),
                        }
                        return Ok(Some(Told::Watched { blob, result }));
                    }
                    Some(Asked::Unwatch { blob, complete }) => {
                        match &result {
                            Err(errno) if errno.raw() != libc::ENOENT => {
                                if let Some(watched) = self.blobs.get_mut(&blob) {
                                    watched.state = WatchState::Watched;
                                }
                            }
                            // Gone, or never there.
                            _ => {
                                let file = self.blobs.get(&blob).map(|watched| watched.file);
                                self.finished.extend(file.filter(|_| complete));
                                self.forget(blob);
                            }
                        }
                        return Ok(Some(Told::Unwatched { blob, result }));
                    }
                    Some(Asked::Device) => {
                        if let Err(errno) = result {
                            return Ok(Some(Told::Device(Err(errno))));
                        }
                    }
                    None => tracing::warn!(seq, "the keeper answers a command that was not sent"),
                },
                Notice::Device { seq, fd } => {
                    if let Some(Asked::Device) = self.asked.remove(&seq) {
                        return Ok(Some(Told::Device(Ok(fd))));
                    }
                }
                Notice::Stale { event } => tracing::debug!(event = event.0, "answered twice"),
            }
        }
        Ok(None)
    }

    fn forget(&mut self, blob: BlobId) {
        if let Some(watched) = self.blobs.remove(&blob) {
            self.files.remove(&watched.file);
        }
    }
}
