//! Flights: from the engine's plan over buffer memory and fetch task to the write.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::time::Instant;

use skimmer_engine::{Failure, FailureClass, FlightId, Input, MapError, ObjectId, WriteFailure, WriteId};
use skimmer_fetcher::chunk::Verified;
use skimmer_fetcher::source::Urgency;
use skimmer_keeper::protocol::Fill;

use super::allowance::Verdict;
use super::objects::{Blob, FileKey};
use super::served::Stages;
use super::{Driver, write_failure};
use crate::arena::{Run, Slab};
use crate::blob::{BlobChunk, BlobId, ReadyBits};
use crate::fetch::{self, Fetched, Order};
use crate::metrics::Stage;

/// The bytes of chunks on the device, neighbours as one.
pub(super) fn runs<'c>(chunks: impl IntoIterator<Item = &'c BlobChunk>) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for chunk in chunks {
        match runs.last_mut().filter(|last| last.end == chunk.start) {
            Some(last) => last.end = chunk.padded_end(),
            None => runs.push(chunk.start..chunk.padded_end()),
        }
    }
    runs
}

/// A flight that has its buffers.
pub(super) struct Flight {
    pub(super) object: ObjectId,
    pub(super) chunks: Range<u32>,
    demand: bool,
    since: Instant,
    pub(super) stages: Stages,
    /// Verified chunks that are not being written yet, by the engine's number.
    verified: BTreeMap<u32, Verified<Slab>>,
}

/// A flight that waits for buffer memory.
pub(super) struct Planned {
    flight: FlightId,
    object: ObjectId,
    chunks: Range<u32>,
    /// End of what is meant to follow on the same request.
    until: u32,
    attempt: u32,
    since: Instant,
}

/// A write that has not completed.
pub(super) struct UnderWay {
    object: ObjectId,
    flight: FlightId,
    since: Instant,
}

const CANCELLED: Failure = Failure { class: FailureClass::Transient, retry_after: None };
const IMPOSSIBLE: Failure = Failure { class: FailureClass::Fatal, retry_after: None };

impl Driver {
    pub(super) fn plan(
        &mut self,
        flight: FlightId,
        object: ObjectId,
        (chunks, until): (Range<u32>, u32),
        (attempt, demand): (u32, bool),
    ) {
        let since = Instant::now();
        let stages = Stages {
            planned: since,
            started: None,
            first: None,
            verified: None,
            writing: None,
            written: None,
            attempt,
            stored: 0..0,
        };
        let known =
            Flight { object, chunks: chunks.clone(), demand, since, stages, verified: BTreeMap::new() };
        self.flights.insert(flight, known);
        if let Some(object) = self.objects.get_mut(object) {
            object.flights += 1;
        }
        if attempt > 1 {
            self.metrics.retries.inc();
        }
        self.planned.push_back(Planned { flight, object, chunks, until, attempt, since });
    }

    /// Starts planned flights, in order, for as long as there is memory and room in the cache for the first of them.
    pub(super) fn start_planned(&mut self) {
        if self.planned.is_empty() {
            self.allowance.rest();
        }
        while !self.stopping
            && let Some(planned) = self.planned.pop_front()
        {
            let Planned { flight, object, chunks, until, attempt, since } = &planned;
            let Some(state) = self.objects.get(*object) else {
                self.ended(*flight, Err(CANCELLED));
                continue;
            };
            let Some(blob) = self.blobs.get(&state.blob) else {
                self.ended(*flight, Err(IMPOSSIBLE));
                continue;
            };
            let list = state.chunks(chunks);
            let source = blob.source(*attempt);
            let (Some(source), false) = (source, list.is_empty()) else {
                let what = if list.is_empty() { "the plan names no chunk" } else { "it has no source" };
                self.fail_flight(*flight, *object, what.to_owned(), IMPOSSIBLE);
                continue;
            };
            let bytes = runs(list).iter().map(|run| run.end - run.start).sum();
            let in_flight = u64::try_from(self.arena.in_use()).unwrap_or(u64::MAX);
            match self.allowance.ask(Instant::now(), bytes, in_flight, || self.metrics.written()) {
                Verdict::Begin => {}
                held => {
                    if held == Verdict::Tell {
                        self.sink.short();
                    }
                    self.planned.push_front(planned);
                    break;
                }
            }
            let Some(buffers) = fetch::buffers(&self.arena, chunks.start, list) else {
                if self.arena.in_use() == 0 {
                    let what = format!("chunks {chunks:?} are larger than all buffer memory");
                    self.fail_flight(*flight, *object, what, IMPOSSIBLE);
                    continue;
                }
                // The arena wakes us when something comes back.
                self.planned.push_front(planned);
                break;
            };
            self.metrics.stage(Stage::wait, since.elapsed());
            let last = state.chunks(&(until.saturating_sub(1)..*until)).first().map(|chunk| chunk.spec);
            let until = last.map_or(0, |last| last.stored_offset.saturating_add(u64::from(last.stored_len)));
            let blob = blob.reference();
            let demand = self.flights.get(flight).is_some_and(|flight| flight.demand);
            let urgency = if demand { Urgency::Demand } else { Urgency::Ahead };
            let (flight, shares) = (*flight, *attempt == 1);
            let order = Order { flight, blob, source, urgency, shares, until, chunks: buffers };
            self.fetches.start(order);
            self.stage_of(flight, |stages, now| stages.started = Some(now));
        }
    }

