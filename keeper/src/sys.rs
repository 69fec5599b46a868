//! The system calls that have no safe wrapper.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

fn check(rc: libc::c_int) -> io::Result<libc::c_int> {
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) }
}

/// Process and user of the peer when it connected. A process that this namespace cannot see is 0, which is why this is
/// not left to a wrapper with a non-zero process type.
pub(crate) fn peer_credentials(socket: BorrowedFd<'_>) -> io::Result<(i32, u32)> {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let size = size_of::<libc::ucred>();
    let mut len = libc::socklen_t::try_from(size).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `len` bytes into `peer`, a plain structure of integers of that size.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    })?;
    Ok((peer.pid, peer.uid))
}

/// Blocks the given signals in this thread (the only one) and returns a non-blocking descriptor they arrive at.
pub(crate) fn signal_fd(signals: &[libc::c_int]) -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set it is given.
    check(unsafe { libc::sigemptyset(set.as_mut_ptr()) })?;
    // SAFETY: initialised by the call above.
    let mut set = unsafe { set.assume_init() };
    for &signal in signals {
        // SAFETY: the set is initialised and ours.
        check(unsafe { libc::sigaddset(&raw mut set, signal) })?;
    }
    // SAFETY: the set is initialised; a NULL old set is allowed.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) })?;
    // SAFETY: the set is initialised; -1 asks for a new descriptor.
    let fd = check(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Ignores a signal.
pub(crate) fn ignore_signal(signal: libc::c_int) -> io::Result<()> {
    // SAFETY: SIG_IGN installs no handler, so no code of ours runs in signal context.
    let previous = unsafe { libc::signal(signal, libc::SIG_IGN) };
    if previous == libc::SIG_ERR { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes or gives back a write lease: granted only while no open file but `writer`'s own refers to the file. `EAGAIN`
/// when there is another. Whoever opens the file meanwhile waits until the lease is given back.
pub(crate) fn write_lease(writer: BorrowedFd<'_>, take: bool) -> io::Result<()> {
    let kind = if take { libc::F_WRLCK } else { libc::F_UNLCK };
    // SAFETY: the descriptor is open, the argument an integer.
    check(unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETLEASE, kind) }).map(drop)
}
