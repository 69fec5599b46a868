//! Names for the things that the engine and its shell talk about.

/// A blob's cache object. Given by the shell; take a fresh number for each new object rather than reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(pub u32);

/// One kernel request that waits. Given by the shell, unique among the reads that are not completed yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReadId(pub u64);

/// One planned fetch of a contiguous run of chunks. Given by the engine, never reused; a retry is a new flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlightId(pub u64);

/// One write of contiguous verified chunks of a flight. Given by the engine, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriteId(pub u64);
