//! Two processes, one table of descriptors: the server, and one that waits for its end.
//!
//! When the last descriptor of a fanotify group closes, every reader is let through unfilled. So there is a second
//! process that shares the server's very table: whatever the server opens is open there too, under the same number.
//! When the server dies, this one executes the program anew, which goes on from the [ledger](super::ledger). A
//! standby that dies is replaced by the server.

use super::ledger::{Ledger, VERSION};
use super::log::log;
use super::peer::Process;
use super::{Server, process};
use crate::sys;
use rustix::event::{PollFd, PollFlags};
use rustix::process::{PidfdFlags, Signal, WaitId, WaitIdOptions};
use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a standby waits before it tries once more to execute the program. Its readers wait meanwhile.
const RETRY: Duration = Duration::from_millis(100);

/// Who takes over.
#[derive(Debug)]
pub(super) enum Standby {
    /// None could be started yet.
    Nobody,
    /// It has our table, so the pidfd of us that it watches must stay open in here.
    Ours { process: Process, _own: OwnedFd },
    /// Of the program that this process executed before, or of the one whose place we took: its table is a copy from
    /// then. What we have read from the group since would be lost on it.
    Outdated(Process),
}

impl Standby {
    pub(super) fn process(&self) -> Option<&Process> {
        match self {
            Self::Nobody => None,
            Self::Ours { process, .. } | Self::Outdated(process) => Some(process),
        }
    }
}

impl Server {
    /// Starts a standby when there is none. At every instant exactly one process is named to take over: the old one
    /// until the new one is written down.
    pub(super) fn keep_standby(&mut self) {
        let Some(program) = &self.program else { return };
        if let Standby::Ours { process: standby, .. } = &self.standby {
            if !standby.is_dead() {
                return;
            }
            log!("process {}, which stood by, is gone; starting another", standby.pid);
        }
        match start(&self.ledger, program) {
            Ok((process, own)) => {
                let old = std::mem::replace(&mut self.standby, Standby::Ours { process, _own: own });
                if let Some(old) = old.process() {
                    old.end();
                }
            }
            Err(error) if self.group_errors.pass() => log!("no standby: {error}"),
            Err(_) => {}
        }
    }

    /// Nothing is held any more, or nobody is left to read it: nobody has to take over.
    pub(super) fn dismiss_standby(&mut self) {
        if let Some(standby) = std::mem::replace(&mut self.standby, Standby::Nobody).process() {
            standby.end();
        }
    }

    /// Goes on as the program that lies where this one was started from. Returns when that cannot be.
    pub(super) fn upgrade(&self) {
        let Some(path) = &self.program else { return };
        let program = path.display();
        let told = std::process::Command::new(path).arg("--ledger-version").output();
        let known = match &told {
            Ok(output) => String::from_utf8_lossy(&output.stdout).trim().parse() == Ok(VERSION),
            Err(_) => false,
        };
        if !known {
            return log!(
                "not upgraded: {program} does not read version {VERSION} of what is held ({told:?})"
            );
        }
        log!("going on as {program}");
        let error = execute(path, path, &self.ledger);
        close_on_exec(true);
        log!("not upgraded: {program}: {error}");
    }
}

/// Where this program was started from: a program that took over is told by its first argument, since its own link in
/// `/proc` may say that it was replaced.
pub(super) fn own_program() -> PathBuf {
    let named = std::env::args_os().next().map(PathBuf::from).filter(|named| named.is_absolute());
    named.or_else(|| std::env::current_exe().ok()).unwrap_or_else(|| PathBuf::from("skimmer-keeper"))
}

/// Starts a process that waits for our end, and names it in the ledger. Gives it and the descriptor by which it waits.
fn start(ledger: &Ledger, program: &Path) -> io::Result<(Process, OwnedFd)> {
    let own = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    match sys::clone_with_descriptors()? {
        None => {
            let never = AssertUnwindSafe(|| stand_by(&own, ledger, program));
            // A panic must not end in what the server does with its own.
            let _ = std::panic::catch_unwind(never);
            std::process::abort()
        }
        Some(pid) => {
            let standby = Process::open(pid)?;
            ledger.update(|header| (header.standby, header.standby_fd) = (pid, standby.raw()));
            Ok((standby, own))
        }
    }
}

