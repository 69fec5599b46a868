//! What the engine tells the shell to do.

use core::fmt;
use core::ops::Range;

use crate::{FailureClass, FlightId, MapError, ObjectId, ReadId, WriteFailure, WriteId};

/// One order or answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Get a buffer of [`crate::span`] bytes and fetch, decode and verify these chunks into it.
    Fetch {
        /// The new flight.
        flight: FlightId,
        /// The object.
        object: ObjectId,
        /// A run of neighbours in the object's list; holes between them in stored and device space are small.
        chunks: Range<u32>,
        /// End of what is meant to follow at once on the same request: the source can be asked for all of it, and
        /// a flight that starts where this one ends takes the rest over. At least the end of `chunks`.
        until: u32,
        /// 1 for the first try of these chunks, then 2, 3… Also says which source is meant.
        attempt: u32,
        /// Whether a read waits for it now (else it is read-ahead or prefetch).
        demand: bool,
    },
    /// Stop fetching; `FlightEnded` is still owed. Writes under way are not stopped.
    CancelFlight {
        /// The flight.
        flight: FlightId,
    },
    /// Write these verified chunks, contiguous on the device, padding included, as one write from the flight's buffer.
    Write {
        /// The new write.
        write: WriteId,
        /// The flight whose buffer holds the bytes.
        flight: FlightId,
        /// The object.
        object: ObjectId,
        /// The chunks.
        chunks: Range<u32>,
    },
    /// Answer a read. Exactly one for each `Read`.
    Complete {
        /// The read.
        read: ReadId,
        /// `Ok`: every byte of it is on disk, or lies in no chunk.
        result: Result<(), ReadError>,
    },
    /// The flight is over and no write uses its buffer.
    Release {
        /// The flight.
        flight: FlightId,
    },
    /// These chunks are on disk and verified.
    Ready {
        /// The object.
        object: ObjectId,
        /// The chunks.
        chunks: Range<u32>,
    },
    /// Every chunk of the object is ready. Once per chunk list; at once for one that starts complete.
    ObjectReady {
        /// The object.
        object: ObjectId,
    },
    /// The larger chunk list given to a known object is in force from here on.
    MapChanged {
        /// The object.
        object: ObjectId,
    },
    /// `AddObject` was refused; what was known before still holds.
    ObjectRefused {
        /// The object.
        object: ObjectId,
        /// The rule that its list breaks.
        reason: MapError,
    },
}

/// Why a read was not served. Never remembered: a later read of the same bytes tries afresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadError {
    /// The sources failed and no attempt is left.
    Source {
        /// The last failure.
        class: FailureClass,
        /// Fetches tried.
        attempts: u32,
    },
    /// The read waited for its deadline.
    Deadline,
    /// The bytes came but could not be written.
    Write(WriteFailure),
    /// The object was removed while the read waited.
    Removed,
    /// The shell cancelled the read.
    Cancelled,
    /// No such object.
    UnknownObject,
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source { class, attempts } => write!(f, "{class} (after {attempts} attempts)"),
            Self::Deadline => f.write_str("not fetched before the read deadline"),
            Self::Write(failure) => write!(f, "{failure}"),
            Self::Removed => f.write_str("the object was removed"),
            Self::Cancelled => f.write_str("the read was cancelled"),
            Self::UnknownObject => f.write_str("no such object"),
        }
    }
}

impl core::error::Error for ReadError {}
