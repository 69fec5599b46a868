//! What must hold, kept in the plainest way: lists and sets, no cleverness shared with the engine.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use skimmer_engine::{
    Chunk, Config, FlightId, Input, ObjectId, Output, ReadError, ReadId, ReadySet, Stats, Time, WriteFailure,
    WriteId,
};

pub(crate) type Verdict = Result<(), String>;

/// A chunk by name: the object's incarnation and the chunk's place on the device.
type Place = (u64, u64);

pub(crate) struct Object {
    pub(crate) incarnation: u64,
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) pending: Option<Vec<Chunk>>,
    /// Device offsets of chunks whose write came back well.
    disk: BTreeSet<u64>,
    announced: bool,
    measured: bool,
    sources_changed: bool,
    prefetched: bool,
}

pub(crate) struct Flight {
    pub(crate) object: ObjectId,
    pub(crate) incarnation: u64,
    pub(crate) chunks: Range<u32>,
    list: Vec<Chunk>,
    span: u64,
    pub(crate) ended: bool,
    pub(crate) cancelled: bool,
    verified: BTreeSet<u32>,
    dispatched: BTreeSet<u32>,
    writes: u32,
}

struct Read {
    object: ObjectId,
    incarnation: u64,
    bytes: Range<u64>,
    deadline: Option<Time>,
    /// A fetch or a write of its bytes failed while it waited.
    source_failed: bool,
    write_failed: Option<WriteFailure>,
    /// Per chunk: not to be tried again before.
    patience: BTreeMap<u64, Time>,
}

pub(crate) struct Oracle {
    config: Config,
    now: Time,
    pub(crate) objects: BTreeMap<ObjectId, Object>,
    pub(crate) flights: BTreeMap<FlightId, Flight>,
    pub(crate) finished: Vec<FlightId>,
    reads: BTreeMap<ReadId, Read>,
    done: BTreeSet<ReadId>,
    writes: BTreeMap<WriteId, (FlightId, Range<u32>)>,
    seen_writes: BTreeSet<WriteId>,
    incarnations: u64,
    /// Set by the input of this step.
    cancelled_now: Option<ReadId>,
    removed_now: Option<u64>,
    refusal_due: Option<ObjectId>,
    verified_now: Option<FlightId>,
    ready_due: BTreeSet<Place>,
    pub(crate) served: u64,
    pub(crate) failed: u64,
    pub(crate) fetches: u64,
}

fn ix(chunk: u32) -> usize {
    usize::try_from(chunk).unwrap()
}

fn padded(bytes: u64) -> u64 {
    bytes.div_ceil(4096) * 4096
}

fn end_of(chunk: &Chunk) -> u64 {
    padded(chunk.start + u64::from(chunk.len))
}

fn needs(read: &Range<u64>, chunk: &Chunk) -> bool {
    read.start < read.end && chunk.start < read.end && read.start < end_of(chunk)
}

macro_rules! demand {
    ($what:expr, $($why:tt)*) => { if !$what { return Err(format!($($why)*)); } };
}

impl Oracle {
    pub(crate) fn new(config: Config) -> Self {
        Self {
            config,
            now: Time(0),
            objects: BTreeMap::new(),
            flights: BTreeMap::new(),
            finished: Vec::new(),
            reads: BTreeMap::new(),
            done: BTreeSet::new(),
            writes: BTreeMap::new(),
            seen_writes: BTreeSet::new(),
            incarnations: 0,
            cancelled_now: None,
            removed_now: None,
            refusal_due: None,
            verified_now: None,
            ready_due: BTreeSet::new(),
            served: 0,
            failed: 0,
            fetches: 0,
        }
    }

    pub(crate) fn waiting(&self) -> Vec<ReadId> {
        self.reads.keys().copied().collect()
    }

