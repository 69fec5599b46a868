//! Counters and gauges of the engine.

/// Everything counts from the engine's start, except the gauges, which say so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Reads taken.
    pub reads: u64,
    /// Reads served at once because all their chunks were ready.
    pub reads_ready: u64,
    /// Reads served.
    pub reads_served: u64,
    /// Reads failed, for whatever reason.
    pub reads_failed: u64,
    /// Reads failed at their deadline.
    pub reads_expired: u64,
    /// Gauge: reads waiting.
    pub reads_waiting: u64,
    /// Device bytes asked for by reads.
    pub asked_bytes: u64,
    /// Flights started.
    pub fetches: u64,
    /// Flights started while a read waited for them.
    pub fetches_demand: u64,
    /// Flights started that were not the first try of their chunks.
    pub retries: u64,
    /// Chunk runs given up after their last attempt.
    pub given_up: u64,
    /// Flights cancelled.
    pub cancels: u64,
    /// Read-ahead and prefetch flights that a reader overtook: cancelled before anything of them had come.
    pub overtaken: u64,
    /// Queued read-ahead or prefetch runs that a read came to wait for.
    pub promotions: u64,
    /// Stored bytes asked of sources, holes included.
    pub fetched_stored_bytes: u64,
    /// Chunks verified.
    pub chunks_verified: u64,
    /// Writes ordered.
    pub writes: u64,
    /// Device bytes ordered to be written, padding included.
    pub written_bytes: u64,
    /// Writes failed.
    pub writes_failed: u64,
    /// Gauge: flights between `Fetch` and `Release`.
    pub flights: u64,
    /// Gauge: device bytes of these.
    pub in_flight_bytes: u64,
    /// Highest value of `in_flight_bytes`.
    pub in_flight_bytes_peak: u64,
    /// Inputs that named something unknown or made no sense.
    pub ignored_inputs: u64,
}
