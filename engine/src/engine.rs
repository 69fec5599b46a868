//! The state machine: inputs in, outputs out.

mod flights;
mod objects;
mod reads;
mod schedule;

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use core::ops::Range;

use crate::flight::Flight;
use crate::mutation::Mutation;
use crate::object::{Object, ObjectStatus};
use crate::queue::Lines;
use crate::retry::Jitter;
use crate::{Config, FlightId, Input, ObjectId, Output, ReadId, Stats, Time, WriteId};

/// The core: plans fetches for reads, orders writes, answers each read once. See the crate's documentation.
#[derive(Debug)]
pub struct Engine {
    config: Config,
    now: Time,
    objects: BTreeMap<ObjectId, Object>,
    reads: BTreeMap<ReadId, Read>,
    flights: BTreeMap<FlightId, Flight>,
    writes: BTreeMap<WriteId, Write>,
    timers: BTreeSet<(Time, Timer)>,
    lines: Lines,
    /// Device bytes between `Fetch` and `Release`, in all and of prefetches alone.
    in_flight: u64,
    prefetching: u64,
    /// Before this no background fill starts.
    fill_after: Time,
    /// A timer will call them back.
    fill_timer: bool,
    /// Something was queued or freed since flights were last started.
    may_start: bool,
    jitter: Jitter,
    next_flight: u64,
    next_write: u64,
    outputs: VecDeque<Output>,
    stats: Stats,
    #[cfg(feature = "mutations")]
    mutation: Option<Mutation>,
}

/// A read that waits.
#[derive(Clone, Debug)]
struct Read {
    object: ObjectId,
    bytes: Range<u64>,
    /// The chunks it needs; empty while it is parked.
    chunks: Range<u32>,
    /// How many of them are not ready.
    missing: u32,
    deadline: Option<Time>,
}

/// A write that is not back.
#[derive(Clone, Debug)]
struct Write {
    flight: FlightId,
    chunks: Range<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Deadline(ReadId),
    /// The backoff of the run that starts at this chunk.
    Backoff(ObjectId, u32),
    /// Background fills may go on.
    Fill,
}

impl Engine {
    /// An engine that knows no object.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            now: Time::default(),
            objects: BTreeMap::new(),
            reads: BTreeMap::new(),
            flights: BTreeMap::new(),
            writes: BTreeMap::new(),
            timers: BTreeSet::new(),
            lines: Lines::default(),
            in_flight: 0,
            prefetching: 0,
            fill_after: Time::default(),
            fill_timer: false,
            may_start: false,
            jitter: Jitter(config.seed),
            next_flight: 0,
            next_write: 0,
            outputs: VecDeque::new(),
            stats: Stats::default(),
            config,
            #[cfg(feature = "mutations")]
            mutation: None,
        }
    }

    /// The same engine with one promise broken, for the tests of the tests.
    #[cfg(feature = "mutations")]
    #[must_use]
    pub fn with_mutation(mut self, mutation: Mutation) -> Self {
        self.mutation = Some(mutation);
        self
    }

    /// The limits it was made with.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Takes one event. A `now` that lies before an earlier one counts as the earlier one.
    pub fn handle(&mut self, now: Time, input: Input) {
        self.now = self.now.max(now);
        match input {
            Input::AddObject { object, chunks, ready } => self.add_object(object, chunks, ready),
            Input::RemoveObject { object } => self.remove_object(object),
            Input::SetSources { object, count, piece } => match self.objects.get_mut(&object) {
                Some(object) => (object.sources, object.piece) = (count.max(1), piece),
                None => self.ignore(),
            },
            Input::Read { read, object, offset, len } => self.read(read, object, offset, len),
            Input::CancelRead { read } => self.cancel_read(read),
            Input::Prefetch { object, range, background } => self.prefetch(object, range, background),
            Input::SetExact { object, exact } => match self.objects.get_mut(&object) {
                Some(object) => object.exact = exact,
                None => self.ignore(),
            },
            Input::StopFill { object } => self.stop_fill(object),
            Input::ChunkVerified { flight, chunk } => self.chunk_verified(flight, chunk),
            Input::FlightEnded { flight, result } => self.flight_ended(flight, result),
            Input::WriteDone { write, result } => self.write_done(write, result),
            Input::SourceMeasured { object, ttfb, bandwidth } => match self.objects.get_mut(&object) {
                Some(object) => object.link.measure(ttfb, bandwidth),
                None => self.ignore(),
            },
            Input::Tick => {}
        }
        // After the input: what has just arrived is not too late.
        self.fire_timers();
        self.start_flights();
        self.stats.reads_waiting = count(self.reads.len());
        self.stats.flights = count(self.flights.len());
        self.stats.in_flight_bytes = self.in_flight;
        self.stats.in_flight_bytes_peak = self.stats.in_flight_bytes_peak.max(self.in_flight);
    }

    /// The next thing to do; call until `None` after each `handle`.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When to call with [`Input::Tick`] at the latest; `None` when no timer runs.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        self.timers.first().map(|(time, _)| *time)
    }

    /// What has happened so far.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// A look at one object.
    #[must_use]
    pub fn object(&self, object: ObjectId) -> Option<ObjectStatus> {
        self.objects.get(&object).map(Object::status)
    }

    fn fire_timers(&mut self) {
        while let Some(&(time, timer)) = self.timers.first() {
            if time > self.now {
                break;
            }
            self.timers.pop_first();
            match timer {
                Timer::Deadline(read) => self.expire_read(read),
                Timer::Fill => {
                    self.fill_timer = false;
                    self.may_start = true;
                }
                Timer::Backoff(id, start) => {
                    if let Some(object) = self.objects.get_mut(&id)
                        && object.plan.unhold(start, time)
                    {
                        self.line_up(id);
                    }
                }
            }
        }
    }

    fn ignore(&mut self) {
        self.stats.ignored_inputs += 1;
    }

    /// Whether a promise is to be broken; never without the feature `mutations`.
    #[cfg(feature = "mutations")]
    fn broken(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    #[cfg(not(feature = "mutations"))]
    #[expect(clippy::unused_self, reason = "same shape as with the feature")]
    const fn broken(&self, _: Mutation) -> bool {
        false
    }
}

fn count(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}
