//! The driver's only wait point and only writer: an io_uring that polls the kernel's descriptors and writes runs of
//! verified chunks.

pub(crate) mod sys;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFlags, eventfd};

use self::sys::{Op, RingFile, Uring};
use crate::arena::{Arena, Run};

/// Slots for registered files. More files than that are written through their plain descriptors.
const FILE_SLOTS: u32 = 256;

/// The poll token of the ring's own eventfd.
const WAKE: u64 = u64::MAX;

/// The kernel's direct writes count whole blocks; a short write is taken up again from the last whole one.
const BLOCK: usize = 4096;

/// Wakes the driver thread from any thread. Clones wake the same one.
#[derive(Clone)]
pub struct Waker(Arc<WakeState>);

struct WakeState {
    eventfd: Arc<OwnedFd>,
    /// Set while a wake is on its way, so that a burst of messages costs one system call.
    pending: AtomicBool,
}

impl Waker {
    fn new() -> io::Result<Self> {
        let eventfd = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        Ok(Self(Arc::new(WakeState { eventfd, pending: AtomicBool::new(false) })))
    }

    /// Makes the driver look at its queues. Put the message there first.
    pub fn wake(&self) {
        if !self.0.pending.swap(true, Ordering::AcqRel)
            && let Err(error) = rustix::io::write(&self.0.eventfd, &1u64.to_ne_bytes())
        {
            // Only EAGAIN is possible, when the counter is full: then the driver is being woken anyway.
            tracing::debug!(%error, "wake of the driver");
        }
    }

    /// Takes the wake. Look at the queues after this.
    fn take(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.0.eventfd, &mut count);
        // Pairs with the swap in `wake`: a message put there before a wake that wrote nothing is seen after this.
        self.0.pending.swap(false, Ordering::AcqRel);
    }
}

/// A file that can be written: keep it as long as there is something to write.
#[derive(Clone)]
pub struct WriteFile(Arc<RingFile>);

impl WriteFile {
    /// The descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

/// What a polled descriptor is to be ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum For {
    /// Something can be read.
    Reading,
    /// There is room to write.
    Writing,
}

/// Something that happened.
pub enum Event {
    /// A polled descriptor is ready, or in error. It is polled again only when [`Ring::poll`] is called again.
    Ready {
        /// As given to [`Ring::poll`].
        token: u64,
    },
    /// [`Waker::wake`] was called.
    Woken,
    /// A write ended: all of it is in the file, or an error says why not. Its buffers are free again.
    Written {
        /// As given to [`Ring::write`].
        tag: u64,
        /// Bytes that were to be written.
        len: usize,
        /// How it ended.
        result: io::Result<()>,
    },
}

/// See the module.
pub struct Ring {
    uring: Uring,
    waker: Waker,
    /// Files in the ring's table by slot. One that only this table still holds is taken out.
    slots: Vec<Option<Arc<RingFile>>>,
    /// Events that need no completion, such as a write that could not be started.
    queued: VecDeque<Event>,
    /// Writes that wait for others to end, so that completions never outgrow their queue.
    backlog: VecDeque<Op>,
    most_writes: usize,
    closing: bool,
    /// Why the ring's thread can no longer be woken.
    deaf: Option<io::Error>,
}

impl Ring {
    /// A ring with room for `entries` submissions, and buffer memory of `arena_bytes`, which is registered with it as
    /// it is used. Use it on the thread that made it.
    pub fn new(entries: u32, arena_bytes: usize) -> io::Result<(Self, Arena)> {
        let (arena, uring) = Arena::new(arena_bytes, |memory| Uring::new(entries, Some(memory)))?;
        let uring = uring?;
        let slots = match uring.register_files(FILE_SLOTS) {
            Ok(()) => (0..FILE_SLOTS).map(|_| None).collect(),
            // Before 5.19 there is no sparse table: plain descriptors do as well.
            Err(error) => {
                tracing::info!(%error, "io_uring without registered files");
                Vec::new()
            }
        };
        let waker = Waker::new()?;
        arena.wake_on_return(waker.clone());
        let most_writes = usize::try_from(entries).unwrap_or(usize::MAX).max(1);
        let (queued, backlog) = (VecDeque::new(), VecDeque::new());
        let mut ring = Self { uring, waker, slots, queued, backlog, most_writes, closing: false, deaf: None };
        ring.arm_waker()?;
        Ok((ring, arena))
    }

    /// What wakes this ring's thread.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Bytes of buffer memory that are registered: from its beginning, as far as writes have come.
    pub fn registered_bytes(&self) -> usize {
        self.uring.registered()
    }

    fn arm_waker(&mut self) -> io::Result<()> {
        let fd = Arc::clone(&self.waker.0.eventfd);
        self.poll(fd, For::Reading, WAKE)
    }

    /// Reports once when `fd` is ready for that, or in error.
    pub fn poll(&mut self, fd: Arc<dyn AsFd + Send + Sync>, wanted: For, token: u64) -> io::Result<()> {
        let events = match wanted {
            For::Reading => PollFlags::IN,
            For::Writing => PollFlags::OUT,
        };
        let events = u32::from(events.bits());
        self.uring.start(Op::Poll { fd, events, token }).map_err(|(_, error)| error)
    }

