//! What makes the process hard to lose, all of it best effort.

use super::log::log;
use crate::sys;
use rustix::mm::MlockAllFlags;
use rustix::process::{Resource, Rlimit};
use std::io;
use std::os::fd::OwnedFd;

/// Limits, memory, signals. Returns the descriptor at which SIGTERM, SIGINT and SIGHUP arrive.
///
/// # Errors
/// Only when signals cannot be redirected: then a signal would kill the process and open the group.
pub(crate) fn harden(oom_score_adj: i32) -> io::Result<OwnedFd> {
    let signals = sys::signal_fd(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP])?;
    sys::ignore_signal(libc::SIGPIPE)?;
    // A lease that somebody breaks raises it.
    sys::ignore_signal(libc::SIGIO)?;
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", oom_score_adj.to_string()) {
        log!("oom_score_adj {oom_score_adj}: {error}; the out-of-memory killer may choose this process");
    }
    lock_memory();
    Ok(signals)
}

/// Raises the limit of open files to its hard limit and returns it.
pub(crate) fn raise_open_files() -> u64 {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if rustix::process::setrlimit(Resource::Nofile, wanted).is_err() {
        return limit.current.unwrap_or(u64::MAX);
    }
    limit.maximum.unwrap_or(u64::MAX)
}

/// Keeps every page of this process in memory.
pub(crate) fn lock_memory() {
    let unlimited = Rlimit { current: None, maximum: None };
    let everything = rustix::process::setrlimit(Resource::Memlock, unlimited).is_ok();
    // Under a finite limit MCL_FUTURE would let allocations fail later, which is worse than a page that is swapped.
    let flags =
        if everything { MlockAllFlags::CURRENT | MlockAllFlags::FUTURE } else { MlockAllFlags::CURRENT };
    if let Err(error) = rustix::mm::mlockall(flags) {
        log!("mlockall: {error}; a reader may have to wait for this process to be paged in");
    }
}
