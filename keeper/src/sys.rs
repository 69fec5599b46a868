//! The system calls that have no safe wrapper.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

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

fn signal_set(signals: &[libc::c_int]) -> io::Result<libc::sigset_t> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set it is given.
    check(unsafe { libc::sigemptyset(set.as_mut_ptr()) })?;
    // SAFETY: initialised by the call above.
    let mut set = unsafe { set.assume_init() };
    for &signal in signals {
        // SAFETY: the set is initialised and ours.
        check(unsafe { libc::sigaddset(&raw mut set, signal) })?;
    }
    Ok(set)
}

/// Blocks the given signals in this thread (the only one).
pub(crate) fn block_signals(signals: &[libc::c_int]) -> io::Result<()> {
    let set = signal_set(signals)?;
    // SAFETY: the set is initialised; a NULL old set is allowed.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) }).map(drop)
}

/// A non-blocking descriptor at which the given signals arrive while they are blocked.
pub(crate) fn signal_fd(signals: &[libc::c_int]) -> io::Result<OwnedFd> {
    let set = signal_set(signals)?;
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

/// `F_SETSIG` of `include/uapi/asm-generic/fcntl.h`: which signal a broken lease raises.
const F_SETSIG: libc::c_int = 10;

/// Takes or gives back a write lease: granted only while no open file but `writer`'s own refers to the file. `EAGAIN`
/// when there is another. Whoever opens the file meanwhile waits until the lease is given back.
pub(crate) fn write_lease(writer: BorrowedFd<'_>, take: bool) -> io::Result<()> {
    // Ignored by default; SIGIO would kill.
    // SAFETY: the descriptor is open, the argument an integer.
    check(unsafe { libc::fcntl(writer.as_raw_fd(), F_SETSIG, libc::SIGURG) })?;
    let kind = if take { libc::F_WRLCK } else { libc::F_UNLCK };
    // SAFETY: as above.
    check(unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETLEASE, kind) }).map(drop)
}

/// A new process that shares our descriptors, so that what either opens or closes is open or closed in both; `None` in
/// it, its process id in this one. Not for a process with more than one thread.
pub(crate) fn clone_with_descriptors() -> io::Result<Option<i32>> {
    let flags = libc::c_long::from(libc::CLONE_FILES | libc::SIGCHLD);
    let none: libc::c_long = 0;
    // SAFETY: without CLONE_VM this is a fork: the child has a copy of our memory and goes on on a copy of our stack
    // (no stack is given). We have one thread, so no lock is held by one that is not copied.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) };
    match i32::try_from(pid) {
        Ok(0) => Ok(None),
        Ok(pid) if pid > 0 => Ok(Some(pid)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Executes a program with the environment of this one. Returns when that fails.
pub(crate) fn execute(program: &CString, arguments: &[CString]) -> io::Error {
    let mut pointers: Vec<_> = arguments.iter().map(|argument| argument.as_ptr()).collect();
    pointers.push(std::ptr::null());
    // SAFETY: all strings end with a zero byte and outlive the call, the list of them ends with NULL.
    unsafe { libc::execv(program.as_ptr(), pointers.as_ptr()) };
    io::Error::last_os_error()
}

/// Whether a descriptor of that number is open.
pub(crate) fn is_open(number: RawFd) -> bool {
    // SAFETY: F_GETFD takes any number and touches no memory.
    unsafe { libc::fcntl(number, libc::F_GETFD) >= 0 }
}

/// Whether the descriptor goes when another program is executed.
pub(crate) fn close_on_exec(number: RawFd, close: bool) {
    let flags = if close { libc::FD_CLOEXEC } else { 0 };
    // SAFETY: F_SETFD takes any number and touches no memory.
    unsafe { libc::fcntl(number, libc::F_SETFD, flags) };
}

/// The descriptor of that number, which the program before this one left open. Only once for each number, and before
/// anything else in this process owns it.
pub(crate) fn inherited(number: RawFd) -> Option<OwnedFd> {
    if number <= 2 || !is_open(number) {
        return None;
    }
    close_on_exec(number, true);
    // SAFETY: it is open, and the caller sees to it that nobody else in this process owns it.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Opens what `fd` is under a number that is free, too, for [`inherited`].
pub(crate) fn duplicate_at(fd: BorrowedFd<'_>, number: RawFd) -> io::Result<()> {
    // SAFETY: both are numbers; the caller has seen that nothing is open under the second.
    check(unsafe { libc::dup3(fd.as_raw_fd(), number, libc::O_CLOEXEC) }).map(drop)
}

/// Looks at the descriptor of that number; `None` when none is open or `look` finds nothing.
pub(crate) fn borrowed<T>(number: RawFd, look: impl FnOnce(BorrowedFd<'_>) -> Option<T>) -> Option<T> {
    if !is_open(number) {
        return None;
    }
    // SAFETY: it is open, and this process has one thread, which closes nothing while it looks.
    look(unsafe { BorrowedFd::borrow_raw(number) })
}