    fn fail_flight(&mut self, flight: FlightId, object: ObjectId, what: String, failure: Failure) {
        if let Some(object) = self.objects.get_mut(object) {
            object.last_error = Some(what);
        }
        self.ended(flight, Err(failure));
    }

    fn ended(&mut self, flight: FlightId, result: Result<(), Failure>) {
        self.input(Input::FlightEnded { flight, result });
        self.do_outputs();
    }

    pub(super) fn cancel(&mut self, flight: FlightId) {
        if let Some(at) = self.planned.iter().position(|planned| planned.flight == flight) {
            self.planned.remove(at);
            self.input(Input::FlightEnded { flight, result: Err(CANCELLED) });
        } else {
            self.fetches.cancel(flight);
        }
    }

    pub(super) fn take_fetched(&mut self) {
        while let Ok(fetched) = self.fetched.try_recv() {
            match fetched {
                Fetched::Chunk { flight, position, buffer } => {
                    // Without an entry the flight is over for the engine: the bytes are not wanted any more.
                    if let Some(known) = self.flights.get_mut(&flight) {
                        known.verified.insert(position, buffer);
                        self.stage_of(flight, |stages, now| {
                            stages.first.get_or_insert(now);
                            stages.verified = Some(now);
                        });
                        self.input(Input::ChunkVerified { flight, chunk: position });
                    }
                }
                Fetched::Ended { flight, outcome } => {
                    self.fetches.ended(flight);
                    let object = self.flights.get(&flight).map(|flight| flight.object);
                    self.record_fetch(flight, outcome.opened, outcome.result.is_err());
                    if let (Some(object), Some((ttfb, bandwidth))) = (object, outcome.measured) {
                        self.input(Input::SourceMeasured { object, ttfb, bandwidth });
                    }
                    if let (Some(object), Some(message)) = (object, outcome.message) {
                        tracing::warn!(flight = flight.0, "{message}");
                        if let Some(object) = self.objects.get_mut(object) {
                            object.last_error = Some(message);
                        }
                    }
                    self.input(Input::FlightEnded { flight, result: outcome.result });
                }
            }
        }
    }

    fn record_fetch(&mut self, flight: FlightId, opened: bool, failed: bool) {
        let Some(flight) = self.flights.get(&flight) else { return };
        let Some(object) = self.objects.get(flight.object) else { return };
        if !self.recordings.follows(object.blob) {
            return;
        }
        let chunks = object.chunks(&flight.chunks);
        let (Some(first), Some(last)) = (chunks.first(), chunks.last()) else { return };
        let stored =
            first.spec.stored_offset..last.spec.stored_offset.saturating_add(u64::from(last.spec.stored_len));
        let (blob, device) = (object.blob, first.start..last.padded_end());
        self.recordings.fetch(blob, device, stored, flight.since, (flight.demand, opened, failed));
    }

    /// Writes verified chunks that lie side by side with one operation.
    pub(super) fn write(&mut self, write: WriteId, flight: FlightId, object: ObjectId, chunks: Range<u32>) {
        self.writes.insert(write, UnderWay { object, flight, since: Instant::now() });
        self.stage_of(flight, |stages, now| stages.writing = Some(now));
        match self.run_of(flight, object, &chunks) {
            Ok((run, offset, file)) => {
                if let Some(object) = self.objects.get_mut(object) {
                    object.writes += 1;
                }
                self.ring.write(run, &file, offset, write.0);
            }
            Err(error) => {
                self.writes.remove(&write);
                if let Some(object) = self.objects.get_mut(object) {
                    object.last_error = Some(error.to_string());
                }
                self.input(Input::WriteDone { write, result: Err(write_failure(&error)) });
            }
        }
    }

    fn run_of(
        &mut self,
        flight: FlightId,
        object: ObjectId,
        chunks: &Range<u32>,
    ) -> io::Result<(Run, u64, crate::ring::WriteFile)> {
        let gone = |what: &str| io::Error::other(format!("{what} is gone"));
        let state = self.objects.get(object).ok_or_else(|| gone("the file"))?;
        let offset = state.chunks(chunks).first().ok_or_else(|| gone("the chunk list"))?.start;
        let file = match &state.key {
            FileKey::Fanotify(blob) => self.fanotify.as_ref().and_then(|f| f.writer(*blob)),
            FileKey::Fscache(key) => self.fscache.as_ref().and_then(|f| f.writer(key)),
        };
        let file = file.ok_or_else(|| gone("the writing descriptor"))?.clone();
        let flight = self.flights.get_mut(&flight).ok_or_else(|| gone("the flight"))?;
        let mut take = |n| flight.verified.remove(&n).ok_or_else(|| gone("a verified chunk"));
        let mut run = Run::new(take(chunks.start)?);
        for n in chunks.start + 1..chunks.end {
            run.push(take(n)?)
                .map_err(|_| io::Error::other("chunks of one write do not lie side by side"))?;
        }
        Ok((run, offset, file))
    }

