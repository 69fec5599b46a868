//! A directory, a keeper, files whose every byte is known, and readers.

use crate::manager::Manager;
use rustix::event::{PollFd, PollFlags};
use skimmer_fanotify::Unsupported;
use skimmer_keeper::client::{Command, Keeper, KeeperError, Notice, Welcome};
use skimmer_keeper::protocol::{EventId, FileId, Fill};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::RecvTimeoutError;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Nothing here takes this long; it only ends a run that hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// The keepers that were started and not waited for.
static RUNNING: Mutex<Vec<rustix::process::Pid>> = Mutex::new(Vec::new());

/// Runs one scenario. When it hangs, because a reader is never answered, its keepers are killed: that sets all
/// readers free, with bytes that then fail the scenario.
pub(crate) fn bounded<T>(scenario: impl FnOnce() -> T) -> T {
    let (end, ended) = std::sync::mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            if ended.recv_timeout(2 * PATIENCE) == Err(RecvTimeoutError::Timeout) {
                eprintln!("this hangs: killing its keepers");
                for &pid in &*RUNNING.lock().unwrap() {
                    let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
                }
            }
        });
        // Dropped on the way out, also by a panic.
        let _end = end;
        scenario()
    })
}

/// The byte at an offset of every test file; never 0, so that a hole cannot pass for data.
pub(crate) fn byte_at(offset: u64) -> u8 {
    let word = (offset / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (offset >> 20);
    word.to_le_bytes()[usize::try_from(offset % 8).unwrap()] | 1
}

pub(crate) fn expected(offset: u64, len: usize) -> Vec<u8> {
    (offset..).take(len).map(byte_at).collect()
}

/// Fills a range as a daemon would, clipped to the file.
pub(crate) fn fill(writer: &File, offset: u64, count: u64) {
    let end = (offset + count).min(writer.metadata().unwrap().len());
    let len = usize::try_from(end.saturating_sub(offset)).unwrap();
    writer.write_all_at(&expected(offset, len), offset).unwrap();
}

/// A scratch directory where the kernel raises pre-content events.
pub(crate) struct Bench {
    dir: TempDir,
    /// Apart, and short: a socket's path has at most 107 bytes.
    sockets: TempDir,
}

impl Bench {
    pub(crate) fn new() -> Result<Self, Unsupported> {
        let dir = skimmer_test_support::scratch_dir();
        skimmer_fanotify::probe(dir.path())?;
        Ok(Self { dir, sockets: tempfile::tempdir().unwrap() })
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.sockets.path().join("keeper.sock")
    }

    /// A sparse file and the descriptor to fill it with.
    pub(crate) fn sparse(&self, name: &str, len: u64) -> (PathBuf, File) {
        let path = self.dir.path().join(name);
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(len).unwrap();
        (path, file)
    }

    pub(crate) fn start(&self, args: &[&str]) -> KeeperProcess {
        Self::spawn(self.command(args))
    }

    /// With what the service manager has for it.
    pub(crate) fn start_under(&self, manager: &Manager, args: &[&str]) -> KeeperProcess {
        Self::spawn(manager.hand_over(&self.command(args)))
    }

    fn command(&self, args: &[&str]) -> std::process::Command {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_skimmer-keeper"));
        command.arg("--socket").arg(self.socket()).args(args);
        command
    }

    fn spawn(mut command: std::process::Command) -> KeeperProcess {
        let child = command
            .stdin(Stdio::null())
            // All of its processes can be killed at once.
            .process_group(0)
            .spawn()
            .unwrap();
        let keeper = KeeperProcess(child);
        RUNNING.lock().unwrap().push(keeper.pid());
        keeper
    }

    /// Connects, waiting for the keeper to listen.
    pub(crate) fn connect(&self) -> (Client, Welcome) {
        let until = Instant::now() + PATIENCE;
        loop {
            match Keeper::connect(&self.socket()) {
                Ok((keeper, welcome)) => return (Client(keeper), welcome),
                Err(KeeperError::NotRunning { .. }) if Instant::now() < until => {
                    thread::sleep(Duration::from_millis(5));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// This program as a daemon, see `worker`.
    pub(crate) fn worker(&self, args: &[&str]) -> Worker {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .arg("worker")
            .arg(self.socket())
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Worker { child, out }
    }
}

/// A started keeper; killed when the scenario is over. What still waits in it is let go first by the readers' ends.
pub(crate) struct KeeperProcess(Child);

impl KeeperProcess {
    pub(crate) fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.0)
    }

    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        let status = self.0.wait().unwrap();
        RUNNING.lock().unwrap().retain(|&pid| pid != self.pid());
        status
    }

    /// The process that was started and the one that stands by, so that nobody is left.
    pub(crate) fn kill(&mut self) {
        let _ = rustix::process::kill_process_group(self.pid(), rustix::process::Signal::KILL);
    }

    /// The server and the one that stands by, whichever is which.
    pub(crate) fn members(&self) -> Vec<rustix::process::Pid> {
        let group = self.pid().as_raw_nonzero().get().to_string();
        let stat = |entry: std::fs::DirEntry| std::fs::read_to_string(entry.path().join("stat")).ok();
        let stats = std::fs::read_dir("/proc").unwrap().filter_map(|entry| stat(entry.unwrap()));
        // `pid (comm) state ppid pgrp …`; a name may hold anything, so the fields are counted from its end.
        let members = stats.filter_map(|stat| {
            let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
            let is_ours = fields.get(2) == Some(&group.as_str()) && fields.first() != Some(&"Z");
            is_ours.then(|| rustix::process::Pid::from_raw(stat.split(' ').next()?.parse().ok()?)).flatten()
        });
        members.collect()
    }

    /// The same, as soon as there are two: on a slow machine the last kill may not be made good yet.
    pub(crate) fn pair(&self) -> Vec<rustix::process::Pid> {
        let until = Instant::now() + PATIENCE;
        loop {
            let members = self.members();
            if members.len() > 1 {
                return members;
            }
            assert!(Instant::now() < until, "nobody stands by");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until that one is no member any more.
    pub(crate) fn wait_without(&self, member: rustix::process::Pid) {
        let until = Instant::now() + PATIENCE;
        while self.members().contains(&member) {
            assert!(Instant::now() < until, "a killed process does not end");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until none of them is left.
    pub(crate) fn wait_for_all(&mut self) {
        let until = Instant::now() + PATIENCE;
        while !self.members().is_empty() {
            assert!(Instant::now() < until, "a process of the keeper does not end");
            thread::sleep(Duration::from_millis(5));
        }
        self.wait();
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for KeeperProcess {
    fn drop(&mut self) {
        RUNNING.lock().unwrap().retain(|&pid| pid != self.pid());
        self.kill();
        let _ = self.0.wait();
    }
}

/// A daemon process.
pub(crate) struct Worker {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Worker {
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// The next line it prints.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line.trim_end().into()
    }

    /// SIGKILL, and gone when this returns.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The connection of a daemon, waiting where the real one is non-blocking.
pub(crate) struct Client(pub(crate) Keeper);

impl Client {
    pub(crate) fn next(&mut self) -> Notice {
        self.try_next().unwrap()
    }

    /// Why the connection ended.
    pub(crate) fn lost(&mut self) -> KeeperError {
        self.try_next().unwrap_err()
    }

    pub(crate) fn try_next(&mut self) -> Result<Notice, KeeperError> {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(notice) = self.0.recv()? {
                return Ok(notice);
            }
            assert!(Instant::now() < until, "no notice");
            let mut flags = PollFlags::IN;
            flags.set(PollFlags::OUT, self.0.wants_write());
            let second = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
            rustix::event::poll(&mut [PollFd::new(&self.0, flags)], Some(&second)).unwrap();
        }
    }

    pub(crate) fn event(&mut self) -> (EventId, FileId, u64, u64) {
        match self.next() {
            Notice::Event { event, file, offset, count } => (event, file, offset, count),
            other => panic!("{other:?} instead of an event"),
        }
    }

    /// Sends a command and gives its outcome as an error number, 0 for success.
    pub(crate) fn done(&mut self, command: Command<'_>) -> i32 {
        let sent = self.0.send(command).unwrap();
        match self.next() {
            Notice::Done { seq, result } if seq == sent => result.err().map_or(0, |errno| errno.raw()),
            other => panic!("{other:?} instead of an outcome"),
        }
    }

    pub(crate) fn watch(&mut self, file: u64, label: &str, writer: &File) -> i32 {
        self.done(Command::Watch { file: FileId(file), label, fd: writer.as_fd() })
    }

    pub(crate) fn unwatch(&mut self, file: u64, complete: bool) -> i32 {
        self.done(Command::Unwatch { file: FileId(file), complete })
    }

    /// Says what is in a range.
    pub(crate) fn fill(&mut self, file: u64, offset: u64, count: u64, fill: Fill) {
        self.0.send(Command::Fill { file: FileId(file), offset, count, fill }).unwrap();
    }

    pub(crate) fn allow(&mut self, event: EventId) {
        self.0.send(Command::Answer { event, result: Ok(()) }).unwrap();
    }
}

/// Reads a range in another thread through a descriptor opened now.
pub(crate) fn read(path: &Path, offset: u64, len: usize) -> JoinHandle<std::io::Result<Vec<u8>>> {
    let file = File::open(path).unwrap();
    thread::spawn(move || {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, offset).map(|()| bytes)
    })
}
