//! The system calls that have no safe wrapper.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// `fanotify_init(2)`.
pub(crate) fn fanotify_init(flags: u32, event_flags: u32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two integers and touches no memory of ours.
    let fd = unsafe { libc::fanotify_init(flags, event_flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `fanotify_mark(2)` on the file behind `file` itself: the path is NULL, so there is no name to race with.
pub(crate) fn fanotify_mark(
    group: BorrowedFd<'_>,
    flags: u32,
    mask: u64,
    file: BorrowedFd<'_>,
) -> io::Result<()> {
    // SAFETY: both descriptors are open for the length of the call; a NULL path is allowed and means `file` itself.
    let rc =
        unsafe { libc::fanotify_mark(group.as_raw_fd(), flags, mask, file.as_raw_fd(), std::ptr::null()) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes over a descriptor that the kernel installed in this process while it delivered an event.
pub(crate) fn adopt(fd: RawFd) -> Option<OwnedFd> {
    if fd < 0 {
        return None;
    }
    // SAFETY: the number comes from an event just read from the group; the kernel opened it for the reader of that
    // event, each event is decoded once, and no other code of this process has seen the number.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}