    /// Learns of an input before the engine does.
    pub(crate) fn input(&mut self, now: Time, input: &Input) {
        self.now = now;
        (self.cancelled_now, self.removed_now, self.refusal_due, self.verified_now) =
            (None, None, None, None);
        match input {
            Input::AddObject { object, chunks, ready } => self.add(*object, chunks, ready),
            Input::RemoveObject { object } => {
                self.removed_now = self.objects.remove(object).map(|object| object.incarnation);
            }
            Input::SetSources { object, .. } => {
                if let Some(object) = self.objects.get_mut(object) {
                    object.sources_changed = true;
                }
            }
            Input::Read { read, object, offset, len } => {
                if self.reads.contains_key(read) {
                    return;
                }
                let incarnation = self.objects.get(object).map_or(0, |object| object.incarnation);
                self.done.remove(read);
                self.reads.insert(
                    *read,
                    Read {
                        object: *object,
                        incarnation,
                        bytes: *offset..offset.saturating_add(*len),
                        deadline: self.config.read_deadline.map(|wait| now.after(wait)),
                        source_failed: false,
                        write_failed: None,
                        patience: BTreeMap::new(),
                    },
                );
            }
            Input::CancelRead { read } => self.cancelled_now = Some(*read),
            Input::Prefetch { object, .. } => {
                if let Some(object) = self.objects.get_mut(object) {
                    object.prefetched = true;
                }
            }
            Input::ChunkVerified { flight, chunk } => {
                self.verified_now = Some(*flight);
                if let Some(flight) = self.flights.get_mut(flight)
                    && !flight.ended
                    && flight.chunks.contains(chunk)
                {
                    flight.verified.insert(*chunk);
                }
            }
            Input::FlightEnded { flight, result } => {
                let Some(flight) = self.flights.get_mut(flight).filter(|flight| !flight.ended) else {
                    return;
                };
                flight.ended = true;
                let short = flight.chunks.clone().find(|chunk| !flight.verified.contains(chunk));
                let Some(first) = short.filter(|_| !flight.cancelled) else { return };
                let patience = result.err().and_then(|failure| failure.retry_after).unwrap_or(Duration::ZERO);
                let until = now.after(patience.min(self.config.retry_after_cap));
                for read in self.reads.values_mut().filter(|read| read.incarnation == flight.incarnation) {
                    let lost = flight.list.iter().zip(0..).any(|(chunk, at)| {
                        flight.chunks.contains(&at)
                            && !flight.verified.contains(&at)
                            && needs(&read.bytes, chunk)
                    });
                    read.source_failed |= lost;
                    let chunk = &flight.list[ix(first)];
                    if needs(&read.bytes, chunk) {
                        read.patience.insert(chunk.start, until);
                    }
                }
            }
            Input::WriteDone { write, result } => {
                let Some((flight_id, chunks)) = self.writes.remove(write) else { return };
                let flight = self.flights.get_mut(&flight_id).expect("a write's flight is not released");
                flight.writes -= 1;
                let places = flight.list[ix(chunks.start)..ix(chunks.end)].to_vec();
                let object = self.objects.get_mut(&flight.object);
                let Some(object) = object.filter(|object| object.incarnation == flight.incarnation) else {
                    return;
                };
                match result {
                    Ok(()) => {
                        for chunk in &places {
                            object.disk.insert(chunk.start);
                            self.ready_due.insert((object.incarnation, chunk.start));
                        }
                    }
                    Err(failure) => {
                        for read in self.reads.values_mut() {
                            if read.incarnation == object.incarnation
                                && places.iter().any(|chunk| needs(&read.bytes, chunk))
                            {
                                read.write_failed = Some(*failure);
                            }
                        }
                    }
                }
            }
            Input::SourceMeasured { object, .. } => {
                if let Some(object) = self.objects.get_mut(object) {
                    object.measured = true;
                }
            }
            Input::StopFill { .. } | Input::SetExact { .. } | Input::Tick => {}
        }
    }

    fn add(&mut self, id: ObjectId, chunks: &[Chunk], ready: &ReadySet) {
        let sorted = chunks.windows(2).all(|pair| end_of(&pair[0]) <= pair[1].start);
        let sound = sorted && chunks.iter().all(|chunk| chunk.len > 0 && chunk.start % 4096 == 0);
        let fits = ix(ready.len()) == chunks.len();
        let kept = self.objects.get(&id).is_none_or(|object| {
            object.pending.as_ref().unwrap_or(&object.chunks).iter().all(|old| chunks.contains(old))
        });
        if !(sound && fits && kept) {
            self.refusal_due = Some(id);
            return;
        }
        let on_disk = (0..).zip(chunks).filter(|(at, _)| ready.contains(*at)).map(|(_, chunk)| chunk.start);
        match self.objects.get_mut(&id) {
            Some(object) => {
                object.pending = Some(chunks.to_vec());
                object.disk.extend(on_disk);
            }
            None => {
                self.incarnations += 1;
                self.objects.insert(
                    id,
                    Object {
                        incarnation: self.incarnations,
                        chunks: chunks.to_vec(),
                        pending: None,
                        disk: on_disk.collect(),
                        announced: false,
                        measured: false,
                        sources_changed: false,
                        prefetched: false,
                    },
                );
            }
        }
    }

