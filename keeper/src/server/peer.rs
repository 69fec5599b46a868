//! A connected daemon: its process, and what it has not been sent yet.

use crate::packet;
use crate::protocol::{FileId, Refusal, Reply};
use crate::sys;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno as Sys;
use rustix::process::{Pid, PidfdFlags};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// With this many replies unsent no further command is read.
const REPLIES_MAX: usize = 64;

/// A process by pidfd: unlike a process id it never comes to mean another one.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    fd: OwnedFd,
}

impl Process {
    /// The process of that number, which must be known to be the right one: a child of ours, or of the one whose
    /// child we are.
    pub(crate) fn open(pid: i32) -> io::Result<Self> {
        let process = (pid > 0).then(|| Pid::from_raw(pid)).flatten();
        let process = process.ok_or_else(|| io::Error::other("no process id"))?;
        Ok(Self { pid, fd: rustix::process::pidfd_open(process, PidfdFlags::empty())? })
    }

    /// By a descriptor that the program before this one had.
    pub(crate) fn inherited(pid: i32, fd: OwnedFd) -> Self {
        Self { pid, fd }
    }

    pub(crate) fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    pub(crate) fn is_dead(&self) -> bool {
        let mut ready = [PollFd::new(&self.fd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, Some(&now))).is_ok_and(|count| count > 0)
    }
}

impl AsFd for Process {
    /// Readable when the process is dead.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A reply that waits for room in the socket.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Outgoing {
    Plain(Reply),
    /// The descriptor is taken when it is sent.
    Device {
        seq: u32,
    },
}

/// The connection.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) socket: OwnedFd,
    pub(crate) process: Process,
    pub(crate) replies: VecDeque<Outgoing>,
    /// Files of the welcome that are still to be sent, last first.
    pub(crate) welcome: Vec<FileId>,
    /// The socket was full at the last try.
    pub(crate) full: bool,
    /// It has been given something to work on, so its process must be dead before another daemon is served.
    pub(crate) entrusted: bool,
}

impl Peer {
    /// Checks who connected.
    pub(crate) fn identify(socket: OwnedFd) -> io::Result<Option<Self>> {
        let (pid, uid) = sys::peer_credentials(socket.as_fd())?;
        let own = rustix::process::geteuid().as_raw();
        if uid != own && uid != 0 {
            refuse(socket.as_fd(), Refusal::User);
            return Ok(None);
        }
        let Some(process) = (pid > 0).then(|| Pid::from_raw(pid)).flatten() else {
            refuse(socket.as_fd(), Refusal::Protocol);
            return Err(io::Error::other(
                "the peer's process is in a namespace that cannot be seen from here",
            ));
        };
        let fd = rustix::process::pidfd_open(process, PidfdFlags::empty())?;
        // Had the process died before the pidfd was made, its number could mean another one by now; then the socket
        // would be hung up.
        let mut ready = [PollFd::new(&socket, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, Some(&now)))? > 0 {
            return Ok(None);
        }
        Ok(Some(Self {
            socket,
            process: Process { pid, fd },
            replies: VecDeque::with_capacity(REPLIES_MAX + 1),
            welcome: Vec::new(),
            full: false,
            entrusted: false,
        }))
    }

    pub(crate) fn queue(&mut self, reply: Reply) {
        self.replies.push_back(Outgoing::Plain(reply));
    }

    /// Commands are read only when their replies have room and the welcome is through.
    pub(crate) fn takes_commands(&self) -> bool {
        self.replies.len() < REPLIES_MAX && self.welcome.is_empty()
    }

    /// Sends one packet; false when the socket is full.
    pub(crate) fn send(&mut self, reply: &Reply, fd: Option<BorrowedFd<'_>>) -> Result<bool, Sys> {
        match packet::send(self.socket.as_fd(), &reply.encode(), fd) {
            Ok(()) => {
                self.entrusted |=
                    matches!(reply, Reply::File { .. } | Reply::Event { .. } | Reply::Device { .. });
                Ok(true)
            }
            // ETOOMANYREFS: too many descriptors on their way; room comes when the daemon has taken some.
            Err(Sys::AGAIN | Sys::TOOMANYREFS) => {
                self.full = true;
                Ok(false)
            }
            Err(errno) => Err(errno),
        }
    }
}

/// Says why, as far as the socket takes it.
pub(crate) fn refuse(socket: BorrowedFd<'_>, refusal: Refusal) {
    let _ = packet::send(socket, &Reply::Refused(refusal).encode(), None);
}
