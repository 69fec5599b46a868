//! Flights progress, end, and give their buffers back.

use alloc::vec::Vec;
use core::ops::Range;

use super::{Engine, Timer, Write};
use crate::chunk::{index, span};
use crate::mutation::Mutation;
use crate::plan::{Priority, Stage};
use crate::retry::{Tries, Verdict, judge};
use crate::{Failure, FailureClass, FlightId, ObjectId, Output, ReadError, WriteFailure, WriteId};

/// A reader waits for what is at most this many stored bytes away on a request under way, rather than for a request
/// of its own.
const OVERTAKE: u64 = 1 << 20;

impl Engine {
    pub(super) fn chunk_verified(&mut self, id: FlightId, chunk: u32) {
        let Some(flight) = self.flights.get_mut(&id) else { return self.ignore() };
        let Some(object) = self.objects.get(&flight.object).filter(|_| !flight.orphan) else { return };
        if flight.ended {
            return self.ignore();
        }
        let Some(run) = flight.verify(chunk, &object.chunks) else { return self.ignore() };
        self.stats.chunks_verified += 1;
        // Write when a reader can go on with it: not for each chunk of a long read, since a write costs much the
        // same whatever its size.
        let flight = &*flight;
        let served: Vec<Range<u32>> = object
            .waiters
            .overlapping(&(chunk..chunk + 1))
            .map(|(_, needed)| needed)
            .filter(|needed| flight.has_verified(needed))
            .collect();
        let full = span(&object.chunks, &run) >= self.config.write_run;
        if !self.broken(Mutation::LazyWrite) {
            for needed in served {
                self.write_runs(id, &needed);
            }
        }
        if full {
            self.write_runs(id, &run);
        }
    }

    /// Orders the writes of a flight's verified runs that touch `chunks`.
    pub(super) fn write_runs(&mut self, id: FlightId, chunks: &Range<u32>) {
        let careless = self.broken(Mutation::WriteUnverified);
        let Some(flight) = self.flights.get_mut(&id) else { return };
        let object_id = flight.object;
        let Some(object) = self.objects.get(&object_id) else { return };
        for mut run in flight.take_runs(chunks) {
            let write = WriteId(self.next_write);
            self.next_write += 1;
            flight.writes += 1;
            self.stats.writes += 1;
            self.stats.written_bytes += span(&object.chunks, &run);
            self.writes.insert(write, Write { flight: id, chunks: run.clone() });
            if careless {
                run.end = (run.end + 1).min(flight.chunks.end);
            }
            self.outputs.push_back(Output::Write { write, flight: id, object: object_id, chunks: run });
        }
        if self.broken(Mutation::CompleteBeforeWrite) {
            self.serve(object_id, chunks);
        }
    }

    pub(super) fn write_done(&mut self, id: WriteId, result: Result<(), WriteFailure>) {
        let Some(Write { flight: flight_id, chunks }) = self.writes.remove(&id) else { return self.ignore() };
        let Some(flight) = self.flights.get_mut(&flight_id) else { return };
        flight.writes = flight.writes.saturating_sub(1);
        let (object_id, orphan) = (flight.object, flight.orphan);
        if result.is_err() {
            self.stats.writes_failed += 1;
        }
        if !orphan {
            match result {
                Err(failure) if !self.broken(Mutation::TrustFailedWrite) => {
                    self.fail(object_id, &chunks, ReadError::Write(failure));
                    // A disk that is full or broken is not to be filled with what nobody waits for.
                    if let Some(object) = self.objects.get_mut(&object_id) {
                        let all = 0..object.ready.len();
                        object.plan.drop_queued(&all, Priority::Ahead);
                        object.plan.drop_queued(&all, Priority::Prefetch);
                        object.plan.drop_queued(&all, Priority::Fill);
                    }
                }
                _ => self.made_ready(object_id, &chunks),
            }
        }
        self.release_if_done(flight_id);
    }

