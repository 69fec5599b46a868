//! The system calls that have no safe wrapper.
#![allow(unsafe_code)]

use rustix::io::Errno;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// `CACHEFILES_IOC_READ_COMPLETE`, `_IOW(0x98, 1, int)`.
const READ_COMPLETE: libc::c_ulong = 0x4004_9801;

/// `F_SETSIG` of `include/uapi/asm-generic/fcntl.h`: which signal a broken lease raises.
const F_SETSIG: libc::c_int = 10;

/// Tells the kernel that the READ with that number is done. The argument is the number itself.
pub(crate) fn read_complete(anon: BorrowedFd<'_>, msg_id: u32) -> io::Result<()> {
    loop {
        // SAFETY: the descriptor is open for the length of the call; the request takes an integer and the kernel
        // reads and writes no memory of ours.
        let rc = unsafe { libc::ioctl(anon.as_raw_fd(), READ_COMPLETE as _, libc::c_ulong::from(msg_id)) };
        if rc >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Takes over the descriptor that came with an OPEN, and sets close-on-exec, which the kernel does not.
pub(crate) fn adopt(fd: RawFd) -> Result<OwnedFd, Errno> {
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: only a number is passed; for one that is not open the call fails with EBADF.
    let rc = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    if rc < 0 {
        return Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::BADF));
    }
    // SAFETY: the descriptor is open (above), was installed by the kernel for the reader of this message, and each
    // message is decoded once, so nothing else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether somebody has the file open for writing: a read lease is granted only when nobody has. `file` must be open
/// for reading only. Whoever opens the file at just this moment waits until the lease is given back.
pub(crate) fn is_open_for_writing(file: BorrowedFd<'_>) -> io::Result<bool> {
    let fd = file.as_raw_fd();
    // A lease that is broken while we hold it raises a signal; SIGURG is ignored by default, SIGIO would kill.
    // SAFETY: the descriptor is open, the argument an integer.
    let rc = unsafe { libc::fcntl(fd, F_SETSIG, libc::SIGURG) };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    let rc = unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) };
    if rc < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::EAGAIN) { Ok(true) } else { Err(error) };
    }
    // SAFETY: as above.
    let rc = unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(false) }
}
