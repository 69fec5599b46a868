//! The unsafe parts of the data path: the buffer memory, and the io_uring whose operations read from it.
//!
//! Two rules carry all of it. Memory: a mapping is given out once, as one [`Piece`]; pieces can be split and joined
//! but not copied, so two of them never share a byte. Operations: the ring owns the [`Run`] of a write from before
//! the kernel can see it until its terminal completion has been taken from the completion queue.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::arena::Run;

/// Two megabytes: where a huge page may begin.
const HUGE: usize = 2 << 20;
/// Not more buffer memory than this, or an eighth of it all, is registered in advance.
const STEP: usize = 8 << 20;

/// An anonymous mapping. Its bytes are reached through [`Piece`]s only.
struct Mapping {
    map: NonNull<u8>,
    map_len: usize,
    /// First byte given out, aligned for huge pages.
    base: NonNull<u8>,
}

// SAFETY: the mapping is plain memory, not bound to a thread; shared access to its bytes is ruled by `Piece`, whose
// methods follow the usual borrowing rules for disjoint ranges.
unsafe impl Send for Mapping {}
// SAFETY: as above; `Mapping` itself has no method that touches the bytes.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this range was mapped by `Piece::map` and nobody else unmaps it; the last `Piece` is gone, so no
        // reference into it lives.
        let result = unsafe { rustix::mm::munmap(self.map.as_ptr().cast(), self.map_len) };
        debug_assert!(result.is_ok(), "munmap of our own mapping");
    }
}

/// The owner of one range of buffer memory; ranges of two pieces never overlap.
pub(crate) struct Piece {
    mapping: Arc<Mapping>,
    offset: usize,
    len: usize,
}

impl Piece {
    /// Maps `len` zeroed bytes and gives all of them out as one piece.
    pub(crate) fn map(len: usize) -> io::Result<Self> {
        let map_len = len.checked_add(HUGE).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
        let map = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), map_len, protection, flags) }?;
        let map = NonNull::new(map.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let shift = map.as_ptr().align_offset(HUGE);
        debug_assert!(shift < HUGE, "a byte pointer can be aligned");
        // SAFETY: `shift` is below HUGE, so the result and `len` bytes after it lie inside the `len + HUGE` mapped.
        let base = unsafe { map.add(shift) };
        let mapping = Mapping { map, map_len, base };
        // SAFETY: the range was mapped just now; this advice changes no content. Failure only costs speed.
        let _ = unsafe { rustix::mm::madvise(base.as_ptr().cast(), len, Advice::LinuxHugepage) };
        Ok(Self { mapping: Arc::new(mapping), offset: 0, len })
    }

    /// Bytes in the piece.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where it begins in its mapping.
    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    /// The first `at` bytes, and the rest; the whole piece and an empty rest when it is shorter.
    pub(crate) fn split_at(self, at: usize) -> (Self, Self) {
        let at = at.min(self.len);
        let first = Self { mapping: Arc::clone(&self.mapping), offset: self.offset, len: at };
        let rest = Self { mapping: self.mapping, offset: self.offset + at, len: self.len - at };
        (first, rest)
    }

    /// Whether `next` begins where this piece ends.
    pub(crate) fn touches(&self, next: &Self) -> bool {
        Arc::ptr_eq(&self.mapping, &next.mapping) && self.offset + self.len == next.offset
    }

    /// One piece of two that touch; both unchanged when they do not.
    pub(crate) fn join(self, next: Self) -> Result<Self, (Self, Self)> {
        if !self.touches(&next) {
            return Err((self, next));
        }
        Ok(Self { mapping: self.mapping, offset: self.offset, len: self.len + next.len })
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: `offset` is at most the length of the mapping's usable part: `map` starts at 0 and `split_at` and
        // `join` keep `offset + len` within what their inputs had.
        unsafe { self.mapping.base.as_ptr().add(self.offset) }
    }

    /// Where it lies.
    fn addresses(&self) -> Range<usize> {
        let start = self.start().expose_provenance();
        start..start + self.len
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the range is mapped, initialised (anonymous memory is zero) and owned by this piece alone; it is
        // only written through `&mut self`, which this borrow excludes.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }

    /// The bytes, to fill.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len) }
    }
}

/// The owner of a descriptor.
pub(crate) type Owner = Arc<dyn AsFd + Send + Sync>;

fn raw(owner: &Owner) -> i32 {
    owner.as_fd().as_raw_fd()
}

/// A file that the ring may work on; in the ring's table of registered files when it has a slot.
pub(crate) struct RingFile {
    pub(crate) fd: Owner,
    pub(crate) slot: Option<u32>,
}

/// What the ring holds for one submitted operation.
pub(crate) enum Op {
    /// Waits once for readiness.
    Poll { fd: Owner, events: u32, token: u64 },
    /// Writes `run` from byte `done` on, to `offset + done` of the file.
    Write { run: Run, file: Arc<RingFile>, offset: u64, done: usize, tag: u64 },
    /// Takes back a poll.
    Cancel,
}