/// The standby: waits for the server's end and takes its place.
fn stand_by(server: &OwnedFd, ledger: &Ledger, program: &Path) -> ! {
    // Locks are not inherited.
    process::lock_memory();
    loop {
        let mut ready = [PollFd::new(server, PollFlags::IN)];
        let polled = rustix::event::poll(&mut ready, None);
        if ready[0].revents().contains(PollFlags::IN) {
            break;
        }
        if polled != Err(rustix::io::Errno::INTR) {
            std::thread::sleep(RETRY);
        }
    }
    // What this process remembers of the ledger is from when it was started.
    if !is_named(ledger) {
        // The server died while it replaced one standby by another; the other one goes on.
        std::process::exit(0);
    }
    // From here on we are the server. The new program starts a standby of its own and ends this one.
    let _next = start(ledger, program).map_err(|error| log!("no standby: {error}"));
    loop {
        // What runs, wherever it lies now.
        let error = execute(Path::new("/proc/self/exe"), program, ledger);
        log!("cannot take over: {error}; trying again, readers wait");
        std::thread::sleep(RETRY);
    }
}

/// Whether this process is the one to take over: it is named, or the one that is named is dead.
fn is_named(ledger: &Ledger) -> bool {
    // Without a ledger that can be read there is nobody else either.
    let Ok(header) = ledger.reload() else { return true };
    let own = rustix::process::getpid().as_raw_nonzero().get();
    // By its process id: the descriptor's number means nothing here when the server has executed a program since.
    if header.standby == own {
        return true;
    }
    loop {
        match Process::open(header.standby) {
            Ok(named) => return named.is_dead(),
            Err(error) if is_nobody(&error) => return true,
            // Two that take over would be in each other's way.
            Err(error) => log!("whether process {} lives: {error}; asking again", header.standby),
        }
        std::thread::sleep(RETRY);
    }
}

/// Whether the kernel said that there is no process of that number.
fn is_nobody(error: &io::Error) -> bool {
    // Without a number nobody is named. EINVAL: it is a thread's by now.
    error.raw_os_error().is_none_or(|raw| matches!(raw, libc::ESRCH | libc::EINVAL))
}

/// Executes `file` with our arguments and every descriptor; returns when that fails. `named` is where the program was
/// started from.
fn execute(file: &Path, named: &Path, ledger: &Ledger) -> io::Error {
    let text = |text: OsString| CString::new(text.into_vec()).map_err(io::Error::other);
    let mut arguments: Vec<OsString> = vec![named.into()];
    let mut old = std::env::args_os().skip(1);
    while let Some(argument) = old.next() {
        if argument == "--resume" {
            old.next();
        } else {
            arguments.push(argument);
        }
    }
    arguments.extend(["--resume".into(), ledger.raw().to_string().into()]);
    let arguments: Result<Vec<CString>, io::Error> = arguments.into_iter().map(text).collect();
    let (file, arguments) = match (text(file.into()), arguments) {
        (Ok(file), Ok(arguments)) => (file, arguments),
        (Err(error), _) | (_, Err(error)) => return error,
    };
    close_on_exec(false);
    sys::execute(&file, &arguments)
}

/// The descriptors that are open, but for the three of every program.
pub(super) fn open_descriptors() -> Vec<RawFd> {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return Vec::new() };
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<RawFd>().ok());
    let numbers: Vec<RawFd> = numbers.filter(|&number| number > 2).collect();
    // The directory itself was one of them.
    numbers.into_iter().filter(|&number| sys::is_open(number)).collect()
}

/// Says of every descriptor whether it goes when another program is executed.
fn close_on_exec(close: bool) {
    for number in open_descriptors() {
        sys::close_on_exec(number, close);
    }
}

impl Process {
    /// Ends it for good. A child of ours leaves a trace until it is waited for; that it is none is no harm.
    fn end(&self) {
        let _ = rustix::process::pidfd_send_signal(self, Signal::KILL);
        let of = || WaitId::PidFd(self.as_fd());
        let _ = rustix::io::retry_on_intr(|| rustix::process::waitid(of(), WaitIdOptions::EXITED));
    }
}
