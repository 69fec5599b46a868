//! What makes the process hard to lose, all of it best effort.

use super::log::log;
use crate::sys;
use rustix::mm::MlockAllFlags;
use rustix::process::{Resource, Rlimit};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What would end the process.
const SIGNALS: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Keeps signals from ending the process, until [`harden`] says where they arrive.
pub(crate) fn block_signals() -> io::Result<()> {
    sys::block_signals(&SIGNALS)
}

/// Limits, memory, signals. Returns the descriptor at which SIGTERM, SIGINT and SIGHUP arrive.
///
/// # Errors
/// Only when signals cannot be redirected: then a signal would kill the process and open the group.
pub(crate) fn harden(oom_score_adj: i32) -> io::Result<OwnedFd> {
    block_signals()?;
    let signals = sys::signal_fd(&SIGNALS)?;
    sys::ignore_signal(libc::SIGPIPE)?;
    // A broken lease raises it, where nobody chose another signal.
    sys::ignore_signal(libc::SIGIO)?;
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", oom_score_adj.to_string()) {
        log!("oom_score_adj {oom_score_adj}: {error}; the out-of-memory killer may choose this process");
    }
    lock_memory();
    Ok(signals)
}

/// Finds out whether this program is the last.
#[derive(Debug, Default)]
pub(crate) struct Last {
    looked: Option<Instant>,
    /// Nobody was seen the last time.
    alone: bool,
}

impl Last {
    /// How often it looks.
    pub(crate) const RETRY: Duration = Duration::from_millis(100);

    /// Whether twice in a row no process was there that could read anything: the first time one may have passed by
    /// unseen, as a child that was made behind the place that was looked at.
    pub(crate) fn is_sure(&mut self) -> bool {
        if self.looked.is_some_and(|looked| looked.elapsed() < Self::RETRY) {
            return false;
        }
        self.looked = Some(Instant::now());
        let before = std::mem::replace(&mut self.alone, is_alone());
        before && self.alone
    }
}

/// Whether besides the processes of this program there are only the first one, the kernel's threads, and those of root
/// that ask to be spared at a shutdown (systemd's `ROOT_STORAGE_DAEMONS`). Never so where not all can be seen.
fn is_alone() -> bool {
    /// `PROC_PID_INIT_INO` of the kernel's `proc_ns.h`: the first namespace of processes.
    const ALL: &str = "pid:[4026531836]";
    let sees_all = std::fs::read_link("/proc/self/ns/pid").is_ok_and(|name| name.as_os_str() == ALL);
    let Ok(entries) = std::fs::read_dir("/proc") else { return false };
    let mut own = false;
    for entry in entries {
        let Ok(entry) = entry else { return false };
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        own |= pid == std::process::id();
        if pid != 1 && may_read(pid) {
            return false;
        }
    }
    sees_all && own
}

fn may_read(pid: u32) -> bool {
    let place = PathBuf::from(format!("/proc/{pid}"));
    match std::fs::read(place.join("stat")) {
        Ok(stat) if is_somebody(&String::from_utf8_lossy(&stat)) => {
            let is_root = std::fs::metadata(&place).is_ok_and(|of| of.uid() == 0);
            !(is_root && std::fs::read(place.join("cmdline")).is_ok_and(|line| line.starts_with(b"@")))
        }
        Ok(_) => false,
        // ESRCH: it ended while it was looked at.
        Err(error) => !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)),
    }
}

/// Whether that is of a process that lives, is none of the kernel's and none of this program's. proc(5): `pid (comm) state
/// ppid pgrp session tty_nr tpgid flags minflt cminflt majflt cmajflt utime stime cutime cstime priority nice num_threads …`;
/// a name may hold anything.
fn is_somebody(stat: &str) -> bool {
    /// `PF_KTHREAD` of the kernel's `sched.h`.
    const KERNEL: u64 = 0x0020_0000;
    let Some((name, rest)) = stat.rsplit_once(") ") else { return true };
    let fields: Vec<&str> = rest.split(' ').collect();
    let number = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok());
    // The other threads of one whose first thread has ended go on.
    let is_dead =
        matches!(fields.first(), Some(&("Z" | "X"))) && number(17).is_some_and(|threads| threads <= 1);
    let is_kernel = number(6).is_some_and(|flags| flags & KERNEL != 0);
    let is_ours = name.split_once('(').is_some_and(|(_, name)| name == "skimmer-keeper");
    !(is_dead || is_kernel || is_ours)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whom_a_stat_is_of() {
        let stat = |name: &str, state: char, flags: u32, threads: u32| {
            format!("7 ({name}) {state} 1 7 7 0 -1 {flags} 1 0 0 0 3 1 0 0 20 0 {threads} 0 100 0 0")
        };
        assert!(is_somebody(&stat("bash", 'S', 0x40_0000, 1)));
        assert!(is_somebody(&stat("a) Z 1 (b", 'R', 0, 1)));
        assert!(is_somebody(&stat("a (skimmer-keeper", 'R', 0, 1)));
        assert!(is_somebody("7 (what"));
        assert!(!is_somebody(&stat("kthreadd", 'S', 0x20_8040, 1)));
        assert!(!is_somebody(&stat("skimmer-keeper", 'S', 0, 1)));
        // Its first thread ended; then all of it.
        assert!(is_somebody(&stat("bash", 'Z', 0, 2)) && !is_somebody(&stat("bash", 'Z', 0, 1)));

        let own = std::fs::read_to_string("/proc/self/stat").unwrap();
        let threads = own.rsplit_once(") ").unwrap().1.split(' ').nth(17).unwrap();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(status.contains(&format!("Threads:\t{threads}\n")), "{threads}");
        // The tests' own process, at least, could read.
        assert!(is_somebody(&own) && !is_alone());
    }
}
