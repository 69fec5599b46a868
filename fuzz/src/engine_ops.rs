//! Any sequence of inputs to the engine, sensible and not; then a shell that does as it is told.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use skimmer_engine::{
    Chunk, Config, Engine, Failure, FailureClass, FlightId, Input, ObjectId, Output, ReadId, ReadySet, Time,
    WriteFailure, WriteId,
};

/// Inputs of one run at most.
const INPUTS: usize = 200;
/// Steps that an obedient shell may need to bring everything to its end.
const DRAIN: usize = 20_000;

/// Drives an engine by what the bytes say. Held are: each read is answered exactly once (I1) and only when its chunks
/// are written (I3), the budget (I6), no chunk in two flights (I7), and an end for every read under an obedient shell.
pub fn run(data: &[u8]) {
    run_on(data, Engine::new);
}

/// As [`run`], on an engine that the caller makes.
pub fn run_on(data: &[u8], make: impl FnOnce(Config) -> Engine) {
    let mut u = Unstructured::new(data);
    let Ok(config) = config(&mut u) else { return };
    let mut world = World::new(make(config));
    for _ in 0..INPUTS {
        if u.is_empty() {
            break;
        }
        let Ok(input) = input(&mut u, &world) else { break };
        world.step(input);
    }
    world.drain();
}

fn config(u: &mut Unstructured<'_>) -> Result<Config> {
    let bytes = |u: &mut Unstructured<'_>, choices: &[u64]| u.choose(choices).copied();
    Ok(Config {
        budget_bytes: bytes(u, &[1 << 20, 0, 8192, 65_536, u64::MAX])?,
        max_flights: *u.choose(&[4, 1, 32, u32::MAX])?,
        first_window: bytes(u, &[16_384, 0, 1 << 20])?,
        max_window: bytes(u, &[65_536, 0, u64::MAX])?,
        max_flight: bytes(u, &[32_768, 0, 4096, u64::MAX])?,
        min_fetch: bytes(u, &[0, 8192, 1 << 20])?,
        gap: bytes(u, &[0, 1000, u64::MAX])?,
        write_run: bytes(u, &[8192, 0, 1 << 20])?,
        max_attempts: *u.choose(&[3, 0, 1, u32::MAX])?,
        read_deadline: *u.choose(&[None, Some(Duration::ZERO), Some(Duration::from_secs(9))])?,
        ..Config::default()
    })
}

fn chunks(u: &mut Unstructured<'_>) -> Result<Vec<Chunk>> {
    let count = u.int_in_range(0..=20u8)?;
    let (mut start, mut stored) = (0u64, 0u64);
    (0..count)
        .map(|_| {
            let shape = u.arbitrary::<u8>()?;
            let chunk = match shape {
                // Anything at all: lists that break the rules must be refused.
                0 => Chunk {
                    start: u.arbitrary()?,
                    len: u.arbitrary()?,
                    stored_start: u.arbitrary()?,
                    stored_len: u.arbitrary()?,
                },
                _ => Chunk {
                    start,
                    len: 1 + u32::from(shape) * 64,
                    stored_start: stored,
                    stored_len: 1 + u32::from(shape),
                },
            };
            let hole = if shape % 8 == 7 { 8192 } else { 0 };
            start = chunk.start.saturating_add(chunk.len.into()).saturating_add(4095 + hole) & !4095;
            stored = chunk.stored_start.saturating_add(chunk.stored_len.into()).saturating_add(hole / 10);
            Ok(chunk)
        })
        .collect()
}

/// A device offset: near the chunks, rarely anywhere.
fn offset(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.arbitrary::<u8>()? {
        0 => u.arbitrary()?,
        1 => u64::MAX,
        _ => u64::from(u.arbitrary::<u16>()?) * 4,
    })
}

/// One that there is, or by chance one that there is not.
fn pick(u: &mut Unstructured<'_>, known: impl ExactSizeIterator<Item = u64>) -> Result<u64> {
    let at = usize::from(u.arbitrary::<u8>()?);
    let len = known.len();
    match known.into_iter().nth(if len == 0 { 0 } else { at % len }) {
        Some(id) if at < 250 => Ok(id),
        _ => u.int_in_range(0..=40),
    }
}

