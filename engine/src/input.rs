//! What the shell tells the engine.

use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;
use core::time::Duration;

use crate::{Chunk, FlightId, ObjectId, ReadId, ReadySet, WriteId};

/// One event. Unknown identifiers are ignored and counted in [`crate::Stats::ignored_inputs`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Makes an object known, or gives a known one a larger chunk list (the old chunks must all be in it, unchanged).
    ///
    /// A new list for a known object cancels its flights and takes effect with [`crate::Output::MapChanged`]: chunk
    /// numbers in outputs before that refer to the old list, those after it to the new one. A bad list is answered
    /// with [`crate::Output::ObjectRefused`] and changes nothing.
    AddObject {
        /// The object.
        object: ObjectId,
        /// Its referenced chunks, sorted by `start`; holes between them are allowed.
        chunks: Vec<Chunk>,
        /// Which of them are on disk and verified.
        ready: ReadySet,
    },
    /// Forgets an object: its flights are cancelled, its reads fail with [`crate::ReadError::Removed`].
    RemoveObject {
        /// The object.
        object: ObjectId,
    },
    /// How many sources can serve an object (1 when never told). Attempt `n` is meant for source `(n - 1) % count`.
    SetSources {
        /// The object.
        object: ObjectId,
        /// Number of sources; 0 counts as 1.
        count: u32,
        /// Stored bytes that they move at once, counted from the blob's start: windows end at these borders. 0 for none.
        piece: u64,
    },
    /// A read waits for bytes of an object.
    Read {
        /// Its name, for [`crate::Output::Complete`].
        read: ReadId,
        /// The object.
        object: ObjectId,
        /// First device byte.
        offset: u64,
        /// Bytes; what lies beyond the last chunk counts as served.
        len: u64,
    },
    /// The one who waits is gone. Completes the read with [`crate::ReadError::Cancelled`].
    CancelRead {
        /// The read.
        read: ReadId,
    },
    /// Asks for a range that nobody waits for yet.
    Prefetch {
        /// The object.
        object: ObjectId,
        /// Device bytes.
        range: Range<u64>,
        /// Whether it can wait until nobody reads: served last, at the pace of [`crate::Config::fill_bandwidth`].
        background: bool,
    },
    /// Turns all enlarging off for an object, or on again: exactly the chunks asked for are fetched.
    SetExact {
        /// The object.
        object: ObjectId,
        /// Whether it is off.
        exact: bool,
    },
    /// Drops what is queued of the object's background fill.
    StopFill {
        /// The object.
        object: ObjectId,
    },
    /// One chunk of a flight is decoded into the flight's buffer and its digest is right.
    ChunkVerified {
        /// The flight.
        flight: FlightId,
        /// The chunk's number in the object's list.
        chunk: u32,
    },
    /// The fetch has stopped: all chunks verified, or failed, or cancelled. Chunks are verified in order, so that a
    /// failure is the failure of the first chunk not verified.
    FlightEnded {
        /// The flight.
        flight: FlightId,
        /// Why it stopped early.
        result: Result<(), Failure>,
    },
    /// A write has come back.
    WriteDone {
        /// The write.
        write: WriteId,
        /// What the disk said.
        result: Result<(), WriteFailure>,
    },
    /// What one request to an object's source cost; steers how large a hole is worth a request of its own.
    SourceMeasured {
        /// The object.
        object: ObjectId,
        /// Time from request to first byte.
        ttfb: Duration,
        /// Bytes per second while streaming.
        bandwidth: u64,
    },
    /// Nothing but the time: due timers fire.
    Tick,
}

/// How a fetch failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What kind of failure, which decides about a retry.
    pub class: FailureClass,
    /// The source's own wish for the next try.
    pub retry_after: Option<Duration>,
}

/// Kinds of fetch failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureClass {
    /// May go away by itself: reset, timeout, truncated body, 5xx, 429. Tried again with backoff.
    Transient,
    /// The source refuses us. Tried on the other sources only.
    Denied,
    /// The source has no such blob. Tried on the other sources only.
    NotFound,
    /// The bytes did not decode or match their digest. Tried on the other sources only.
    Corrupt,
    /// No retry can help.
    Fatal,
}

impl fmt::Display for FailureClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Transient => "source unavailable",
            Self::Denied => "source denied access",
            Self::NotFound => "blob not found at the source",
            Self::Corrupt => "bytes do not match their digest",
            Self::Fatal => "fetch failed for good",
        })
    }
}

/// How a write failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteFailure {
    /// The cache's file system is full (ENOSPC, EDQUOT).
    NoSpace,
    /// Any other error (EIO…).
    Io,
}

impl fmt::Display for WriteFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoSpace => "no space left for the cache",
            Self::Io => "the cache disk failed",
        })
    }
}