    fn made_ready(&mut self, id: ObjectId, chunks: &Range<u32>) {
        let Some(object) = self.objects.get_mut(&id) else { return };
        object.ready.insert(chunks.clone());
        let full = object.ready.is_full() && object.growth.is_none();
        self.serve(id, chunks);
        self.outputs.push_back(Output::Ready { object: id, chunks: chunks.clone() });
        if full {
            self.outputs.push_back(Output::ObjectReady { object: id });
        }
    }

    pub(super) fn flight_ended(&mut self, id: FlightId, result: Result<(), Failure>) {
        let Some(flight) = self.flights.get_mut(&id).filter(|flight| !flight.ended) else {
            return self.ignore();
        };
        flight.ended = true;
        if !flight.orphan {
            let all = flight.chunks.clone();
            self.write_runs(id, &all);
            self.give_back(id, result);
        }
        self.release_if_done(id);
    }

    /// Takes the chunks that a flight did not verify from it, and decides what becomes of them.
    fn give_back(&mut self, id: FlightId, result: Result<(), Failure>) {
        let Some(flight) = self.flights.get(&id) else { return };
        let (object_id, priority) = (flight.object, flight.priority);
        let (cancelled, overtaken) = (flight.cancelled, flight.overtaken);
        let tries = if flight.progressed() { Tries::FIRST } else { flight.tries };
        let left = flight.unverified();
        let Some(object) = self.objects.get_mut(&object_id) else { return };
        for run in &left {
            object.plan.clear(run);
        }
        let Some(first) = left.first().map(|run| run.start) else { return };
        if object.growth.is_some() || self.broken(Mutation::LoseRetry) {
            // The new chunk list plans afresh.
            return;
        }
        if cancelled {
            for run in &left {
                self.want_for_waiters(object_id, run);
                if overtaken {
                    self.want(object_id, run, priority);
                }
            }
            return;
        }
        // A flight that ends well with chunks missing was cut short.
        let failure = result.err().unwrap_or(Failure { class: FailureClass::Transient, retry_after: None });
        let mut charged = left;
        if failure.class == FailureClass::Corrupt {
            // Only the chunk that is bad pays for it.
            for run in &mut charged {
                let rest = run.start.max(first + 1)..run.end;
                run.end = rest.start.min(run.end);
                if priority >= Priority::Prefetch {
                    self.want(object_id, &rest, priority);
                }
                self.want_for_waiters(object_id, &rest);
            }
            charged.retain(|run| !run.is_empty());
        }
        for run in &charged {
            self.retry(object_id, run, priority, failure, tries);
        }
    }

    /// A fetch of these chunks failed: tries again after a while, or fails the reads that wait for them.
    fn retry(&mut self, id: ObjectId, run: &Range<u32>, priority: Priority, failure: Failure, tries: Tries) {
        let Some(object) = self.objects.get_mut(&id) else { return };
        let demanded = object.waiters.demanded(run);
        // What lies between two demanded parts failed with them, and is fetched with them again.
        let waited = match (demanded.first(), demanded.last()) {
            (Some(first), Some(last)) => first.start..last.end,
            _ => run.start..run.start,
        };
        let mut parts = Vec::from([(waited.clone(), Priority::Demand)]);
        if priority >= Priority::Prefetch {
            parts.push((run.start..waited.start, priority));
            parts.push((waited.end..run.end, priority));
        }
        parts.retain(|(part, _)| !part.is_empty());
        // Read-ahead that nobody waits for is dropped: the reader it was meant for will ask.
        let Some(priority) = parts.iter().map(|(_, priority)| *priority).min() else { return };
        let verdict = judge(failure, tries, object.sources, priority, &self.config, &mut self.jitter);
        match verdict {
            Verdict::Again { tries, delay } => {
                let delay =
                    if self.broken(Mutation::SkipBackoff) { core::time::Duration::ZERO } else { delay };
                let until = self.now.after(delay);
                for (part, priority) in parts {
                    let Some(object) = self.objects.get_mut(&id) else { return };
                    object.plan.hold(&part, priority, tries, until);
                    self.timers.insert((until, Timer::Backoff(id, part.start)));
                }
            }
            Verdict::GiveUp => {
                self.stats.given_up += 1;
                self.fail(id, run, ReadError::Source { class: failure.class, attempts: tries.attempt });
            }
        }
    }

