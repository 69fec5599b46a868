//! The listening socket: one keeper per path, nobody else may connect.

use super::log::log;
use super::{StartError, kept};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::Pid;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

/// Listens; removes its socket file when dropped.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Held for life: whoever has it owns the socket's path.
    lock: OwnedFd,
}

impl Listener {
    /// Listens there. When another keeper does, fails or waits for its end.
    pub(crate) fn new(path: &Path, wait: bool) -> Result<Self, StartError> {
        let lock_path = lock_path(path);
        let fail = |path: &Path, what| {
            let path = path.to_owned();
            move |errno: Errno| StartError::Socket { path, what, source: errno.into() }
        };
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let lock = rustix::fs::open(&lock_path, flags, Mode::RUSR | Mode::WUSR);
        let lock = lock.map_err(fail(&lock_path, "opening the lock file"))?;
        let mut locked = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive);
        if wait && locked == Err(Errno::WOULDBLOCK) {
            log!("another keeper runs; waiting for its end");
            locked = rustix::io::retry_on_intr(|| rustix::fs::flock(&lock, FlockOperation::LockExclusive));
            if locked.is_ok() && kept::is_there() {
                // What was handed over when this process was started is older than what that one had.
                return Err(StartError::Again);
            }
        }
        locked.map_err(|errno| match errno {
            Errno::WOULDBLOCK => StartError::Running(path.into()),
            errno => fail(&lock_path, "locking")(errno),
        })?;
        // Bound beside its place and renamed into it, so that whoever finds the socket is answered. The lock is
        // ours, so files that are there belong to nobody.
        let mut made_path = OsString::from(path);
        made_path.push(".new");
        let made_path = PathBuf::from(made_path);
        match rustix::fs::unlink(&made_path) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(fail(&made_path, "removing an old socket")(errno)),
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let socket = socket.map_err(fail(path, "making a socket"))?;
        let address = SocketAddrUnix::new(&made_path).map_err(fail(&made_path, "as a socket address"))?;
        let umask = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
        let bound = rustix::net::bind(&socket, &address);
        rustix::process::umask(umask);
        bound.map_err(fail(&made_path, "binding"))?;
        rustix::net::listen(&socket, 16).map_err(fail(&made_path, "listening"))?;
        rustix::fs::rename(&made_path, path).map_err(fail(path, "moving the socket into place"))?;
        name_owner(&lock);
        Ok(Self { socket, path: path.into(), lock })
    }

    /// The one that another process made.
    pub(crate) fn inherited(socket: OwnedFd, lock: OwnedFd, path: &Path) -> Self {
        name_owner(&lock);
        Self { socket, path: path.into(), lock }
    }

    /// The numbers of socket and lock.
    pub(crate) fn raw(&self) -> [RawFd; 2] {
        [self.socket.as_raw_fd(), self.lock.as_raw_fd()]
    }

    /// The next connection, or `None` when nobody waits.
    pub(crate) fn accept(&self) -> io::Result<Option<OwnedFd>> {
        match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => Ok(Some(socket)),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

fn lock_path(socket: &Path) -> PathBuf {
    let mut path = OsString::from(socket);
    path.push(".lock");
    PathBuf::from(path)
}

/// Writes into the lock file who serves.
fn name_owner(lock: &OwnedFd) {
    let pid = format!("{:<10}\n", rustix::process::getpid().as_raw_nonzero());
    if let Err(errno) = rustix::io::pwrite(lock, pid.as_bytes(), 0) {
        log!("the lock file does not name this process: {errno}");
    }
}

/// The keeper that listens at `path`; `None` when there is none.
///
/// # Errors
/// The lock file cannot be read, or names nobody.
pub fn owner(path: &Path) -> io::Result<Option<Pid>> {
    let lock = match std::fs::File::open(lock_path(path)) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) {
        Err(Errno::WOULDBLOCK) => {}
        Ok(()) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    }
    let pid = io::read_to_string(lock)?.trim().parse().ok().and_then(Pid::from_raw);
    pid.map(Some).ok_or_else(|| io::Error::other("the lock file names no process"))
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = rustix::fs::unlink(&self.path);
    }
}
