//! The group descriptor: marks go in, events come out.

use crate::event::{self, AccessRange, EventError, FAN_PRE_ACCESS, FAN_Q_OVERFLOW};
use crate::sys;
use crate::token::{DenyErrno, PreAccess, deny_number, deny_unreadable};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

const FAN_CLOEXEC: u32 = 0x1;
const FAN_NONBLOCK: u32 = 0x2;
const FAN_CLASS_PRE_CONTENT: u32 = 0x8;
/// Without it a full queue lets reads through unfilled.
const FAN_UNLIMITED_QUEUE: u32 = 0x10;
const FAN_UNLIMITED_MARKS: u32 = 0x20;
const FAN_MARK_ADD: u32 = 0x1;
const FAN_MARK_REMOVE: u32 = 0x2;

/// How the descriptors that come with events are opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventAccess {
    /// For filling through a descriptor of one's own.
    ReadOnly,
    /// For filling through the event's descriptor. Where the accessor came through a read-only mount the kernel
    /// cannot open it like this and denies the access.
    ReadWrite,
}

/// What one look at the group yields.
#[derive(Debug)]
pub enum Notification {
    /// An access waits.
    Access(PreAccess),
    /// Events were lost, and their accesses let through unfilled. Does not happen with the flags used here.
    Overflow,
    /// An event that makes no sense; its access, if there was one, has been denied with `EIO`.
    Malformed(EventError),
}