    /// Judges one output.
    pub(crate) fn output(&mut self, output: &Output) -> Verdict {
        match output {
            Output::Fetch { flight, object, chunks, until, attempt, demand } => {
                let known = self.objects.get(object).map_or(0, |object| object.chunks.len());
                demand!(
                    *until >= chunks.end && ix(*until) <= known,
                    "{flight:?} of {chunks:?} may go on to {until}, of {known} chunks"
                );
                self.fetch(*flight, *object, chunks, *attempt, *demand)
            }
            Output::CancelFlight { flight } => {
                let Some(known) = self.flights.get_mut(flight) else {
                    return Err(format!("cancel of {flight:?}, which is not live"));
                };
                demand!(!known.ended && !known.cancelled, "cancel of {flight:?}, which is over");
                known.cancelled = true;
                Ok(())
            }
            Output::Write { write, flight, object, chunks } => self.write(*write, *flight, *object, chunks),
            Output::Complete { read, result } => self.complete(*read, *result),
            Output::Release { flight } => {
                let Some(known) = self.flights.remove(flight) else {
                    return Err(format!("release of {flight:?}, which is not live"));
                };
                demand!(known.ended, "release of {flight:?} before its end");
                demand!(known.writes == 0, "release of {flight:?} under {} writes", known.writes);
                self.finished.push(*flight);
                Ok(())
            }
            Output::Ready { object, chunks } => {
                let Some(known) = self.objects.get(object) else {
                    return Err(format!("ready chunks of unknown {object:?}"));
                };
                for chunk in chunks.clone() {
                    let place = known.chunks.get(ix(chunk)).map(|chunk| (known.incarnation, chunk.start));
                    let due = place.is_some_and(|place| self.ready_due.remove(&place));
                    demand!(due, "chunk {chunk} of {object:?} called ready, not just written");
                }
                Ok(())
            }
            Output::ObjectReady { object } => {
                let Some(known) = self.objects.get_mut(object) else {
                    return Err(format!("unknown {object:?} called ready"));
                };
                demand!(!known.announced, "{object:?} called ready twice");
                known.announced = true;
                let whole = known.chunks.iter().all(|chunk| known.disk.contains(&chunk.start));
                demand!(whole, "{object:?} called ready with chunks missing");
                Ok(())
            }
            Output::MapChanged { object } => {
                let live = self.flights.values().filter(|flight| flight.object == *object);
                let Some(known) = self.objects.get_mut(object) else {
                    return Err(format!("map change of unknown {object:?}"));
                };
                let mut live = live.filter(|flight| flight.incarnation == known.incarnation);
                demand!(live.next().is_none(), "map change of {object:?} under a flight");
                let Some(pending) = known.pending.take() else {
                    return Err(format!("map change of {object:?} that nobody asked for"));
                };
                (known.chunks, known.announced) = (pending, false);
                Ok(())
            }
            Output::ObjectRefused { object, reason } => {
                demand!(
                    self.refusal_due.take() == Some(*object),
                    "{object:?} refused for no reason: {reason}"
                );
                Ok(())
            }
        }
    }

