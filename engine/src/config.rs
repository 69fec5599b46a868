//! What the engine may use and how eager it is.

use core::time::Duration;

/// Limits and starting values. Each number is a starting point to be measured, not a belief.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Device bytes of all flights between `Fetch` and `Release`. A single chunk larger than this flies alone.
    pub budget_bytes: u64,
    /// Flights in the air at once, over all objects. At least 1.
    pub max_flights: u32,
    /// Read-ahead window of a new stream of reads, in bytes.
    pub first_window: u64,
    /// Largest read-ahead window in bytes. 0 turns all enlarging off: exactly the chunks asked for are fetched.
    pub max_window: u64,
    /// Largest flight in device bytes. A single chunk may be larger.
    pub max_flight: u64,
    /// Largest flight of read-ahead and prefetch: small, so that a reader can overtake what has not begun to arrive.
    pub chain_flight: u64,
    /// Flights of an object's read-ahead and prefetch in the air at once. They follow each other on one request.
    pub chain_depth: u32,
    /// Device bytes that one request may go on for, over any number of flights.
    pub max_request: u64,
    /// Stored bytes a second that background fills may fetch; 0 for no limit.
    pub fill_bandwidth: u64,
    /// Flights a second that background fills may start; 0 for no limit.
    pub fill_rate: u64,
    /// No background fill starts before reads have waited for nothing for so long.
    pub fill_quiet: Duration,
    /// A demanded fetch smaller than this (device bytes) is enlarged to it; also the floor of a shrinking window.
    pub min_fetch: u64,
    /// Largest hole in stored bytes that is fetched and thrown away rather than paid for with another request,
    /// until [`crate::Input::SourceMeasured`] tells better. 0 keeps it off: only neighbours share a request.
    pub gap: u64,
    /// A run of verified chunks is written when it reaches this many device bytes, or earlier when a read waits.
    pub write_run: u64,
    /// Fetches of the same chunks before the reads that wait for them fail.
    pub max_attempts: u32,
    /// Longest delay before the first retry on the same source; doubles with each further one.
    pub backoff_base: Duration,
    /// Longest delay between retries while a read waits.
    pub backoff_cap: Duration,
    /// Longest delay between retries of a prefetch.
    pub prefetch_backoff_cap: Duration,
    /// A source's own wish (`Retry-After`) is honoured up to this.
    pub retry_after_cap: Duration,
    /// A read that is not served in this time fails. `None`: reads wait as long as it takes.
    pub read_deadline: Option<Duration>,
    /// Seed of the backoff jitter, so that a run can be repeated exactly.
    pub seed: u64,
}

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

impl Default for Config {
    fn default() -> Self {
        Self {
            budget_bytes: 128 * MIB,
            max_flights: 32,
            first_window: MIB,
            max_window: 16 * MIB,
            max_flight: 4 * MIB,
            chain_flight: 2 * MIB,
            chain_depth: 3,
            max_request: 64 * MIB,
            fill_bandwidth: 0,
            fill_rate: 0,
            fill_quiet: Duration::from_millis(200),
            min_fetch: 128 * KIB,
            gap: 256 * KIB,
            write_run: MIB,
            max_attempts: 24,
            backoff_base: Duration::from_millis(50),
            backoff_cap: Duration::from_secs(2),
            prefetch_backoff_cap: Duration::from_secs(30),
            retry_after_cap: Duration::from_secs(600),
            read_deadline: Some(Duration::from_secs(60)),
            seed: 0x5eed,
        }
    }
}
