//! What became of each kernel request, for those who follow it: traces and the audit log.

use std::ops::Range;
use std::time::Instant;

use skimmer_engine::{FlightId, ObjectId};
use tokio::sync::mpsc;

use super::Driver;
use super::flights::Flight;
use crate::blob::BlobId;
use crate::frontend::Mode;
use crate::metrics::ReadResult;

/// One kernel request for data, from its delivery to its answer.
#[derive(Debug, Clone)]
pub struct Served {
    /// The attach mode.
    pub mode: Mode,
    /// The blob.
    pub blob: BlobId,
    /// Bytes of its device.
    pub range: Range<u64>,
    /// Its delivery.
    pub since: Instant,
    /// Its answer.
    pub until: Instant,
    /// How it ended.
    pub result: ReadResult,
    /// The flight whose bytes came last of those it waited for.
    pub flight: Option<Stages>,
}

/// The moments of a flight.
#[derive(Debug, Clone)]
pub struct Stages {
    /// Planned: it waits for buffer memory from here.
    pub planned: Instant,
    /// The fetch was started.
    pub started: Option<Instant>,
    /// The first chunk was verified.
    pub first: Option<Instant>,
    /// The last chunk so far was verified.
    pub verified: Option<Instant>,
    /// A write was begun.
    pub writing: Option<Instant>,
    /// The last write so far was done.
    pub written: Option<Instant>,
    /// Attempt, from 1.
    pub attempt: u32,
    /// Stored bytes that it brings.
    pub stored: Range<u64>,
}

/// Where requests are told. What nobody takes in time is lost, and counted.
pub type Follower = mpsc::Sender<Served>;

impl Driver {
    pub(super) fn tell_served(
        &self,
        object: ObjectId,
        (mode, range): (Mode, Range<u64>),
        since: Instant,
        result: ReadResult,
    ) {
        let Some(follower) = &self.config.follower else { return };
        let Some(state) = self.objects.get(object) else { return };
        let flight = (result != ReadResult::hit).then(|| self.last_flight(object, &range)).flatten();
        let served = Served { mode, blob: state.blob, range, since, until: Instant::now(), result, flight };
        if follower.try_send(served).is_err() {
            self.metrics.lost_traces.inc();
        }
    }

    /// Of the flights for these bytes, that which was written last.
    fn last_flight(&self, object: ObjectId, range: &Range<u64>) -> Option<Stages> {
        let state = self.objects.get(object)?;
        let overlaps = |flight: &&Flight| {
            let chunks = state.chunks(&flight.chunks);
            let ends = chunks.first().zip(chunks.last());
            flight.object == object
                && ends
                    .is_some_and(|(first, last)| first.start < range.end && last.padded_end() > range.start)
        };
        let flight = self.flights.values().filter(overlaps).max_by_key(|flight| flight.stages.written)?;
        let mut stages = flight.stages.clone();
        let chunks = state.chunks(&flight.chunks);
        if let (Some(first), Some(last)) = (chunks.first(), chunks.last()) {
            let end = last.spec.stored_offset.saturating_add(u64::from(last.spec.stored_len));
            stages.stored = first.spec.stored_offset..end;
        }
        Some(stages)
    }

    /// Notes a moment of a flight.
    pub(super) fn stage_of(&mut self, flight: FlightId, note: impl FnOnce(&mut Stages, Instant)) {
        if self.config.follower.is_some()
            && let Some(flight) = self.flights.get_mut(&flight)
        {
            note(&mut flight.stages, Instant::now());
        }
    }
}