fn input(u: &mut Unstructured<'_>, world: &World) -> Result<(Time, Input)> {
    let later = match u.arbitrary::<u8>()? {
        step @ 0..200 => Duration::from_micros(step.into()),
        step => Duration::from_millis(u64::from(step) * 20),
    };
    let object = ObjectId(u.int_in_range(0..=2)?);
    let input = match u.int_in_range(0..=31u8)? {
        0..=2 => {
            let mut list = match world.objects.get(&object) {
                Some(known) if u.arbitrary()? => known.chunks.clone(),
                _ => Vec::new(),
            };
            let base = list.last().map_or(0, |last| last.padded_end().saturating_add(4096));
            list.extend(
                chunks(u)?
                    .into_iter()
                    .map(|chunk| Chunk { start: chunk.start.saturating_add(base), ..chunk }),
            );
            let len = u32::try_from(list.len()).unwrap_or(0);
            let mut ready = ReadySet::new(if u.ratio(1, 32u8)? { len + 1 } else { len });
            if u.arbitrary()? {
                let at = u32::from(u.arbitrary::<u8>()?) % 24;
                ready.insert(at..at + u32::from(u.arbitrary::<u8>()?) % 24);
            }
            Input::AddObject { object, chunks: list, ready }
        }
        3 => Input::RemoveObject { object },
        4 => Input::SetSources { object, count: u.arbitrary()?, piece: u.arbitrary()? },
        5..=12 => {
            let read = ReadId(u.int_in_range(0..=15)?);
            let len = if u.arbitrary()? { offset(u)? } else { 4096 };
            Input::Read { read, object, offset: offset(u)?, len }
        }
        13 => Input::CancelRead { read: ReadId(u.int_in_range(0..=15)?) },
        14..=15 => {
            let range = offset(u)?..offset(u)?;
            let background = (range.start ^ range.end) & 4096 != 0;
            Input::Prefetch { object, range, background }
        }
        16..=22 => {
            let flight = FlightId(pick(u, world.flights.keys().map(|id| id.0))?);
            let chunk = match world.flights.get(&flight) {
                // The chunk whose turn it is, or by chance another one.
                Some(known) if u.arbitrary::<u8>()? < 240 => known.next_chunk(),
                _ => u.int_in_range(0..=24)?,
            };
            Input::ChunkVerified { flight, chunk }
        }
        23..=25 => {
            let flight = FlightId(pick(u, world.flights.keys().map(|id| id.0))?);
            let class = *u.choose(&[
                FailureClass::Transient,
                FailureClass::Denied,
                FailureClass::NotFound,
                FailureClass::Corrupt,
                FailureClass::Fatal,
            ])?;
            let retry_after =
                if u.arbitrary()? { Some(Duration::from_millis(u.arbitrary::<u16>()?.into())) } else { None };
            let result = if u.arbitrary()? { Ok(()) } else { Err(Failure { class, retry_after }) };
            Input::FlightEnded { flight, result }
        }
        26..=28 => {
            let write = WriteId(pick(u, world.writes.keys().map(|id| id.0))?);
            let result = match u.arbitrary::<u8>()? {
                0..=7 => Err(WriteFailure::NoSpace),
                8..=15 => Err(WriteFailure::Io),
                _ => Ok(()),
            };
            Input::WriteDone { write, result }
        }
        29 => Input::SourceMeasured {
            object,
            ttfb: Duration::from_micros(u.arbitrary::<u32>()?.into()),
            bandwidth: u.arbitrary()?,
        },
        _ => Input::Tick,
    };
    Ok((world.now.after(later), input))
}

struct Object {
    /// Tells a removed object from a later one of the same name.
    life: u64,
    chunks: Vec<Chunk>,
    pending: Option<Vec<Chunk>>,
    /// Device offsets of the chunks that are written.
    disk: BTreeSet<u64>,
}

struct Flight {
    object: ObjectId,
    life: u64,
    chunks: Range<u32>,
    verified: BTreeSet<u32>,
    ended: bool,
}

