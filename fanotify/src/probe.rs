//! Does this kernel raise pre-content events for files of this directory? Found out by trying.

use crate::group::{EventAccess, EventBuffer, Group, GroupError, Notification};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

/// Length of the probe file, all holes.
const FILE_BYTES: u64 = 64 * 1024;
/// Where the probe reads, and how much.
const READ_AT: u64 = 16 * 1024;
const READ_BYTES: usize = 4096;
/// What the probe fills the hole with.
const PATTERN: u8 = 0xa5;
/// How long an event may take. It takes microseconds where it comes at all.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// Why pre-content events cannot be used in a directory.
#[derive(Debug, thiserror::Error)]
pub enum Unsupported {
    /// The group or the mark is refused; the message says why and what would help.
    #[error("{}: {source}", dir.display())]
    Refused {
        /// Directory that was probed.
        dir: PathBuf,
        /// The refusal.
        source: GroupError,
    },
    /// Everything was accepted, but a read of a hole raised no event.
    #[error("{}: a read of a marked hole raised no event within 5 s: files here would read as zeros", dir.display())]
    NoEvent {
        /// Directory that was probed.
        dir: PathBuf,
    },
    /// The event came, but the reader did not get the bytes that were filled in.
    #[error("{}: the reader of a filled hole got other bytes", dir.display())]
    WrongBytes {
        /// Directory that was probed.
        dir: PathBuf,
    },
    /// The probe itself could not be carried out.
    #[error("{}: cannot probe for pre-content events: {what}: {source}", dir.display())]
    Io {
        /// Directory that was probed.
        dir: PathBuf,
        /// Step that failed.
        what: &'static str,
        /// Its error.
        source: io::Error,
    },
}

/// Marks a sparse file in `dir`, reads a hole of it in another thread, and expects the event and then the filled
/// bytes. The file has no name, so nothing is left behind.
///
/// # Errors
/// [`Unsupported`] says what is missing.
pub fn probe(dir: &Path) -> Result<(), Unsupported> {
    let io = |what| move |error: Errno| Unsupported::Io { dir: dir.into(), what, source: error.into() };
    let refused = |source| Unsupported::Refused { dir: dir.into(), source };

    let writer = nameless(dir).map_err(io("making a file"))?;
    rustix::fs::ftruncate(&writer, FILE_BYTES).map_err(io("setting its length"))?;
    let group = Group::new(EventAccess::ReadOnly).map_err(refused)?;
    group.mark(&writer).map_err(refused)?;

    // Opened only now: a descriptor from before the mark is silent.
    let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
    let reader = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let reader = reader.map_err(io("opening it again"))?;
    let reading = thread::Builder::new().name("fanotify-probe".into()).spawn(move || read_block(&reader));
    let reading =
        reading.map_err(|source| Unsupported::Io { dir: dir.into(), what: "starting a thread", source })?;

    let event = answer_one(&group, &writer);
    // The reader is released by this whatever happened before, so that joining it cannot hang.
    drop(group);
    let read = reading.join().unwrap_or(Err(Errno::IO));
    match event {
        Ok(true) => {}
        Ok(false) => return Err(Unsupported::NoEvent { dir: dir.into() }),
        Err(error) => return Err(error.into_unsupported(dir)),
    }
    match read {
        Ok(block) if block.iter().all(|&byte| byte == PATTERN) => Ok(()),
        Ok(_) => Err(Unsupported::WrongBytes { dir: dir.into() }),
        Err(error) => Err(io("reading it")(error)),
    }
}

enum Failure {
    Group(GroupError),
    Step(&'static str, Errno),
}

impl Failure {
    fn into_unsupported(self, dir: &Path) -> Unsupported {
        match self {
            Self::Group(source) => Unsupported::Refused { dir: dir.into(), source },
            Self::Step(what, error) => Unsupported::Io { dir: dir.into(), what, source: error.into() },
        }
    }
}

/// Waits for the event, fills the block and allows the read; false when no event came.
fn answer_one(group: &Group, writer: &OwnedFd) -> Result<bool, Failure> {
    let mut ready = [PollFd::new(group, PollFlags::IN)];
    let count = rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, Some(&PATIENCE)));
    if count.map_err(|error| Failure::Step("waiting for the event", error))? == 0 {
        return Ok(false);
    }
    let mut access = None;
    let mut buffer = EventBuffer::new();
    group
        .read(&mut buffer, |notification| {
            if let Notification::Access(token) = notification {
                access = Some(token);
            }
        })
        .map_err(Failure::Group)?;
    let Some(access) = access else { return Ok(false) };
    let covers = access.range().is_none_or(|range| {
        let end = range.offset.saturating_add(range.count);
        range.offset <= READ_AT && end > READ_AT
    });
    if !covers {
        return Ok(false);
    }
    let written = rustix::io::pwrite(writer, &[PATTERN; READ_BYTES], READ_AT);
    if written.map_err(|error| Failure::Step("filling it", error))? != READ_BYTES {
        return Err(Failure::Step("filling it", Errno::IO));
    }
    access.allow().map_err(|_| Failure::Step("answering the event", Errno::IO))?;
    Ok(true)
}

fn read_block(reader: &OwnedFd) -> Result<[u8; READ_BYTES], Errno> {
    let mut block = [0; READ_BYTES];
    let count = rustix::io::retry_on_intr(|| rustix::io::pread(reader, &mut block[..], READ_AT))?;
    if count == READ_BYTES { Ok(block) } else { Err(Errno::IO) }
}

/// A file that no name leads to; where the file system has no such thing, a named one that is unlinked at once.
fn nameless(dir: &Path) -> Result<OwnedFd, Errno> {
    let mode = Mode::RUSR | Mode::WUSR;
    let dir = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    match rustix::fs::openat(&dir, ".", OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC, mode) {
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {}
        other => return other,
    }
    let name = format!(".skimmer-probe-{}", std::process::id());
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&dir, name.as_str(), flags, mode)?;
    rustix::fs::unlinkat(dir.as_fd(), name.as_str(), rustix::fs::AtFlags::empty())?;
    Ok(file)
}