    fn fetch(
        &mut self,
        id: FlightId,
        object_id: ObjectId,
        chunks: &Range<u32>,
        attempt: u32,
        demanded: bool,
    ) -> Verdict {
        let known = self.objects.get(&object_id);
        let Some(object) = known.filter(|object| object.pending.is_none()) else {
            return Err(format!("fetch for {object_id:?}, which is unknown or changing"));
        };
        demand!(!self.flights.contains_key(&id) && !self.finished.contains(&id), "{id:?} used twice");
        let Some(run) = object.chunks.get(ix(chunks.start)..ix(chunks.end)).filter(|run| !run.is_empty())
        else {
            return Err(format!("fetch of chunks {chunks:?} that {object_id:?} does not have"));
        };
        for (chunk, at) in run.iter().zip(chunks.start..) {
            demand!(!object.disk.contains(&chunk.start), "I7: fetch of ready chunk {at} of {object_id:?}");
            for (other_id, other) in &self.flights {
                // What a failed flight did not verify is free at its end; the rest at its release.
                let covers = other.incarnation == object.incarnation
                    && other.chunks.contains(&at)
                    && (!other.ended || other.verified.contains(&at));
                demand!(!covers, "I7: chunk {at} of {object_id:?} in {other_id:?} and {id:?}");
            }
        }
        let span = end_of(&run[run.len() - 1]) - run[0].start;
        let flying: u64 = self.flights.values().map(|flight| flight.span).sum();
        let budget = self.config.budget_bytes;
        demand!(
            self.flights.is_empty() || flying + span <= budget,
            "I6: {flying} + {span} bytes in flight, budget {budget}"
        );
        let most = usize::try_from(self.config.max_flights.max(1)).unwrap();
        demand!(self.flights.len() < most, "more than {most} flights");
        demand!(run.len() == 1 || span <= self.config.max_flight, "flight of {span} bytes");
        let gap = if object.measured { self.config.gap.max(2 << 20) } else { self.config.gap };
        for pair in run.windows(2) {
            let stored =
                pair[1].stored_start.checked_sub(pair[0].stored_start + u64::from(pair[0].stored_len));
            demand!(stored.is_some_and(|hole| hole <= gap), "stored hole {stored:?} inside {id:?}");
            demand!(pair[1].start - end_of(&pair[0]) <= gap, "device hole inside {id:?}");
        }
        let waiting: Vec<&Read> =
            self.reads.values().filter(|read| read.incarnation == object.incarnation).collect();
        let wanted = |chunk: &Chunk| waiting.iter().any(|read| needs(&read.bytes, chunk));
        demand!(!demanded || run.iter().any(wanted), "{id:?} flies for a reader that is not there");
        if self.config.max_window == 0 && !object.prefetched {
            demand!(run.iter().any(wanted), "{id:?} fetches ahead though that is off");
        }
        if attempt > 1 && !object.sources_changed {
            for chunk in run {
                let impatient = waiting.iter().any(|read| {
                    needs(&read.bytes, chunk) && read.patience.get(&chunk.start) > Some(&self.now)
                });
                demand!(!impatient, "{id:?} retries earlier than the source asked for");
            }
        }
        self.fetches += 1;
        self.flights.insert(
            id,
            Flight {
                object: object_id,
                incarnation: object.incarnation,
                chunks: chunks.clone(),
                list: object.chunks.clone(),
                span,
                ended: false,
                cancelled: false,
                verified: BTreeSet::new(),
                dispatched: BTreeSet::new(),
                writes: 0,
            },
        );
        Ok(())
    }

    fn write(&mut self, id: WriteId, flight_id: FlightId, object: ObjectId, chunks: &Range<u32>) -> Verdict {
        let Some(flight) = self.flights.get_mut(&flight_id) else {
            return Err(format!("write from {flight_id:?}, which is not live"));
        };
        demand!(self.seen_writes.insert(id), "{id:?} used twice");
        demand!(flight.object == object && !chunks.is_empty(), "{id:?} for {object:?}, chunks {chunks:?}");
        let alive = self.objects.get(&object).is_some_and(|object| object.incarnation == flight.incarnation);
        demand!(alive, "write for a removed object");
        for chunk in chunks.clone() {
            demand!(
                flight.verified.contains(&chunk),
                "I2: write of chunk {chunk}, not verified in {flight_id:?}"
            );
            demand!(flight.dispatched.insert(chunk), "chunk {chunk} of {flight_id:?} written twice");
        }
        for pair in flight.list[ix(chunks.start)..ix(chunks.end)].windows(2) {
            demand!(end_of(&pair[0]) == pair[1].start, "write over a hole on the device");
        }
        flight.writes += 1;
        self.writes.insert(id, (flight_id, chunks.clone()));
        Ok(())
    }

