//! A lease: proof that nobody else has a file open.

use std::io;
use std::os::fd::BorrowedFd;

use crate::sys;

/// As long as it lives, no open file but its own refers to the file (fcntl(2), `F_SETLEASE`). Whoever opens the file
/// meanwhile waits, as long as `/proc/sys/fs/lease-break-time` tells at most.
#[derive(Debug)]
pub struct WriteLease<'a>(BorrowedFd<'a>);

impl<'a> WriteLease<'a> {
    /// Takes it; `None` when another open file refers to the file, be it a mount's.
    ///
    /// # Errors
    /// The system's: the file is another user's, or its file system has no leases.
    pub fn take(writer: BorrowedFd<'a>) -> io::Result<Option<Self>> {
        match sys::write_lease(writer, true) {
            Ok(()) => Ok(Some(Self(writer))),
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Drop for WriteLease<'_> {
    fn drop(&mut self) {
        let _ = sys::write_lease(self.0, false);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn it_is_had_alone_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let writer = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let reader = File::open(&path).unwrap();
        assert!(WriteLease::take(writer.as_fd()).unwrap().is_none());
        drop(reader);
        let lease = WriteLease::take(writer.as_fd()).unwrap().unwrap();
        // Waits, and raises a signal that must not end this process.
        let opener = std::thread::spawn(move || File::open(path).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert!(!opener.is_finished());
        drop(lease);
        let reader = opener.join().unwrap();
        assert!(WriteLease::take(writer.as_fd()).unwrap().is_none());
        drop(reader);
        assert!(WriteLease::take(writer.as_fd()).unwrap().is_some());
    }
}