struct Place {
    generation: u32,
    op: Option<Op>,
}

/// An io_uring that owns what its operations use.
pub(crate) struct Uring {
    ring: IoUring,
    places: Vec<Place>,
    free: Vec<u32>,
    /// Addresses of the buffer memory; empty when none of it can be registered (any more).
    memory: Range<usize>,
    /// The first part of it, which is registered (as buffer 0): as much as was written from so far.
    registered: Range<usize>,
    writes: usize,
}

impl Uring {
    /// A ring for `entries` submissions. Of `memory`, the whole of the buffer memory, what is written from will be
    /// registered when the kernel lets us (locked-memory limit). The calling thread must be the one that uses it.
    pub(crate) fn new(entries: u32, memory: Option<&Piece>) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_clamp()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize(entries.saturating_mul(4))
            .build(entries)
            // Kernels before 6.1 know neither flag.
            .or_else(|_| IoUring::builder().setup_clamp().build(entries))?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "io_uring is older than Linux 5.11"));
        }
        let mut part = 0..0;
        if let Some(memory) = memory {
            // Before 5.19 there is no sparse table.
            match ring.submitter().register_buffers_sparse(1) {
                Ok(()) => part = memory.addresses(),
                Err(error) => tracing::info!(%error, "io_uring without registered buffers"),
            }
        }
        let registered = part.start..part.start;
        Ok(Self { ring, places: Vec::new(), free: Vec::new(), memory: part, registered, writes: 0 })
    }

    /// Bytes of buffer memory that are registered.
    pub(crate) fn registered(&self) -> usize {
        self.registered.len()
    }

    /// Registers more of the buffer memory when this run lies behind what is registered. Registering pins the pages, so
    /// all of it at the start would cost its clearing then, and its size for good.
    fn reach(&mut self, run: &Run) {
        let (start, len) = run.span();
        let Some(end) = start.addr().checked_add(len) else { return };
        let inside = self.memory.start <= start.addr() && end <= self.memory.end;
        if !inside || end <= self.registered.end {
            return;
        }
        let had = self.registered.len();
        // What is registered is pinned again each time, so the number of times is bounded, too.
        let step = STEP.max(self.memory.len() / 8);
        let len = (end - self.memory.start).max(had + had.min(step));
        let len = len.next_multiple_of(HUGE).min(self.memory.len());
        let base = std::ptr::with_exposed_provenance_mut(self.memory.start);
        let buffer = libc::iovec { iov_base: base, iov_len: len };
        // SAFETY: the run lies in this mapping and so keeps it; the kernel pins the pages for as long as they are
        // registered, and what it had pinned before until the writes that use it have ended.
        match unsafe { self.ring.submitter().register_buffers_update(0, &[buffer], None) } {
            Ok(()) => self.registered.end = self.memory.start + len,
            Err(error) => {
                tracing::warn!(%error, "buffer memory is not registered with io_uring");
                self.memory = self.registered.clone();
            }
        }
    }

    /// Makes an empty table of `count` registered files.
    pub(crate) fn register_files(&self, count: u32) -> io::Result<()> {
        self.ring.submitter().register_files_sparse(count)
    }

    /// Puts `fd` into the table, or clears the slot.
    pub(crate) fn set_file(&self, slot: u32, fd: Option<&Owner>) -> io::Result<()> {
        let fd = fd.map_or(-1, raw);
        self.ring.submitter().register_files_update(slot, &[fd]).map(|_| ())
    }

    /// Writes that have not completed.
    pub(crate) fn writes(&self) -> usize {
        self.writes
    }

    /// Hands an operation to the kernel; it goes out with the next [`Uring::wait`]. On failure it comes back.
    pub(crate) fn start(&mut self, op: Op) -> Result<(), (Op, io::Error)> {
        if let Op::Write { run, .. } = &op {
            self.reach(run);
        }
        match self.entry(&op) {
            Ok(entry) => self.push(op, entry),
            Err(error) => Err((op, error)),
        }
    }

    fn push(&mut self, op: Op, entry: squeue::Entry) -> Result<(), (Op, io::Error)> {
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place { generation: 0, op: None });
            u32::try_from(self.places.len() - 1).expect("fewer operations than 2^32")
        });
        let at = usize::try_from(place).expect("a usize holds a place");
        let entry = entry.user_data(user_data(self.places[at].generation, place));
        // The op is stored before the kernel can see the entry and leaves only in `next` (its completion).
        self.writes += usize::from(matches!(op, Op::Write { .. }));
        self.places[at].op = Some(op);
        loop {
            // SAFETY: what the entry points to (the bytes of a `Run`, a descriptor) is owned by the op stored above,
            // which stays until the completion with this user_data; the bytes do not move when the `Run` moves.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            let error = match pushed {
                Ok(()) => return Ok(()),
                // The queue is full: give what is there to the kernel first.
                Err(_) => match self.ring.submit() {
                    Ok(_) => continue,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => error,
                },
            };
            let op = self.take(place).expect("stored above");
            return Err((op, error));
        }
    }

    /// Asks the kernel to end every poll. Each still completes, with its own result or as cancelled.
    pub(crate) fn cancel_polls(&mut self) {
        let polls: Vec<u64> = (0u32..)
            .zip(&self.places)
            .filter(|(_, place)| matches!(place.op, Some(Op::Poll { .. })))
            .map(|(at, place)| user_data(place.generation, at))
            .collect();
        for poll in polls {
            if let Err((_, error)) = self.push(Op::Cancel, opcode::PollRemove::new(poll).build()) {
                tracing::warn!(%error, "a poll could not be ended");
            }
        }
    }

    /// Whether any operation has not completed.
    pub(crate) fn busy(&self) -> bool {
        self.free.len() < self.places.len()
    }

    fn entry(&self, op: &Op) -> io::Result<squeue::Entry> {
        match op {
            Op::Poll { fd, events, .. } => Ok(opcode::PollAdd::new(types::Fd(raw(fd)), *events).build()),
            // Only `cancel_polls` starts these, with an entry of its own.
            Op::Cancel => Err(io::ErrorKind::InvalidInput.into()),
            Op::Write { run, file, offset, done, .. } => {
                let (start, len) = run.span();
                let rest =
                    len.checked_sub(*done).filter(|rest| *rest > 0).ok_or(io::ErrorKind::InvalidInput)?;
                let len32 = u32::try_from(rest).map_err(|_| io::ErrorKind::InvalidInput)?;
                let buffer = start.wrapping_add(*done);
                let step = u64::try_from(*done).map_err(|_| io::ErrorKind::InvalidInput)?;
                let position = offset.checked_add(step).ok_or(io::ErrorKind::InvalidInput)?;
                let fixed = self.registered.start <= start.addr()
                    && start.addr().checked_add(len).is_some_and(|end| end <= self.registered.end);
                let fd = types::Fd(raw(&file.fd));
                Ok(match (fixed, file.slot) {
                    (true, Some(slot)) => {
                        opcode::WriteFixed::new(types::Fixed(slot), buffer, len32, 0).offset(position).build()
                    }
                    (true, None) => opcode::WriteFixed::new(fd, buffer, len32, 0).offset(position).build(),
                    (false, Some(slot)) => {
                        opcode::Write::new(types::Fixed(slot), buffer, len32).offset(position).build()
                    }
                    (false, None) => opcode::Write::new(fd, buffer, len32).offset(position).build(),
                })
            }
        }
    }

    /// Submits, and waits until something completes or `timeout` is over; `Some(ZERO)` does not wait.
    pub(crate) fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let result = match timeout {
            None => self.ring.submit_and_wait(1),
            Some(timeout) => {
                let spec = types::Timespec::from(timeout);
                let args = types::SubmitArgs::new().timespec(&spec);
                self.ring.submitter().submit_with_args(1, &args)
            }
        };
        match result {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // ETIME: the time is over. EBUSY: completions must be taken first. EAGAIN: no memory just now.
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// The next completed operation and the kernel's result (a negative errno, or what the operation gives).
    pub(crate) fn next(&mut self) -> Option<(Op, i32)> {
        loop {
            let entry: cqueue::Entry = self.ring.completion().next()?;
            let place = u32::try_from(entry.user_data() & 0xffff_ffff).expect("masked");
            let generation = u32::try_from(entry.user_data() >> 32).expect("shifted");
            let known = usize::try_from(place).ok().and_then(|at| self.places.get(at));
            if known.is_none_or(|known| known.generation != generation) {
                tracing::error!(
                    user_data = entry.user_data(),
                    "io_uring completed an operation nobody started"
                );
                continue;
            }
            if let Some(op) = self.take(place) {
                return Some((op, entry.result()));
            }
        }
    }

    fn take(&mut self, place: u32) -> Option<Op> {
        let at = usize::try_from(place).ok()?;
        let op = self.places[at].op.take()?;
        self.places[at].generation = self.places[at].generation.wrapping_add(1);
        self.free.push(place);
        self.writes -= usize::from(matches!(op, Op::Write { .. }));
        Some(op)
    }
}

/// The key of an operation: its place, and how often that place was used before.
fn user_data(generation: u32, place: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(place)
}

impl Drop for Uring {
    fn drop(&mut self) {
        while self.writes > 0 {
            if self.wait(None).is_err() {
                // The kernel may still read from these buffers: they can never be given back.
                Box::leak(std::mem::take(&mut self.places).into_boxed_slice());
                return;
            }
            while self.next().is_some() {}
        }
    }
}