    fn complete(&mut self, id: ReadId, result: Result<(), ReadError>) -> Verdict {
        let Some(read) = self.reads.remove(&id) else {
            let again = self.done.contains(&id);
            return Err(format!("I1: {id:?} answered{}", if again { " again" } else { " unasked" }));
        };
        self.done.insert(id);
        let object = self.objects.get(&read.object).filter(|object| object.incarnation == read.incarnation);
        match result {
            Ok(()) => {
                self.served += 1;
                let Some(object) = object else { return Err(format!("{id:?} served without an object")) };
                let lists = object.chunks.iter();
                let missing =
                    lists.filter(|chunk| needs(&read.bytes, chunk) && !object.disk.contains(&chunk.start));
                let missing = missing.count();
                demand!(missing == 0, "I3: {id:?} served with {missing} chunks not written");
                return Ok(());
            }
            Err(ReadError::Source { attempts, .. }) => {
                demand!(read.source_failed, "{id:?} failed though no fetch for it did");
                demand!(attempts > 0, "{id:?} failed after no attempt");
            }
            Err(ReadError::Write(failure)) => {
                demand!(read.write_failed == Some(failure), "{id:?} failed though no write for it did");
            }
            Err(ReadError::Deadline) => {
                demand!(read.deadline.is_some_and(|at| self.now >= at), "{id:?} expired early");
            }
            Err(ReadError::Removed) => {
                demand!(self.removed_now == Some(read.incarnation), "{id:?}: object not removed");
            }
            Err(ReadError::Cancelled) => demand!(self.cancelled_now == Some(id), "{id:?} not cancelled"),
            Err(ReadError::UnknownObject) => demand!(object.is_none(), "{id:?}: object is known"),
        }
        self.failed += 1;
        Ok(())
    }

    /// Judges what the engine left undone, once all outputs of a step are out.
    pub(crate) fn settled(&mut self) -> Verdict {
        demand!(self.refusal_due.is_none(), "a bad chunk list was taken");
        demand!(self.ready_due.is_empty(), "written chunks not called ready: {:?}", self.ready_due);
        for (id, read) in &self.reads {
            demand!(read.deadline.is_none_or(|at| at > self.now), "I1: {id:?} waits beyond its deadline");
            let known = self.objects.get(&read.object);
            let Some(object) = known.filter(|object| object.incarnation == read.incarnation) else {
                return Err(format!("I1: {id:?} waits for an object that is gone"));
            };
            if object.pending.is_some() {
                continue;
            }
            let mut lacks = object
                .chunks
                .iter()
                .filter(|chunk| needs(&read.bytes, chunk) && !object.disk.contains(&chunk.start));
            demand!(lacks.next().is_some(), "{id:?} waits though all its chunks are written");
            let Some(flight) = self.verified_now.and_then(|flight| self.flights.get(&flight)) else {
                continue;
            };
            if flight.incarnation != read.incarnation || flight.ended {
                continue;
            }
            let mut mine =
                flight.chunks.clone().filter(|chunk| needs(&read.bytes, &flight.list[ix(*chunk)])).peekable();
            let idle = mine.peek().is_some()
                && mine.clone().all(|chunk| flight.verified.contains(&chunk))
                && mine.any(|chunk| !flight.dispatched.contains(&chunk));
            demand!(!idle, "{id:?} waits for verified chunks that are not being written");
        }
        for (id, object) in &self.objects {
            let whole = object.chunks.iter().all(|chunk| object.disk.contains(&chunk.start));
            let due = whole && !object.announced && object.pending.is_none();
            demand!(!due, "{id:?} is complete and nobody was told");
        }
        Ok(())
    }

    /// Judges the end, when nothing moves any more.
    pub(crate) fn drained(&self, stats: &Stats) -> Verdict {
        demand!(self.reads.is_empty(), "I1: stuck reads {:?}", self.waiting());
        demand!(self.flights.is_empty(), "flights never released: {:?}", self.flights.keys());
        demand!(self.writes.is_empty(), "writes never done");
        let gauges = (stats.flights, stats.in_flight_bytes, stats.reads_waiting);
        demand!(gauges == (0, 0, 0), "gauges not back at zero: {stats:?}");
        demand!(
            stats.reads_served == self.served,
            "{} reads counted, {} served",
            stats.reads_served,
            self.served
        );
        Ok(())
    }
}