    /// Queues the parts of a run that reads wait for, as if for the first time.
    fn want_for_waiters(&mut self, id: ObjectId, run: &Range<u32>) {
        let Some(object) = self.objects.get(&id) else { return };
        for part in object.waiters.demanded(run) {
            self.want(id, &part, Priority::Demand);
        }
    }

    pub(super) fn cancel_flight(&mut self, id: FlightId) {
        if let Some(flight) = self.flights.get_mut(&id)
            && !flight.ended
            && !flight.cancelled
        {
            flight.cancelled = true;
            self.stats.cancels += 1;
            self.outputs.push_back(Output::CancelFlight { flight: id });
        }
    }

    /// Gives a flight's buffer back once it has ended and its writes are done.
    fn release_if_done(&mut self, id: FlightId) {
        let early = self.broken(Mutation::EarlyRelease);
        let done = |flight: &&crate::flight::Flight| flight.ended && (flight.writes == 0 || early);
        if self.flights.get(&id).filter(done).is_none() {
            return;
        }
        let Some(flight) = self.flights.remove(&id) else { return };
        self.in_flight = self.in_flight.saturating_sub(flight.span);
        if flight.priority >= Priority::Prefetch {
            self.prefetching = self.prefetching.saturating_sub(flight.span);
        }
        self.may_start = true;
        if !self.broken(Mutation::ForgetRelease) {
            self.outputs.push_back(Output::Release { flight: id });
        }
        if flight.orphan {
            return;
        }
        let Some(object) = self.objects.get_mut(&flight.object) else { return };
        object.flights = object.flights.saturating_sub(1);
        if flight.priority != Priority::Demand {
            object.chained = object.chained.saturating_sub(1);
        }
        let own: Vec<u32> = object
            .plan
            .overlapping(&flight.chunks)
            .filter(|(_, segment)| segment.stage == Stage::Flying(id))
            .map(|(start, _)| start)
            .collect();
        let mut given_back = Vec::new();
        for start in own {
            given_back.extend(object.plan.remove(start).map(|segment| start..segment.end));
        }
        if object.growth.is_some() {
            return self.grow_if_idle(flight.object);
        }
        // Reads that came after a write of theirs had failed.
        for run in given_back {
            self.want_for_waiters(flight.object, &run);
        }
        self.line_up(flight.object);
    }

    /// Takes what reads of `chunks` wait for from flights whose turn on their request comes too late.
    pub(super) fn overtake(&mut self, id: ObjectId, chunks: &Range<u32>) {
        let Some(object) = self.objects.get(&id) else { return };
        // The request that all of them follow each other on stands at its oldest flight's position.
        let oldest = self.flights.values().find(|flight| flight.object == id && !flight.ended);
        let Some(oldest) = oldest else { return };
        let stored = |chunk: u32| object.chunks.get(index(chunk)).map(|chunk| chunk.stored_start);
        let far = object.link.gap(&self.config).saturating_mul(4).max(OVERTAKE);
        let late: Vec<FlightId> = object
            .plan
            .overlapping(chunks)
            .filter_map(|(start, segment)| match segment.stage {
                Stage::Flying(flight) if segment.priority != Priority::Demand => {
                    let behind = stored(start.max(chunks.start))?.checked_sub(stored(oldest.position())?)?;
                    let flight = Some(flight).filter(|_| behind > far)?;
                    self.flights.get(&flight).is_some_and(|flight| !flight.progressed()).then_some(flight)
                }
                _ => None,
            })
            .collect();
        for flight in late {
            if let Some(flight) = self.flights.get_mut(&flight) {
                flight.overtaken = true;
            }
            self.stats.overtaken += 1;
            self.cancel_flight(flight);
        }
    }
}
