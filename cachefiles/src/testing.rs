//! A stand-in for the kernel's side of the device, for tests of this crate and of the daemon.
//!
//! A socket pair carries the messages and the commands. Objects are ordinary files, so what the daemon writes can be
//! read back. The stand-in runs in the daemon's own process, since an OPEN carries a descriptor by its number.

use crate::device::{CompleteRead, Device};
use crate::message::{Body, Fault, Message, Open};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What the daemon did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// A `copen`; the size, or a negative errno.
    Copen {
        /// Request.
        msg_id: u32,
        /// Size or errno.
        size: i64,
    },
    /// A READ_COMPLETE.
    ReadComplete {
        /// Request.
        msg_id: u32,
        /// Object whose descriptor it came through.
        object_id: u32,
    },
    /// Any other command.
    Command(String),
}

#[derive(Debug, Default)]
struct State {
    /// Object id, device and inode of its file.
    objects: Vec<(u32, (u64, u64))>,
    /// READs that wait: message and object.
    waiting: Vec<(u32, u32)>,
    next_msg: u32,
}

/// The kernel's side.
#[derive(Debug)]
pub struct FakeKernel {
    socket: OwnedFd,
    state: Arc<Mutex<State>>,
}

struct Completion {
    /// Completions travel on the commands' socket, so that the order of all answers is seen.
    socket: OwnedFd,
    state: Arc<Mutex<State>>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn identity(fd: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}

impl CompleteRead for Completion {
    fn complete(&self, anon: BorrowedFd<'_>, msg_id: u32) -> io::Result<()> {
        let file = identity(anon)?;
        let object_id = {
            let mut state = lock(&self.state);
            let object = state.objects.iter().rev().find(|(_, id)| *id == file).map(|(object, _)| *object);
            let waits = |&(waiting, of): &(u32, u32)| waiting == msg_id && Some(of) == object;
            let at = state.waiting.iter().position(waits).ok_or(Errno::INVAL)?;
            state.waiting.swap_remove(at).1
        };
        let note = format!("READ_COMPLETE {msg_id},{object_id}");
        rustix::net::send(&self.socket, note.as_bytes(), SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

impl FakeKernel {
    /// A device and the kernel behind it.
    ///
    /// # Errors
    /// Of `socketpair`.
    pub fn new() -> io::Result<(Self, Device)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (kernel, daemon) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let state = Arc::new(Mutex::new(State { next_msg: 1, ..State::default() }));
        let completion = Completion { socket: daemon.try_clone()?, state: Arc::clone(&state) };
        let device = Device::with_completion(daemon, Box::new(completion));
        Ok((Self { socket: kernel, state }, device))
    }

    /// Sends an OPEN of `object_id` backed by `file`; returns its msg_id.
    ///
    /// # Errors
    /// Of the socket; of a key that does not fit a message.
    pub fn open(&self, object_id: u32, volume_key: &str, cookie_key: &str, file: File) -> io::Result<u32> {
        let identity = identity(file.as_fd())?;
        {
            let mut state = lock(&self.state);
            state.objects.retain(|(id, _)| *id != object_id);
            state.objects.push((object_id, identity));
        }
        // The daemon owns the number from here on, as it does with the kernel.
        let open = Open {
            volume_key: volume_key.as_bytes().into(),
            cookie_key: cookie_key.as_bytes().into(),
            fd: file.into_raw_fd(),
            flags: 0,
        };
        self.send(object_id, Body::Open(open))
    }

    /// Sends a READ; returns its msg_id.
    ///
    /// # Errors
    /// Of the socket.
    pub fn read(&self, object_id: u32, offset: u64, len: u64) -> io::Result<u32> {
        self.send(object_id, Body::Read { offset, len })
    }

    /// Sends a READ that waits once more, as after a `restore`: under its old msg_id, and under the id that its object
    /// has by now.
    ///
    /// # Errors
    /// Of the socket.
    pub fn read_again(&self, msg_id: u32, object_id: u32, offset: u64, len: u64) -> io::Result<()> {
        {
            let mut state = lock(&self.state);
            state.waiting.retain(|(waiting, _)| *waiting != msg_id);
            state.waiting.push((msg_id, object_id));
        }
        self.deliver(msg_id, object_id, Body::Read { offset, len })
    }

    /// Sends a CLOSE.
    ///
    /// # Errors
    /// Of the socket.
    pub fn close(&self, object_id: u32) -> io::Result<()> {
        lock(&self.state).waiting.retain(|(_, object)| *object != object_id);
        self.send(object_id, Body::Close).map(drop)
    }

    fn send(&self, object_id: u32, body: Body) -> io::Result<u32> {
        let msg_id = {
            let mut state = lock(&self.state);
            let msg_id = state.next_msg;
            state.next_msg = msg_id.wrapping_add(1);
            if matches!(body, Body::Read { .. }) {
                state.waiting.push((msg_id, object_id));
            }
            msg_id
        };
        self.deliver(msg_id, object_id, body)?;
        Ok(msg_id)
    }

    fn deliver(&self, msg_id: u32, object_id: u32, body: Body) -> io::Result<()> {
        let message = Message { msg_id, object_id, body };
        self.send_raw(&message.encode().map_err(|fault: Fault| io::Error::other(fault))?)
    }

    /// Sends any bytes as one message.
    ///
    /// # Errors
    /// Of the socket.
    pub fn send_raw(&self, bytes: &[u8]) -> io::Result<()> {
        rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// READs that wait for an answer, as (msg_id, object_id).
    #[must_use]
    pub fn waiting(&self) -> Vec<(u32, u32)> {
        lock(&self.state).waiting.clone()
    }

    /// The daemon's next answer or command, or `None` after `patience`.
    ///
    /// # Errors
    /// Of the socket; `InvalidData` for an answer the kernel would not take.
    pub fn next_reply(&self, patience: Duration) -> io::Result<Option<Reply>> {
        let patience = Timespec::try_from(patience).map_err(io::Error::other)?;
        let mut ready = [PollFd::new(&self.socket, PollFlags::IN)];
        if rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, Some(&patience)))? == 0 {
            return Ok(None);
        }
        let mut buffer = [0; 4096];
        let (len, _) = rustix::net::recv(&self.socket, &mut buffer[..], RecvFlags::empty())?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let invalid =
            || io::Error::new(io::ErrorKind::InvalidData, "an answer that the kernel would not take");
        let text = std::str::from_utf8(&buffer[..len]).map_err(|_| invalid())?;
        let pair = |text: &str| {
            let (left, right) = text.split_once(',')?;
            Some((left.parse::<u32>().ok()?, right.parse::<i64>().ok()?))
        };
        let reply = if let Some(rest) = text.strip_prefix("copen ") {
            pair(rest).map(|(msg_id, size)| Reply::Copen { msg_id, size }).ok_or_else(invalid)?
        } else if let Some(rest) = text.strip_prefix("READ_COMPLETE ") {
            let (msg_id, object) = pair(rest).ok_or_else(invalid)?;
            Reply::ReadComplete { msg_id, object_id: u32::try_from(object).map_err(|_| invalid())? }
        } else {
            Reply::Command(text.into())
        };
        Ok(Some(reply))
    }
}