    pub(super) fn written(&mut self, write: WriteId, len: usize, result: io::Result<()>) {
        let Some(UnderWay { object, flight, since }) = self.writes.remove(&write) else {
            tracing::error!(write = write.0, "a write ended that was not begun");
            return;
        };
        self.metrics.stage(Stage::write, since.elapsed());
        self.stage_of(flight, |stages, now| stages.written = Some(now));
        if let Some(object) = self.objects.get_mut(object) {
            object.writes -= 1;
            let mode = object.key.mode().into();
            self.metrics.writes.get_or_create(&mode).inc();
            match &result {
                Ok(()) => {
                    let len = u64::try_from(len).unwrap_or(u64::MAX);
                    self.metrics.written_bytes.get_or_create(&mode).inc_by(len);
                }
                Err(error) => {
                    self.metrics.write_errors.get_or_create(&mode).inc();
                    let message =
                        format!("writing to the {} file of blob {}: {error}", object.key.mode(), object.blob);
                    tracing::warn!("{message}");
                    object.last_error = Some(message);
                }
            }
        }
        let result = result.map_err(|error| write_failure(&error));
        if result == Err(WriteFailure::NoSpace) {
            self.sink.full();
        }
        self.input(Input::WriteDone { write, result });
    }

    pub(super) fn release(&mut self, flight: FlightId) {
        if let Some(flight) = self.flights.remove(&flight)
            && let Some(object) = self.objects.get_mut(flight.object)
        {
            object.flights -= 1;
        }
    }

    pub(super) fn ready(&mut self, object: ObjectId, chunks: Range<u32>) {
        let Some(object) = self.objects.get_mut(object) else { return };
        let written = object.chunks(&chunks);
        let indexes: Vec<u32> = written.iter().map(|chunk| chunk.index).collect();
        let runs = runs(written);
        for index in &indexes {
            object.ready.insert(*index);
        }
        if let (FileKey::Fanotify(_), Some(blob)) = (&object.key, self.blobs.get_mut(&object.blob)) {
            for index in &indexes {
                blob.ready.insert(*index);
            }
        }
        self.sink.ready(object.key.mode(), object.blob, &indexes);
        if let FileKey::Fanotify(blob) = object.key {
            self.tell(blob, &runs, Fill::Written);
        }
    }

    /// Chunks of the blob's file are on record.
    pub(super) fn durable(&mut self, blob: BlobId, chunks: &[u32]) {
        let Some(known) = self.blobs.get_mut(&blob) else { return };
        // The file may be another one by now, of which less is written.
        let chunks: ReadyBits = chunks.iter().copied().filter(|chunk| known.ready.contains(*chunk)).collect();
        known.durable.union(&chunks);
        let runs = runs(known.spec.chunks.iter().filter(|chunk| chunks.contains(chunk.index)));
        self.tell(blob, &runs, Fill::Durable);
    }

    /// Tells the keeper all that is there of the blob's file.
    pub(super) fn tell_all(&mut self, blob: BlobId) {
        let Some(Blob { spec, ready, durable, .. }) = self.blobs.get(&blob) else { return };
        let written = |chunk: &&BlobChunk| ready.contains(chunk.index) && !durable.contains(chunk.index);
        let written = runs(spec.chunks.iter().filter(written));
        let durable = runs(spec.chunks.iter().filter(|chunk| durable.contains(chunk.index)));
        self.tell(blob, &written, Fill::Written);
        self.tell(blob, &durable, Fill::Durable);
    }

    /// Lets the keeper answer accesses to these bytes by itself; not while every one of them is to be recorded.
    pub(super) fn tell(&mut self, blob: BlobId, runs: &[Range<u64>], fill: Fill) {
        if self.recordings.is_exact(blob) && fill != Fill::Absent {
            return;
        }
        for run in runs {
            let Some(fanotify) = &mut self.fanotify else { return };
            if let Err(error) = fanotify.fill(blob, run, fill) {
                return self.keeper_lost(&error);
            }
        }
    }

    pub(super) fn object_ready(&mut self, object: ObjectId) {
        if let Some(object) = self.objects.get(object) {
            self.sink.complete(object.key.mode(), object.blob);
        }
    }

    pub(super) fn map_changed(&mut self, id: ObjectId) {
        let Some(object) = self.objects.get_mut(id) else { return };
        if let Some(coming) = object.coming.take() {
            object.spec = coming;
        }
        self.grow(id);
    }

    pub(super) fn object_refused(&mut self, id: ObjectId, reason: &MapError) {
        let Some(object) = self.objects.get_mut(id) else { return };
        object.coming = None;
        let blob = object.blob;
        self.fault(Some(blob), &format!("its chunk list was refused: {reason}"));
    }
}