/// Failures of the group, with what to do about them.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// No right to make a group.
    #[error(
        "fanotify_init: {0}: pre-content events need CAP_SYS_ADMIN in the initial user namespace; run as root"
    )]
    NotPrivileged(#[source] io::Error),
    /// The kernel has no permission events.
    #[error(
        "fanotify_init: {0}: this kernel has no pre-content class (needs CONFIG_FANOTIFY_ACCESS_PERMISSIONS)"
    )]
    NoClass(#[source] io::Error),
    /// Any other failure of `fanotify_init`.
    #[error("fanotify_init: {0}")]
    Init(#[source] io::Error),
    /// The mask is unknown.
    #[error("fanotify_mark: {0}: this kernel has no FAN_PRE_ACCESS (needs 6.14 or later)")]
    KernelTooOld(#[source] io::Error),
    /// The file system has not opted in.
    #[error(
        "fanotify_mark: {0}: the file system of this file has no pre-content events (use ext4, XFS or btrfs)"
    )]
    FileSystem(#[source] io::Error),
    /// Removing a mark that is not there.
    #[error("fanotify_mark: {0}: the file carries no mark of this group")]
    NotMarked(#[source] io::Error),
    /// Any other failure of `fanotify_mark`.
    #[error("fanotify_mark: {0}")]
    Mark(#[source] io::Error),
    /// Reading the group failed. With `EMFILE` and the like the kernel has already denied one access.
    #[error("reading the fanotify group: {0}")]
    Read(#[source] io::Error),
}

impl GroupError {
    /// The kernel's error number.
    #[must_use]
    pub fn raw_os_error(&self) -> i32 {
        let (Self::NotPrivileged(error)
        | Self::NoClass(error)
        | Self::Init(error)
        | Self::KernelTooOld(error)
        | Self::FileSystem(error)
        | Self::NotMarked(error)
        | Self::Mark(error)
        | Self::Read(error)) = self;
        error.raw_os_error().unwrap_or_else(|| Errno::IO.raw_os_error())
    }
}

/// Where [`Group::read`] puts the kernel's bytes.
#[derive(Debug)]
pub struct EventBuffer([u8; EventBuffer::BYTES]);

impl EventBuffer {
    const BYTES: usize = 128;
    /// No read with this buffer yields more notifications.
    pub const MAX_EVENTS: usize = Self::BYTES / event::METADATA_LEN + 1;

    /// An empty buffer.
    #[must_use]
    pub fn new() -> Self {
        Self([0; Self::BYTES])
    }
}

impl Default for EventBuffer {
    fn default() -> Self {
        Self::new()
    }
}

/// A fanotify group of the pre-content class. Dropping it, and every token of it, lets all waiting and later reads of
/// the marked files through **unfilled**: drop it only when nothing is marked.
#[derive(Debug)]
pub struct Group {
    fd: Arc<OwnedFd>,
}

impl Group {
    /// Makes a group: non-blocking, unlimited queue and marks.
    ///
    /// # Errors
    /// [`GroupError::NotPrivileged`], [`GroupError::NoClass`], [`GroupError::Init`].
    pub fn new(access: EventAccess) -> Result<Self, GroupError> {
        use rustix::fs::OFlags;
        let flags =
            FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC | FAN_NONBLOCK | FAN_UNLIMITED_QUEUE | FAN_UNLIMITED_MARKS;
        let mode = match access {
            EventAccess::ReadOnly => OFlags::RDONLY,
            EventAccess::ReadWrite => OFlags::RDWR,
        };
        let event_flags = (mode | OFlags::LARGEFILE | OFlags::CLOEXEC).bits();
        let fd = sys::fanotify_init(flags, event_flags).map_err(|error| {
            match error.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::PERM) => GroupError::NotPrivileged(error),
                Some(Errno::NOSYS | Errno::INVAL) => GroupError::NoClass(error),
                _ => GroupError::Init(error),
            }
        })?;
        Ok(Self { fd: Arc::new(fd) })
    }

    /// The group that another program of this process, or a process with the same descriptors, has made.
    #[must_use]
    pub fn inherited(fd: OwnedFd) -> Self {
        Self { fd: Arc::new(fd) }
    }

    /// An access that was read before from this group and not answered. `fd` is the event's own descriptor, under the
    /// number that it came with: the kernel finds the access by it.
    pub fn left(&self, fd: OwnedFd, range: Option<AccessRange>) -> PreAccess {
        PreAccess::new(Arc::clone(&self.fd), fd, range, 0)
    }

    /// Denies an access that a process which is gone had read from this group, and whose descriptor had that number there;
    /// whether there was one. Not for a number that an access has in this process.
    pub fn deny_left(&self, number: RawFd, errno: DenyErrno) -> bool {
        deny_number(self.fd.as_fd(), number, errno)
    }

    /// Marks the file behind `file`. Only descriptors that are opened *after* this raise events.
    ///
    /// # Errors
    /// [`GroupError::KernelTooOld`], [`GroupError::FileSystem`], [`GroupError::Mark`].
    pub fn mark(&self, file: impl AsFd) -> Result<(), GroupError> {
        sys::fanotify_mark(self.fd.as_fd(), FAN_MARK_ADD, FAN_PRE_ACCESS, file.as_fd()).map_err(mark_error)
    }

    /// Removes the mark. An access that is just being set up may slip through, so only complete files are unmarked.
    ///
    /// # Errors
    /// [`GroupError::NotMarked`], [`GroupError::Mark`].
    pub fn unmark(&self, file: impl AsFd) -> Result<(), GroupError> {
        sys::fanotify_mark(self.fd.as_fd(), FAN_MARK_REMOVE, FAN_PRE_ACCESS, file.as_fd()).map_err(mark_error)
    }

    /// Reads what waits, at most [`EventBuffer::MAX_EVENTS`] notifications, and returns how many there were; 0 means
    /// that nothing waits.
    ///
    /// # Errors
    /// [`GroupError::Read`].
    pub fn read(
        &self,
        buffer: &mut EventBuffer,
        mut each: impl FnMut(Notification),
    ) -> Result<usize, GroupError> {
        let length = match rustix::io::retry_on_intr(|| rustix::io::read(&*self.fd, &mut buffer.0[..])) {
            Ok(length) => length,
            Err(Errno::AGAIN) => return Ok(0),
            Err(errno) => return Err(GroupError::Read(errno.into())),
        };
        let mut count = 0;
        for event in event::decode(&buffer.0[..length]) {
            each(self.notification(event));
            count += 1;
        }
        Ok(count)
    }

    fn notification(&self, event: Result<event::RawEvent, EventError>) -> Notification {
        match event {
            Ok(event) if event.mask & FAN_PRE_ACCESS != 0 && event.fd >= 0 => match sys::adopt(event.fd) {
                Some(fd) => {
                    Notification::Access(PreAccess::new(Arc::clone(&self.fd), fd, event.range, event.pid))
                }
                None => Notification::Overflow,
            },
            Ok(event) => {
                if let Some(fd) = sys::adopt(event.fd) {
                    deny_unreadable(self.fd.as_fd(), fd);
                }
                if event.mask & FAN_Q_OVERFLOW == 0 {
                    tracing::warn!(
                        mask = event.mask,
                        fd = event.fd,
                        "event of a kind that was not asked for"
                    );
                }
                Notification::Overflow
            }
            Err(error) => {
                if let Some(fd) = error.fd.and_then(sys::adopt) {
                    deny_unreadable(self.fd.as_fd(), fd);
                }
                Notification::Malformed(error)
            }
        }
    }
}

impl AsFd for Group {
    /// Readable when an event waits.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn mark_error(error: io::Error) -> GroupError {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::INVAL) => GroupError::KernelTooOld(error),
        Some(Errno::OPNOTSUPP) => GroupError::FileSystem(error),
        Some(Errno::NOENT) => GroupError::NotMarked(error),
        _ => GroupError::Mark(error),
    }
}
