//! Requests as tokens that are answered exactly once, and the objects they lead to.

use crate::device::Shared;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

/// The kernel's number of an open object. It changes when the kernel opens the object anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectId(pub u32);

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An answer that did not reach the kernel.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// `copen` was refused.
    #[error("copen of message {msg_id} (object {object}): {source}")]
    Copen {
        /// Request.
        msg_id: u32,
        /// Object.
        object: ObjectId,
        /// The kernel's error.
        source: io::Error,
    },
    /// The completion was refused. With `EINVAL` the kernel does not wait for this request.
    #[error("READ_COMPLETE of message {msg_id} (object {object}): {source}")]
    ReadComplete {
        /// Request.
        msg_id: u32,
        /// Object.
        object: ObjectId,
        /// The kernel's error.
        source: io::Error,
    },
    /// The object's descriptor is closed. The kernel opens the object anew and asks again.
    #[error("message {msg_id}: object {object} is closed here; the kernel opens it anew and asks again")]
    Closed {
        /// Request.
        msg_id: u32,
        /// Object.
        object: ObjectId,
    },
    /// A size that the kernel's command cannot carry.
    #[error("copen of message {msg_id}: object size {size} is over 2^63 - 1")]
    Size {
        /// Request.
        msg_id: u32,
        /// Size asked for.
        size: u64,
    },
}

/// An open object. It owns the anonymous descriptor: dropping it closes it, which must happen at CLOSE and may not be
/// prevented by a duplicate (a `dup`, a registered io_uring file), or the next mount of the volume hangs unkillably.
#[derive(Debug)]
pub struct Object {
    id: ObjectId,
    size: u64,
    fd: Arc<OwnedFd>,
    shared: Arc<Shared>,
}

impl Object {
    /// The kernel's number for it.
    #[must_use]
    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// The size given with the acceptance, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Writes at `offset`, all of `data`. Offset and length must be multiples of 4096 and so should the address of
    /// `data`: 6.1 puts a misaligned write elsewhere and reports success.
    ///
    /// # Errors
    /// `EINVAL` for a misaligned range; else the kernel's error, where `ENOBUFS` means that the cache's file system
    /// is below its `bstop` limit or the object is withdrawn.
    pub fn write_all_at(&self, mut data: &[u8], mut offset: u64) -> io::Result<()> {
        if !offset.is_multiple_of(4096) || !data.len().is_multiple_of(4096) {
            return Err(Errno::INVAL.into());
        }
        while !data.is_empty() {
            let written = rustix::io::retry_on_intr(|| rustix::io::pwrite(&*self.fd, data, offset))?;
            if written == 0 || !written.is_multiple_of(4096) {
                return Err(Errno::IO.into());
            }
            data = data.get(written..).unwrap_or_default();
            offset = offset.saturating_add(u64::try_from(written).unwrap_or(u64::MAX));
        }
        Ok(())
    }

    /// The ranges of the backing file that hold data, in order. After an unclean shutdown they say nothing about
    /// what was verified.
    ///
    /// # Errors
    /// The kernel's error of `lseek`.
    pub fn present(&self) -> io::Result<Vec<Range<u64>>> {
        let mut ranges = Vec::new();
        let mut at = 0;
        loop {
            let start = match rustix::fs::seek(&*self.fd, SeekFrom::Data(at)) {
                Ok(start) if start >= at => start,
                Ok(_) => return Err(Errno::IO.into()),
                Err(Errno::NXIO) => return Ok(ranges),
                Err(errno) => return Err(errno.into()),
            };
            let end = rustix::fs::seek(&*self.fd, SeekFrom::Hole(start))?;
            if end <= start {
                return Err(Errno::IO.into());
            }
            ranges.push(start..end);
            at = end;
        }
    }
}

impl AsFd for Object {
    /// The anonymous descriptor: write-only, takes aligned direct writes and `lseek`; not `fsync`, `fallocate` or
    /// `splice`.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        self.shared.forget(self.id, &self.fd);
    }
}

/// OPEN: a mount waits, unkillably, until this is answered. Dropping it rejects with `EIO`.
#[derive(Debug)]
#[must_use = "an OPEN that is not answered is rejected"]
pub struct OpenToken {
    shared: Arc<Shared>,
    msg_id: u32,
    object: ObjectId,
    volume_key: Box<[u8]>,
    cookie_key: Box<[u8]>,
    /// `None` once answered.
    fd: Option<OwnedFd>,
}

impl OpenToken {
    pub(crate) fn new(
        shared: Arc<Shared>,
        msg_id: u32,
        object: ObjectId,
        open: crate::message::Open,
        fd: OwnedFd,
    ) -> Self {
        let (volume_key, cookie_key) = (open.volume_key, open.cookie_key);
        Self { shared, msg_id, object, volume_key, cookie_key, fd: Some(fd) }
    }

    /// The kernel's number of the request.
    #[must_use]
    pub fn msg_id(&self) -> u32 {
        self.msg_id
    }

    /// The object being opened.
    #[must_use]
    pub fn object(&self) -> ObjectId {
        self.object
    }

    /// Key of the volume, for EROFS `erofs,` and the domain or fsid.
    #[must_use]
    pub fn volume_key(&self) -> &[u8] {
        &self.volume_key
    }

    /// Key of the cookie, for EROFS the fsid or a device tag.
    #[must_use]
    pub fn cookie_key(&self) -> &[u8] {
        &self.cookie_key
    }

