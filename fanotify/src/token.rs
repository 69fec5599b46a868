//! One waiting access, answered exactly once.

use crate::event::AccessRange;
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

const FAN_ALLOW: u32 = 1;
const FAN_DENY: u32 = 2;
/// The errno of a denial sits in the top byte of the response.
const ERRNO_SHIFT: u32 = 24;

/// The errors that the kernel lets a listener give to an accessor (`fs/notify/fanotify/fanotify_user.c`). With any
/// other one it refuses the whole answer and the accessor stays blocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DenyErrno {
    /// `EIO`
    Io,
    /// `EPERM`
    Perm,
    /// `EBUSY`
    Busy,
    /// `ETXTBSY`
    TextBusy,
    /// `EAGAIN`
    Again,
    /// `ENOSPC`
    NoSpace,
    /// `EDQUOT`
    Quota,
}

impl DenyErrno {
    /// The permitted error of that number; every other number becomes [`DenyErrno::Io`].
    #[must_use]
    pub fn from_raw(errno: i32) -> Self {
        let all = [Self::Perm, Self::Busy, Self::TextBusy, Self::Again, Self::NoSpace, Self::Quota];
        all.into_iter().find(|known| known.raw() == errno).unwrap_or(Self::Io)
    }

    /// The number.
    #[must_use]
    pub fn raw(self) -> i32 {
        let errno = match self {
            Self::Io => Errno::IO,
            Self::Perm => Errno::PERM,
            Self::Busy => Errno::BUSY,
            Self::TextBusy => Errno::TXTBSY,
            Self::Again => Errno::AGAIN,
            Self::NoSpace => Errno::NOSPC,
            Self::Quota => Errno::DQUOT,
        };
        errno.raw_os_error()
    }
}

/// An answer that did not reach the accessor.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// The kernel no longer has the event: its accessor was killed.
    #[error("the kernel no longer waits for this event (its accessor is gone)")]
    Gone,
    /// The kernel took no answer; the accessor was denied with `EIO` instead if that was possible.
    #[error("writing the answer to the fanotify group failed: {0}")]
    Write(#[source] io::Error),
}

/// An access that the kernel holds until it is answered. Dropping it denies the access with `EIO`.
///
/// The token keeps the group open, so no group can close under an unanswered access.
#[derive(Debug)]
#[must_use = "an access that is not answered is denied"]
pub struct PreAccess {
    group: Arc<OwnedFd>,
    /// `None` once answered.
    fd: Option<OwnedFd>,
    range: Option<AccessRange>,
    pid: i32,
}

impl PreAccess {
    pub(crate) fn new(group: Arc<OwnedFd>, fd: OwnedFd, range: Option<AccessRange>, pid: i32) -> Self {
        Self { group, fd: Some(fd), range, pid }
    }

    /// What is about to be read; `None` means the position is not known: fill the whole file.
    #[must_use]
    pub fn range(&self) -> Option<AccessRange> {
        self.range
    }

    /// The process that accesses the file; for readahead whoever triggered it.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Lets the access go on. Its bytes must be in the file by now.
    ///
    /// # Errors
    /// [`AnswerError`]; the token is used up in any case.
    pub fn allow(mut self) -> Result<(), AnswerError> {
        self.answer(FAN_ALLOW)
    }

    /// Makes the access fail with `errno`.
    ///
    /// # Errors
    /// [`AnswerError`]; the token is used up in any case.
    pub fn deny(mut self, errno: DenyErrno) -> Result<(), AnswerError> {
        self.answer(denial(errno))
    }

    /// Answers, then closes the event's descriptor: closed first, its number could name another event.
    fn answer(&mut self, response: u32) -> Result<(), AnswerError> {
        let Some(fd) = self.fd.take() else { return Ok(()) };
        let result = match respond(self.group.as_fd(), fd.as_raw_fd(), response) {
            Ok(()) => Ok(()),
            Err(Errno::NOENT) => Err(AnswerError::Gone),
            Err(errno) => {
                // Not left without an answer if anything can be done about it.
                if response != denial(DenyErrno::Io) {
                    let _ = respond(self.group.as_fd(), fd.as_raw_fd(), denial(DenyErrno::Io));
                }
                Err(AnswerError::Write(errno.into()))
            }
        };
        drop(fd);
        result
    }
}

impl AsFd for PreAccess {
    /// The file, as the kernel opened it for this event: its reads and writes raise no events.
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.fd {
            Some(fd) => fd.as_fd(),
            // Only an answered token has none, and answering consumes the token; the group is a valid stand-in.
            None => self.group.as_fd(),
        }
    }
}

impl Drop for PreAccess {
    fn drop(&mut self) {
        if self.fd.is_none() {
            return;
        }
        tracing::warn!(pid = self.pid, range = ?self.range, "unanswered access is denied with EIO");
        if let Err(error) = self.answer(denial(DenyErrno::Io)) {
            tracing::warn!(pid = self.pid, "denying an unanswered access: {error}");
        }
    }
}

fn denial(errno: DenyErrno) -> u32 {
    FAN_DENY | (errno.raw().unsigned_abs() << ERRNO_SHIFT)
}

/// Writes one `struct fanotify_response`.
pub(crate) fn respond(group: BorrowedFd<'_>, fd: RawFd, response: u32) -> Result<(), Errno> {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&fd.to_ne_bytes());
    bytes[4..].copy_from_slice(&response.to_ne_bytes());
    match rustix::io::retry_on_intr(|| rustix::io::write(group, &bytes))? {
        8 => Ok(()),
        _ => Err(Errno::IO),
    }
}

/// Denies the access behind a descriptor whose event could not be understood, and closes it.
pub(crate) fn deny_unreadable(group: BorrowedFd<'_>, fd: OwnedFd) {
    let _ = respond(group, fd.as_raw_fd(), denial(DenyErrno::Io));
}

/// Denies the access that the kernel knows by this number; whether there was one.
pub(crate) fn deny_number(group: BorrowedFd<'_>, number: RawFd, errno: DenyErrno) -> bool {
    respond(group, number, denial(errno)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_permitted_errors_pass() {
        for errno in [1, 5, 11, 16, 26, 28, 122] {
            assert_eq!(DenyErrno::from_raw(errno).raw(), errno);
        }
        for errno in [0, 4, 110, -5, i32::MAX, i32::MIN] {
            assert_eq!(DenyErrno::from_raw(errno), DenyErrno::Io);
        }
    }

    #[test]
    fn response_bits() {
        assert_eq!(denial(DenyErrno::Io), 0x0500_0002);
        assert_eq!(denial(DenyErrno::Quota), 0x7a00_0002);
    }
}
