//! The daemon's side of the keeper's socket.

use crate::packet::{self, Received};
use crate::protocol::{Errno, EventId, FileId, Fill, Label, Message, ProtocolError, Refusal, Reply, Request};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno as Sys;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a keeper may take for its welcome. It first waits some seconds for a daemon that is just exiting.
const WELCOME_PATIENCE: Duration = Duration::from_secs(15);
/// More files than this in a welcome are not believed.
const MAX_FILES: u64 = 1 << 20;

/// A command to the keeper.
#[derive(Debug)]
pub enum Command<'a> {
    /// Mark the file and relay its events. `Done` carries `EEXIST` when the name or the file is watched already,
    /// `EBADF` when the descriptor cannot write a regular file, `EINVAL`/`EOPNOTSUPP` when kernel or file system have
    /// no pre-content events, `EMFILE` when the keeper's table of files is full.
    Watch {
        /// Name for it, unique among the watched files.
        file: FileId,
        /// At most 96 bytes without control characters; the blob id. The next daemon gets it in [`Welcome`].
        label: &'a str,
        /// Open for reading and writing, **opened before the file was marked**: a later one raises events on our own
        /// writes. The keeper holds a duplicate until the file is unwatched.
        fd: BorrowedFd<'a>,
    },
    /// Remove the mark and let go of the writing descriptor. `Done` carries `ENOENT` when the file is not watched.
    Unwatch {
        /// Which file.
        file: FileId,
        /// `true`: every byte is in place and durable; events of it that still wait are answered by the daemon as
        /// always, or allowed by the keeper when the daemon dies first. `false` (after the last unmount): the keeper
        /// makes sure with a write lease that nobody but holders of this very descriptor has the file open; else
        /// `Done` carries `EBUSY`, the file stays watched and the command is to be repeated later, because a reader
        /// of an unmarked hole would get zeros.
        complete: bool,
    },
    /// Answer an event: let the access go on, its bytes are in the file, or make it fail. There is no `Done`; an
    /// answer to an event that does not wait brings [`Notice::Stale`].
    Answer {
        /// Which event.
        event: EventId,
        /// What the accessor gets. Errors that fanotify does not permit become `EIO`.
        result: Result<(), Errno>,
    },
    /// What is in these bytes of a watched file. The keeper answers accesses to what is filled itself from now on: to
    /// what is [`Fill::Durable`] whether a daemon lives or not, to what is [`Fill::Written`] while this connection lasts.
    /// There is no `Done`; a file that is not watched is ignored.
    Fill {
        /// Which file.
        file: FileId,
        /// First byte.
        offset: u64,
        /// Bytes. Filled is a page of which all is filled, absent one of which any is absent.
        count: u64,
        /// What is there.
        fill: Fill,
    },
    /// Open `/dev/cachefiles`, or hand out the one that is open; brings [`Notice::Device`], or `Done` with the error.
    OpenDevice,
    /// Close the keeper's `/dev/cachefiles`. Only when nothing is mounted over it: mounts never recover.
    CloseDevice,
    /// Exit. `Done` carries `EBUSY` when files are watched or the device is held.
    Stop,
}

/// What comes from the keeper.
#[derive(Debug)]
pub enum Notice {
    /// An access waits; answer it with [`Command::Answer`].
    Event {
        /// Its name.
        event: EventId,
        /// The file it reads, by the name that `Watch` gave.
        file: FileId,
        /// First byte.
        offset: u64,
        /// Bytes; may pass the end of the file and may be 0 (then there is nothing to fill, just allow).
        count: u64,
    },
    /// The command with that sequence number is done.
    Done {
        /// What [`Keeper::send`] returned.
        seq: u32,
        /// Its outcome.
        result: Result<(), Errno>,
    },
    /// The device, in answer to [`Command::OpenDevice`].
    Device {
        /// What [`Keeper::send`] returned.
        seq: u32,
        /// `/dev/cachefiles`, close-on-exec.
        fd: OwnedFd,
    },
    /// An answer named an event that no longer waits. Harmless.
    Stale {
        /// The name given.
        event: EventId,
    },
}

/// A file that the keeper watches already.
#[derive(Debug)]
pub struct HeldFile {
    /// Label given with `Watch`: the blob id.
    pub label: String,
    /// Name given with `Watch`; events use it.
    pub file: FileId,
    /// The writing descriptor from before the mark.
    pub fd: OwnedFd,
}

/// What the keeper holds when a daemon connects.
#[derive(Debug)]
pub struct Welcome {
    /// Version of the protocol.
    pub version: u16,
    /// The keeper's process id.
    pub pid: i32,
    /// `/dev/cachefiles` is open in the keeper: ask for it with [`Command::OpenDevice`] and `restore`.
    pub device_held: bool,
    /// The watched files. Their waiting events follow as [`Notice::Event`].
    pub files: Vec<HeldFile>,
}