impl Flight {
    fn next_chunk(&self) -> u32 {
        self.chunks.clone().find(|chunk| !self.verified.contains(chunk)).unwrap_or(self.chunks.start)
    }
}

struct Read {
    object: ObjectId,
    life: Option<u64>,
    bytes: Range<u64>,
}

/// The engine and the plainest record of what it must hold to.
struct World {
    engine: Engine,
    now: Time,
    lives: u64,
    objects: BTreeMap<ObjectId, Object>,
    reads: BTreeMap<ReadId, Read>,
    flights: BTreeMap<FlightId, Flight>,
    writes: BTreeMap<WriteId, (ObjectId, u64, Vec<u64>)>,
}

fn position(chunk: u32) -> usize {
    usize::try_from(chunk).unwrap_or(usize::MAX)
}

impl World {
    fn new(engine: Engine) -> Self {
        Self {
            engine,
            now: Time(0),
            lives: 0,
            objects: BTreeMap::new(),
            reads: BTreeMap::new(),
            flights: BTreeMap::new(),
            writes: BTreeMap::new(),
        }
    }

    fn step(&mut self, (now, input): (Time, Input)) {
        self.now = self.now.max(now);
        self.note(&input);
        self.engine.handle(now, input.clone());
        let outputs: Vec<Output> = std::iter::from_fn(|| self.engine.poll_output()).collect();
        if let Input::AddObject { object, chunks, ready } = &input {
            let refused =
                |output: &Output| matches!(output, Output::ObjectRefused { object: id, .. } if id == object);
            if !outputs.iter().any(refused) {
                self.added(*object, chunks, ready);
            }
        }
        for output in &outputs {
            self.judge(output);
        }
        let stats = self.engine.stats();
        assert_eq!(stats.reads_waiting, count(self.reads.len()), "I1: reads that wait");
        let budget = self.engine.config().budget_bytes;
        assert!(stats.in_flight_bytes <= budget || stats.flights <= 1, "I6: {stats:?}");
        assert_eq!(stats.flights, count(self.flights.len()));
    }

    /// What an input means, before the engine has it.
    fn note(&mut self, input: &Input) {
        match input {
            Input::RemoveObject { object } => {
                self.objects.remove(object);
            }
            Input::Read { read, object, offset, len } => {
                let life = self.objects.get(object).map(|object| object.life);
                let bytes = *offset..offset.saturating_add(*len);
                self.reads.entry(*read).or_insert(Read { object: *object, life, bytes });
            }
            Input::ChunkVerified { flight, chunk } => {
                let flight = self.flights.get_mut(flight);
                if let Some(flight) = flight.filter(|flight| !flight.ended && flight.chunks.contains(chunk)) {
                    flight.verified.insert(*chunk);
                }
            }
            Input::FlightEnded { flight, .. } => {
                if let Some(flight) = self.flights.get_mut(flight) {
                    flight.ended = true;
                }
            }
            Input::WriteDone { write, result } => {
                if let Some((object, life, places)) = self.writes.remove(write)
                    && let Some(object) = self.objects.get_mut(&object).filter(|object| object.life == life)
                    && result.is_ok()
                {
                    object.disk.extend(places);
                }
            }
            _ => {}
        }
    }

    fn added(&mut self, id: ObjectId, chunks: &[Chunk], ready: &ReadySet) {
        let on_disk = (0..).zip(chunks).filter(|(at, _)| ready.contains(*at)).map(|(_, chunk)| chunk.start);
        match self.objects.get_mut(&id) {
            Some(object) => {
                object.disk.extend(on_disk);
                object.pending = Some(chunks.to_vec());
            }
            None => {
                self.lives += 1;
                let disk = on_disk.collect();
                self.objects
                    .insert(id, Object { life: self.lives, chunks: chunks.to_vec(), pending: None, disk });
            }
        }
    }