    /// Prepares a file for writes. `register` puts it into the ring's table when there is room, which keeps one more
    /// reference to it until shortly after the last [`WriteFile`] is dropped: never do so with a descriptor whose
    /// closing the kernel waits for.
    pub fn file(&mut self, fd: Arc<dyn AsFd + Send + Sync>, register: bool) -> WriteFile {
        self.sweep();
        if register && let Some(at) = self.slots.iter().position(Option::is_none) {
            let slot = u32::try_from(at).expect("at most FILE_SLOTS");
            match self.uring.set_file(slot, Some(&fd)) {
                Ok(()) => {
                    let file = Arc::new(RingFile { fd, slot: Some(slot) });
                    self.slots[at] = Some(Arc::clone(&file));
                    return WriteFile(file);
                }
                Err(error) => tracing::debug!(%error, "file is not registered with io_uring"),
            }
        }
        WriteFile(Arc::new(RingFile { fd, slot: None }))
    }

    /// Takes files out of the table that nobody else holds: no `WriteFile` and no operation.
    fn sweep(&mut self) {
        for at in 0..self.slots.len() {
            if self.slots[at].as_ref().is_some_and(|file| Arc::strong_count(file) == 1) {
                let slot = u32::try_from(at).expect("at most FILE_SLOTS");
                match self.uring.set_file(slot, None) {
                    Ok(()) => self.slots[at] = None,
                    Err(error) => tracing::warn!(%error, "a registered file could not be taken out"),
                }
            }
        }
    }

    /// Writes all of `run` at `offset` of the file. The outcome comes as [`Event::Written`] with `tag`, exactly once.
    pub fn write(&mut self, run: Run, file: &WriteFile, offset: u64, tag: u64) {
        self.submit(Op::Write { run, file: Arc::clone(&file.0), offset, done: 0, tag });
    }

    fn submit(&mut self, op: Op) {
        if self.uring.writes() >= self.most_writes {
            self.backlog.push_back(op);
            return;
        }
        if let Err((Op::Write { run, tag, .. }, error)) = self.uring.start(op) {
            self.queued.push_back(Event::Written { tag, len: run.len(), result: Err(error) });
        }
    }

    /// Writes under way.
    pub fn writes(&self) -> usize {
        self.uring.writes() + self.backlog.len()
    }

    /// Gives new operations to the kernel and waits for an event, at most `timeout`. An error means that the ring is
    /// of no use any more but to be closed.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if let Some(error) = self.deaf.take() {
            return Err(error);
        }
        self.sweep();
        let timeout = if self.queued.is_empty() { timeout } else { Some(Duration::ZERO) };
        self.uring.wait(timeout)
    }

    /// The next event that is there already.
    pub fn next_event(&mut self) -> Option<Event> {
        if let Some(event) = self.queued.pop_front() {
            return Some(event);
        }
        loop {
            if self.uring.writes() < self.most_writes
                && let Some(op) = self.backlog.pop_front()
            {
                self.submit(op);
            }
            let (op, result) = self.uring.next()?;
            match op {
                Op::Poll { token: WAKE, .. } => {
                    self.waker.take();
                    if !self.closing
                        && let Err(error) = self.arm_waker()
                    {
                        self.deaf = Some(error);
                    }
                    return Some(Event::Woken);
                }
                Op::Poll { .. } if self.closing => {}
                Op::Poll { token, .. } => return Some(Event::Ready { token }),
                Op::Write { run, file, offset, done, tag } => {
                    let len = run.len();
                    let result = match progress(result, done, len) {
                        Progress::Done => Ok(()),
                        Progress::Again(done) => {
                            self.submit(Op::Write { run, file, offset, done, tag });
                            if let Some(event) = self.queued.pop_front() {
                                return Some(event);
                            }
                            continue;
                        }
                        Progress::Failed(error) => Err(error),
                    };
                    return Some(Event::Written { tag, len, result });
                }
                Op::Cancel => {}
            }
        }
    }

    /// Ends every poll and waits for every write, so that nothing in the kernel refers to a file or a buffer any
    /// more. The outcomes of the writes are given to `written`.
    pub fn close(mut self, mut written: impl FnMut(u64, io::Result<()>)) -> io::Result<()> {
        self.closing = true;
        self.uring.cancel_polls();
        while self.uring.busy() || self.writes() > 0 || !self.queued.is_empty() {
            self.wait(None)?;
            while let Some(event) = self.next_event() {
                if let Event::Written { tag, result, .. } = event {
                    written(tag, result);
                }
            }
        }
        Ok(())
    }
}

enum Progress {
    Done,
    Again(usize),
    Failed(io::Error),
}

/// What to do with the result of one write operation that began at `done` of `len` bytes.
fn progress(result: i32, done: usize, len: usize) -> Progress {
    let Ok(wrote) = usize::try_from(result) else {
        let error = io::Error::from_raw_os_error(result.saturating_neg());
        return match error.kind() {
            io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Progress::Again(done),
            _ => Progress::Failed(error),
        };
    };
    match done.checked_add(wrote) {
        Some(all) if all == len => Progress::Done,
        Some(part) if part < len && part - part % BLOCK > done => Progress::Again(part - part % BLOCK),
        Some(part) if part < len => {
            let what = format!("the file took {wrote} of {} bytes", len - done);
            Progress::Failed(io::Error::new(io::ErrorKind::WriteZero, what))
        }
        _ => Progress::Failed(io::Error::other("the kernel reports more bytes than were given")),
    }
}

#[cfg(test)]
mod tests;
