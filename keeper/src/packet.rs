//! Packets and the descriptors beside them, in and out of a `SOCK_SEQPACKET` socket.

use crate::protocol::{MESSAGE_LEN, Message};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

/// What one receive yields.
#[derive(Debug)]
pub(crate) enum Received {
    /// A packet of `len` bytes at the start of `bytes`, and the descriptor beside it.
    Packet { bytes: [u8; MESSAGE_LEN + 1], len: usize, fd: Option<OwnedFd> },
    /// Nothing waits.
    Nothing,
    /// The peer is gone.
    Closed,
}

/// Sends one packet without waiting.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    message: &Message,
    fd: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: [BorrowedFd<'_>; 1];
    if let Some(fd) = fd {
        fds = [fd];
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(Errno::NOBUFS);
        }
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let mut send = || rustix::net::sendmsg(socket, &[IoSlice::new(message)], &mut control, flags);
    match rustix::io::retry_on_intr(&mut send)? {
        MESSAGE_LEN => Ok(()),
        _ => Err(Errno::IO),
    }
}

/// Receives one packet without waiting. One byte more than a packet is offered, so that longer ones show.
pub(crate) fn receive(socket: BorrowedFd<'_>) -> Result<Received, Errno> {
    let mut bytes = [0; MESSAGE_LEN + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)
    });
    let received = match received {
        Ok(received) => received,
        Err(Errno::AGAIN) => return Ok(Received::Nothing),
        Err(Errno::CONNRESET) => return Ok(Received::Closed),
        Err(errno) => return Err(errno),
    };
    let mut fd = None;
    let mut several = received.flags.contains(ReturnFlags::CTRUNC);
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            for received in fds {
                several |= fd.replace(received).is_some();
            }
        }
    }
    if several {
        return Err(Errno::MSGSIZE);
    }
    Ok(match received.bytes {
        0 => Received::Closed,
        len => Received::Packet { bytes, len, fd },
    })
}