    /// Accepts with the object's size in bytes, which must be the same every time: another one makes the kernel drop
    /// the cached file.
    ///
    /// # Errors
    /// [`AnswerError::Size`] (the open is rejected) and [`AnswerError::Copen`]; the descriptor is closed then.
    pub fn accept(mut self, size: u64) -> Result<Object, AnswerError> {
        if i64::try_from(size).is_err() {
            return Err(AnswerError::Size { msg_id: self.msg_id, size });
        }
        let (msg_id, object) = (self.msg_id, self.object);
        let closed = AnswerError::Closed { msg_id, object };
        let fd = Arc::new(self.fd.take().ok_or(closed)?);
        // Known before the answer: the first READ may follow at once.
        self.shared.remember(object, &fd);
        if let Err(source) = self.shared.command(format!("copen {msg_id},{size}").as_bytes()) {
            self.shared.forget(object, &fd);
            return Err(AnswerError::Copen { msg_id, object, source });
        }
        Ok(Object { id: object, size, fd, shared: Arc::clone(&self.shared) })
    }

    /// Rejects; the mount fails. The kernel does not pass `errno` on, and sends no CLOSE: the descriptor is closed
    /// here, after the answer.
    ///
    /// # Errors
    /// [`AnswerError::Copen`].
    pub fn reject(mut self, errno: Errno) -> Result<(), AnswerError> {
        self.answer_negative(errno)
    }

    fn answer_negative(&mut self, errno: Errno) -> Result<(), AnswerError> {
        let Some(fd) = self.fd.take() else { return Ok(()) };
        let (msg_id, object) = (self.msg_id, self.object);
        let result = reject(&self.shared, msg_id, errno);
        drop(fd);
        result.map_err(|source| AnswerError::Copen { msg_id, object, source })
    }
}

impl Drop for OpenToken {
    fn drop(&mut self) {
        if self.fd.is_none() {
            return;
        }
        tracing::warn!(msg_id = self.msg_id, object = self.object.0, "unanswered OPEN is rejected");
        if let Err(error) = self.answer_negative(Errno::IO) {
            tracing::warn!("rejecting an unanswered OPEN: {error}");
        }
    }
}

/// `copen` with a negative errno.
pub(crate) fn reject(shared: &Shared, msg_id: u32, errno: Errno) -> io::Result<()> {
    shared.command(format!("copen {msg_id},-{}", errno.raw_os_error().unsigned_abs()).as_bytes())
}

/// READ: a reader waits for a range that is not in the cache. Dropping it completes it without data, which gives the
/// reader `EIO`.
#[derive(Debug)]
#[must_use = "a READ that is not answered fails"]
pub struct ReadToken {
    shared: Arc<Shared>,
    msg_id: u32,
    object: ObjectId,
    offset: u64,
    len: u64,
    /// Weak, so that a waiting token never keeps a closed object's descriptor alive. `None` once answered.
    fd: Option<Weak<OwnedFd>>,
}

impl ReadToken {
    pub(crate) fn new(
        shared: Arc<Shared>,
        msg_id: u32,
        object: ObjectId,
        offset: u64,
        len: u64,
        fd: Weak<OwnedFd>,
    ) -> Self {
        Self { shared, msg_id, object, offset, len, fd: Some(fd) }
    }

    /// The kernel's number of the request.
    #[must_use]
    pub fn msg_id(&self) -> u32 {
        self.msg_id
    }

    /// The object that is read.
    #[must_use]
    pub fn object(&self) -> ObjectId {
        self.object
    }

    /// First byte that is missing.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes that are missing, at least 1. `offset + len` does not overflow; it may pass the object's size.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a READ is never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The range is written: the reader goes on. A shorter fill is legal too; the kernel asks for the rest.
    ///
    /// # Errors
    /// [`AnswerError::ReadComplete`], [`AnswerError::Closed`].
    pub fn complete(mut self) -> Result<(), AnswerError> {
        self.answer()
    }

    /// The range cannot be had: the reader gets `EIO`. The kernel's interface carries no status; it looks for the
    /// data again and finds the hole, so this fails nothing when the data is there after all.
    ///
    /// # Errors
    /// [`AnswerError::ReadComplete`], [`AnswerError::Closed`].
    pub fn fail(mut self) -> Result<(), AnswerError> {
        self.answer()
    }

    /// Leaves the request pending in the kernel, for a successor that writes `restore`: for an orderly shutdown under
    /// live mounts, where an answer would be an error to the reader.
    pub fn leave_pending(mut self) {
        self.fd = None;
    }

    fn answer(&mut self) -> Result<(), AnswerError> {
        let Some(fd) = self.fd.take() else { return Ok(()) };
        let (msg_id, object) = (self.msg_id, self.object);
        let Some(fd) = fd.upgrade() else { return Err(AnswerError::Closed { msg_id, object }) };
        let result = self.shared.read_complete(fd.as_fd(), msg_id);
        result.map_err(|source| AnswerError::ReadComplete { msg_id, object, source })
    }
}

impl Drop for ReadToken {
    fn drop(&mut self) {
        if self.fd.is_none() {
            return;
        }
        let (msg_id, object) = (self.msg_id, self.object.0);
        tracing::warn!(msg_id, object, offset = self.offset, len = self.len, "unanswered READ fails");
        match self.answer() {
            Ok(()) | Err(AnswerError::Closed { .. }) => {}
            Err(error) => tracing::warn!("failing an unanswered READ: {error}"),
        }
    }
}