    fn judge(&mut self, output: &Output) {
        match output {
            Output::Fetch { flight, object: id, chunks, .. } => {
                let object = self.objects.get(id).expect("a fetch for an object that there is");
                let run = object.chunks.get(position(chunks.start)..position(chunks.end));
                let run = run.filter(|run| !run.is_empty()).expect("a fetch of chunks that there are");
                assert!(
                    run.iter().all(|chunk| !object.disk.contains(&chunk.start)),
                    "I7: fetch of written chunks"
                );
                for other in
                    self.flights.values().filter(|other| (other.object, other.life) == (*id, object.life))
                {
                    // What a flight that has failed did not verify is free at its end, the rest at its release.
                    let holds = |chunk: &u32| {
                        other.chunks.contains(chunk) && (!other.ended || other.verified.contains(chunk))
                    };
                    assert!(
                        !chunks.clone().any(|chunk| holds(&chunk)),
                        "I7: {chunks:?} of {id:?} flies twice"
                    );
                }
                let new = Flight {
                    object: *id,
                    life: object.life,
                    chunks: chunks.clone(),
                    verified: BTreeSet::new(),
                    ended: false,
                };
                assert!(self.flights.insert(*flight, new).is_none(), "{flight:?} used twice");
            }
            Output::Write { write, flight, object, chunks } => {
                let flight = self.flights.get(flight).expect("a write out of a buffer that there is");
                assert!(flight.object == *object && !chunks.is_empty());
                assert!(
                    chunks.clone().all(|chunk| flight.verified.contains(&chunk)),
                    "I2: unverified chunks"
                );
                let list = self.objects.get(object).filter(|object| object.life == flight.life);
                let run =
                    list.and_then(|object| object.chunks.get(position(chunks.start)..position(chunks.end)));
                let places =
                    run.expect("a write for an object that there is").iter().map(|chunk| chunk.start);
                let known = (*object, flight.life, places.collect());
                assert!(self.writes.insert(*write, known).is_none(), "{write:?} used twice");
            }
            Output::Complete { read, result } => {
                let read = self.reads.remove(read).expect("I1: a read answered that does not wait");
                let object = self.objects.get(&read.object);
                let object = object.filter(|object| Some(object.life) == read.life);
                if result.is_ok() {
                    let object = object.expect("a read served of an object that there is");
                    let needed = |chunk: &&Chunk| {
                        read.bytes.start < read.bytes.end
                            && chunk.start < read.bytes.end
                            && read.bytes.start < chunk.padded_end()
                    };
                    let mut needed = object.chunks.iter().filter(needed);
                    assert!(
                        needed.all(|chunk| object.disk.contains(&chunk.start)),
                        "I3: served before written"
                    );
                }
            }
            Output::Release { flight } => {
                let flight = self.flights.remove(flight).expect("a release of a flight that there is");
                assert!(flight.ended, "released before the fetch has stopped");
            }
            Output::MapChanged { object } => {
                let object = self.objects.get_mut(object).expect("a new list of an object that there is");
                object.chunks = object.pending.take().expect("a new list that was given");
            }
            Output::CancelFlight { flight } => assert!(self.flights.contains_key(flight)),
            Output::Ready { object, .. } | Output::ObjectReady { object } => {
                assert!(self.objects.contains_key(object));
            }
            Output::ObjectRefused { reason, .. } => assert!(!reason.to_string().is_empty()),
        }
    }

    /// From here on every fetch and write succeeds at once: all reads must come to their end.
    fn drain(&mut self) {
        let ok = |world: &mut Self, input| world.step((world.now, input));
        for _ in 0..DRAIN {
            if let Some((id, flight)) = self.flights.iter().find(|(_, flight)| !flight.ended) {
                let (id, chunks) = (*id, flight.chunks.clone());
                for chunk in chunks {
                    ok(self, Input::ChunkVerified { flight: id, chunk });
                }
                ok(self, Input::FlightEnded { flight: id, result: Ok(()) });
            } else if let Some(write) = self.writes.keys().next().copied() {
                ok(self, Input::WriteDone { write, result: Ok(()) });
            } else if let Some(time) = self.engine.next_timeout() {
                self.step((time, Input::Tick));
            } else {
                break;
            }
        }
        assert!(self.reads.is_empty(), "I1: {} reads stuck", self.reads.len());
        assert!(self.flights.is_empty(), "flights never released");
        assert_eq!(self.engine.stats().in_flight_bytes, 0);
    }
}

fn count(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}