/// Failures of the connection.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// Nobody listens there.
    #[error("{}: no keeper answers ({source}); start skimmer-keeper", path.display())]
    NotRunning {
        /// Socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another daemon is served.
    #[error("{}: the keeper serves another daemon, process {pid}; stop that one first", path.display())]
    Busy {
        /// Socket.
        path: PathBuf,
        /// Process id of the other daemon.
        pid: i32,
    },
    /// Wrong user.
    #[error("{}: the keeper runs as another user and refuses this one", path.display())]
    User {
        /// Socket.
        path: PathBuf,
    },
    /// No welcome in time.
    #[error("{}: the keeper accepted the connection but did not answer within {} s", path.display(), WELCOME_PATIENCE.as_secs())]
    Silent {
        /// Socket.
        path: PathBuf,
    },
    /// The keeper is gone. Reads that waited have been let through: what is mounted must be unmounted.
    #[error("the keeper closed the connection")]
    Closed,
    /// A packet that makes no sense; a keeper of another version is the likely cause.
    #[error("keeper connection: {0}")]
    Protocol(#[from] ProtocolError),
    /// A label that does not fit.
    #[error("label {0:?}: at most 96 bytes and no control characters")]
    Label(String),
    /// Any other system error.
    #[error("keeper connection: {what}: {source}")]
    Io {
        /// Step.
        what: &'static str,
        /// Its error.
        source: io::Error,
    },
}

fn sys(what: &'static str) -> impl Fn(Sys) -> KeeperError {
    move |errno| KeeperError::Io { what, source: errno.into() }
}

/// A connection to the keeper; non-blocking. Dropping it leaves everything with the keeper for the next daemon.
#[derive(Debug)]
pub struct Keeper {
    /// Where it listens.
    path: PathBuf,
    socket: OwnedFd,
    next_seq: u32,
    /// Packets that did not fit into the socket yet.
    queue: VecDeque<(Message, Option<OwnedFd>)>,
}

impl Keeper {
    /// Connects and waits for the welcome. While another daemon of the same keeper is just exiting this takes a
    /// moment; while it lives it fails with [`KeeperError::Busy`].
    ///
    /// # Errors
    /// [`KeeperError`].
    pub fn connect(path: &Path) -> Result<(Self, Welcome), KeeperError> {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let socket = socket.map_err(sys("making a socket"))?;
        let address = SocketAddrUnix::new(path).map_err(sys("socket path"))?;
        rustix::io::retry_on_intr(|| rustix::net::connect(&socket, &address)).map_err(
            |errno| match errno {
                Sys::NOENT | Sys::CONNREFUSED => {
                    KeeperError::NotRunning { path: path.into(), source: errno.into() }
                }
                _ => sys("connecting")(errno),
            },
        )?;
        let mut keeper = Self { path: path.into(), socket, next_seq: 1, queue: VecDeque::new() };
        let welcome = keeper.welcome(path)?;
        Ok((keeper, welcome))
    }

    fn welcome(&mut self, path: &Path) -> Result<Welcome, KeeperError> {
        let deadline = Instant::now() + WELCOME_PATIENCE;
        let (pid, device_held, count) = match self.wait_for_reply(path, deadline)? {
            (Reply::Welcome { pid, device_held, files }, _) if files <= MAX_FILES => {
                (pid, device_held, files)
            }
            (Reply::Refused(Refusal::Busy(pid)), _) => {
                return Err(KeeperError::Busy { path: path.into(), pid });
            }
            (Reply::Refused(Refusal::User), _) => return Err(KeeperError::User { path: path.into() }),
            (Reply::Refused(Refusal::Protocol), _) => return Err(KeeperError::Closed),
            (other, _) => return Err(unexpected(&other)),
        };
        let mut files = Vec::new();
        for _ in 0..count {
            match self.wait_for_reply(path, deadline)? {
                (Reply::File { file, label }, Some(fd)) => {
                    files.push(HeldFile { label: label.as_str().into(), file, fd });
                }
                (other, _) => return Err(unexpected(&other)),
            }
        }
        Ok(Welcome { version: crate::protocol::VERSION, pid, device_held, files })
    }

    fn wait_for_reply(
        &self,
        path: &Path,
        deadline: Instant,
    ) -> Result<(Reply, Option<OwnedFd>), KeeperError> {
        loop {
            if let Some(reply) = self.receive()? {
                return Ok(reply);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(KeeperError::Silent { path: path.into() });
            }
            let left = Timespec::try_from(left).map_err(|_| KeeperError::Silent { path: path.into() })?;
            let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
            match rustix::event::poll(&mut ready, Some(&left)) {
                Ok(_) | Err(Sys::INTR) => {}
                Err(errno) => return Err(sys("waiting for the keeper")(errno)),
            }
        }
    }

    fn receive(&self) -> Result<Option<(Reply, Option<OwnedFd>)>, KeeperError> {
        match packet::receive(self.socket.as_fd()).map_err(sys("receiving"))? {
            Received::Nothing => Ok(None),
            Received::Closed => Err(KeeperError::Closed),
            Received::Packet { bytes, len, fd } => {
                let reply = Reply::decode(&bytes[..len])?;
                if reply.carries_fd() == fd.is_some() {
                    return Ok(Some((reply, fd)));
                }
                let expected = reply.carries_fd();
                Err(ProtocolError::Descriptor { kind: reply.name(), expected }.into())
            }
        }
    }

    /// Whether, after this connection was lost, another process goes on with what the keeper held. Waits for its welcome.
    #[must_use]
    pub fn goes_on(&self) -> bool {
        Self::connect(&self.path).is_ok()
    }

    /// Sends a command, or queues it when the socket is full (see [`Keeper::wants_write`]). Returns its sequence number.
    ///
    /// # Errors
    /// [`KeeperError::Closed`], [`KeeperError::Label`], [`KeeperError::Io`].
    pub fn send(&mut self, command: Command<'_>) -> Result<u32, KeeperError> {
        let (request, fd) = match command {
            Command::Watch { file, label, fd } => {
                let label = Label::new(label).ok_or_else(|| KeeperError::Label(label.into()))?;
                (Request::Watch { file, label }, Some(fd))
            }
            Command::Unwatch { file, complete } => (Request::Unwatch { file, complete }, None),
            Command::Answer { event, result } => (Request::Answer { event, errno: result.err() }, None),
            Command::Fill { file, offset, count, fill } => {
                (Request::Fill { file, offset, count, fill }, None)
            }
            Command::OpenDevice => (Request::OpenDevice, None),
            Command::CloseDevice => (Request::CloseDevice, None),
            Command::Stop => (Request::Stop, None),
        };
        let seq = self.next_seq;
        self.next_seq = self.next_seq.checked_add(1).unwrap_or(1);
        let message = request.encode(seq);
        self.flush()?;
        if !self.queue.is_empty() || !transmit(self.socket.as_fd(), &message, fd)? {
            let fd = fd.map(|fd| fd.try_clone_to_owned()).transpose();
            let fd = fd.map_err(|source| KeeperError::Io { what: "duplicating a descriptor", source })?;
            self.queue.push_back((message, fd));
        }
        Ok(seq)
    }

    /// Sends what is queued, as far as the socket takes it.
    ///
    /// # Errors
    /// [`KeeperError::Closed`], [`KeeperError::Io`].
    pub fn flush(&mut self) -> Result<(), KeeperError> {
        while let Some((message, fd)) = self.queue.front() {
            if !transmit(self.socket.as_fd(), message, fd.as_ref().map(AsFd::as_fd))? {
                break;
            }
            self.queue.pop_front();
        }
        Ok(())
    }

    /// Something is queued: poll for writability too, and call [`Keeper::flush`] then.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        !self.queue.is_empty()
    }

    /// The next notice, or `None` when nothing waits.
    ///
    /// # Errors
    /// [`KeeperError::Closed`], [`KeeperError::Protocol`], [`KeeperError::Io`].
    pub fn recv(&mut self) -> Result<Option<Notice>, KeeperError> {
        self.flush()?;
        let Some((reply, fd)) = self.receive()? else { return Ok(None) };
        Ok(Some(match (reply, fd) {
            (Reply::Event { event, file, offset, count }, _) => Notice::Event { event, file, offset, count },
            (Reply::Done { seq, errno }, _) => Notice::Done { seq, result: errno.map_or(Ok(()), Err) },
            (Reply::Device { seq }, Some(fd)) => Notice::Device { seq, fd },
            (Reply::Stale { event }, _) => Notice::Stale { event },
            (Reply::Refused(_), _) => return Err(KeeperError::Closed),
            (other, _) => return Err(unexpected(&other)),
        }))
    }
}

impl AsFd for Keeper {
    /// Readable when [`Keeper::recv`] has something.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// False when the socket is full.
fn transmit(
    socket: BorrowedFd<'_>,
    message: &Message,
    fd: Option<BorrowedFd<'_>>,
) -> Result<bool, KeeperError> {
    match packet::send(socket, message, fd) {
        Ok(()) => Ok(true),
        Err(Sys::AGAIN) => Ok(false),
        Err(Sys::PIPE | Sys::CONNRESET | Sys::NOTCONN) => Err(KeeperError::Closed),
        Err(errno) => Err(sys("sending")(errno)),
    }
}

fn unexpected(reply: &Reply) -> KeeperError {
    ProtocolError::Field { kind: reply.name(), field: "packet here", offset: 6 }.into()
}
