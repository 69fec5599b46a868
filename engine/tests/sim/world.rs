//! A seeded world in virtual time: objects, readers, sources and a disk, each with its faults.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use skimmer_engine::{
    Chunk, Config, Engine, Failure, FailureClass, FlightId, Input, ObjectId, Output, ReadId, ReadySet, Time,
    WriteFailure, WriteId,
};

use crate::oracle::Oracle;
use crate::rng::Rng;

const MS: u64 = 1_000_000;
const KIB: u64 = 1024;
/// Inputs after which a world that still moves counts as one that never stops.
const STEPS: u64 = 200_000;

#[derive(Clone, Copy)]
enum Source {
    Good,
    Slow,
    Flaky {
        percent: u64,
    },
    Dead {
        class: FailureClass,
        patience: Option<Duration>,
    },
    DeadUntil {
        time: u64,
    },
    /// Some chunks never match their digest here.
    Lying {
        each: u64,
    },
    Hanging {
        percent: u64,
    },
    /// Ends well before all chunks are there.
    Short {
        percent: u64,
    },
}

enum Event {
    Act,
    Verified(FlightId, u32),
    Ended(FlightId, Result<(), Failure>),
    Wrote(WriteId, Result<(), WriteFailure>),
}

pub(crate) struct World {
    rng: Rng,
    engine: Engine,
    oracle: Oracle,
    now: u64,
    events: BTreeMap<(u64, u64), Event>,
    order: u64,
    sources: BTreeMap<ObjectId, Vec<Source>>,
    /// Where each of the world's sequential readers goes on.
    scans: Vec<(ObjectId, u64)>,
    write_faults: u64,
    disk_ms: u64,
    next_read: u64,
    next_object: u32,
    steps: u64,
}

/// What went on in a world, to see that worlds are worth living in.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Life {
    pub(crate) served: u64,
    pub(crate) failed: u64,
    pub(crate) fetches: u64,
    pub(crate) retries: u64,
    pub(crate) cancels: u64,
    pub(crate) promotions: u64,
}

/// Lives one world; the error says which promise was broken.
pub(crate) fn live(seed: u64, make: impl FnOnce(Config) -> Engine) -> Result<Life, String> {
    let mut rng = Rng::new(seed);
    let config = config(&mut rng, seed);
    let acts = rng.within(5, 60);
    let mut world = World {
        engine: make(config.clone()),
        oracle: Oracle::new(config),
        now: 0,
        events: BTreeMap::new(),
        order: 0,
        sources: BTreeMap::new(),
        scans: Vec::new(),
        write_faults: if rng.chance(30) { rng.within(1, 30) } else { 0 },
        disk_ms: rng.within(0, 5),
        next_read: 0,
        next_object: 0,
        steps: 0,
        rng,
    };
    world.run(acts)
}

fn config(rng: &mut Rng, seed: u64) -> Config {
    let tight = rng.chance(50);
    Config {
        budget_bytes: if tight { rng.within(1, 64) * 4 * KIB } else { 8 << 20 },
        max_flights: u32::try_from(rng.within(0, 8)).unwrap(),
        first_window: rng.within(0, 64) * 4 * KIB,
        max_window: if rng.chance(25) { 0 } else { rng.within(1, 512) * 4 * KIB },
        max_flight: rng.within(1, 128) * 4 * KIB,
        min_fetch: rng.within(0, 16) * 4 * KIB,
        chain_flight: rng.within(0, 64) * 4 * KIB,
        chain_depth: u32::try_from(rng.within(0, 4)).unwrap(),
        max_request: rng.within(0, 256) * 4 * KIB,
        fill_bandwidth: if rng.chance(50) { 0 } else { rng.within(1, 1 << 20) },
        fill_rate: if rng.chance(50) { 0 } else { rng.within(1, 1000) },
        fill_quiet: Duration::from_millis(rng.within(0, 300)),
        gap: if rng.chance(30) { 0 } else { rng.within(1, 64 * KIB) },
        write_run: rng.within(1, 64) * 4 * KIB,
        max_attempts: u32::try_from(rng.within(1, 6)).unwrap(),
        backoff_base: Duration::from_millis(rng.within(0, 50)),
        backoff_cap: Duration::from_millis(rng.within(1, 500)),
        prefetch_backoff_cap: Duration::from_millis(rng.within(1, 5000)),
        retry_after_cap: Duration::from_millis(rng.within(0, 5000)),
        read_deadline: if rng.chance(50) { None } else { Some(Duration::from_millis(rng.within(1, 4000))) },
        seed,
    }
}

impl World {
    fn run(&mut self, acts: u64) -> Result<Life, String> {
        for _ in 0..self.rng.within(1, 3) {
            self.add_object()?;
        }
        let span = *self.rng.pick(&[1, 100, 3000]);
        for _ in 0..acts {
            let at = self.rng.below(span * MS);
            self.plan(at, Event::Act);
        }
        loop {
            let event = self.events.first_key_value().map(|((time, _), _)| *time);
            let timer = self.engine.next_timeout().map(|time| time.0);
            match (event, timer) {
                (None, None) => break,
                (event, Some(timer)) if event.is_none_or(|event| timer < event) => {
                    self.now = self.now.max(timer);
                    self.step(Input::Tick)?;
                }
                _ => {
                    let Some(((time, _), event)) = self.events.pop_first() else { break };
                    self.now = self.now.max(time);
                    self.happen(event)?;
                }
            }
        }
        let stats = self.engine.stats();
        self.oracle.drained(stats)?;
        Ok(Life {
            served: self.oracle.served,
            failed: self.oracle.failed,
            fetches: self.oracle.fetches,
            retries: stats.retries,
            cancels: stats.cancels,
            promotions: stats.promotions,
        })
    }

    fn plan(&mut self, at: u64, event: Event) {
        self.order += 1;
        self.events.insert((at, self.order), event);
    }

    fn happen(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Act => self.act(),
            Event::Verified(flight, chunk) => {
                let known = self.oracle.flights.get(&flight);
                let (over, cancelled) = known.map_or((true, true), |known| (known.ended, known.cancelled));
                // A task that was told to stop may still have had something in the queue.
                if over || cancelled && self.rng.chance(50) {
                    return Ok(());
                }
                self.step(Input::ChunkVerified { flight, chunk })
            }
            Event::Ended(flight, result) => {
                let known = self.oracle.flights.get(&flight);
                if known.is_none_or(|known| known.ended) {
                    return Ok(());
                }
                self.step(Input::FlightEnded { flight, result })
            }
            Event::Wrote(write, result) => self.step(Input::WriteDone { write, result }),
        }
    }

    /// One input, and all that follows from it at once.
    fn step(&mut self, input: Input) -> Result<(), String> {
        self.steps += 1;
        if self.steps > STEPS {
            return Err(format!("still moving after {STEPS} inputs"));
        }
        let told = format!("{input:?}");
        let now = Time(self.now);
        self.oracle.input(now, &input);
        self.engine.handle(now, input);
        let mut burst = 0;
        while let Some(output) = self.engine.poll_output() {
            burst += 1;
            let fault = if burst > 100_000 { Err("outputs without end".to_owned()) } else { Ok(()) };
            fault
                .and_then(|()| self.oracle.output(&output))
                .map_err(|why| format!("at {now:?}, after {told}, {output:?}: {why}"))?;
            self.obey(output);
        }
        self.oracle.settled().map_err(|why| format!("at {now:?}, after {told}: {why}"))
    }

    fn obey(&mut self, output: Output) {
        match output {
            Output::Fetch { flight, object, chunks, attempt, .. } => {
                self.fetch(flight, object, chunks, attempt)
            }
            Output::CancelFlight { flight } => {
                let at = self.now + self.rng.below(5 * MS);
                let failure = Failure { class: FailureClass::Transient, retry_after: None };
                self.plan(at, Event::Ended(flight, Err(failure)));
            }
            Output::Write { write, .. } => {
                let at = self.now + self.rng.below(self.disk_ms * MS + 1);
                let result = match self.rng.chance(self.write_faults) {
                    true => Err(*self.rng.pick(&[WriteFailure::NoSpace, WriteFailure::Io])),
                    false => Ok(()),
                };
                self.plan(at, Event::Wrote(write, result));
            }
            _ => {}
        }
    }

    fn fetch(&mut self, flight: FlightId, object: ObjectId, chunks: Range<u32>, attempt: u32) {
        let sources = self.sources.get(&object).cloned().unwrap_or_default();
        let turn = usize::try_from(attempt - 1).unwrap() % sources.len().max(1);
        let source = sources.get(turn).copied().unwrap_or(Source::Good);
        let fail = |class| Err(Failure { class, retry_after: None });
        let slow = if matches!(source, Source::Slow) { 200 } else { 3 };
        let mut at = self.now + self.rng.below(slow * MS);
        let mut result = Ok(());
        let mut order: Vec<u32> = chunks.collect();
        if self.rng.chance(5) {
            order.reverse();
        }
        for chunk in order {
            at += self.rng.below(slow * MS / 4);
            let percent = self.rng.below(100);
            result = match source {
                Source::Good | Source::Slow => Ok(()),
                Source::Flaky { percent: most } if percent < most => fail(FailureClass::Transient),
                Source::Dead { class, patience } => Err(Failure { class, retry_after: patience }),
                Source::DeadUntil { time } if self.now < time => fail(FailureClass::Transient),
                Source::Lying { each } if u64::from(chunk) % each == 0 => fail(FailureClass::Corrupt),
                Source::Hanging { percent: most } if percent < most => {
                    at += self.rng.within(1_000, 100_000) * MS;
                    fail(FailureClass::Transient)
                }
                Source::Short { percent: most } if percent < most => break,
                _ => Ok(()),
            };
            if result.is_err() {
                break;
            }
            self.plan(at, Event::Verified(flight, chunk));
        }
        self.plan(at, Event::Ended(flight, result));
    }

    fn act(&mut self) -> Result<(), String> {
        match self.rng.below(100) {
            0..40 => self.random_read(),
            40..65 => self.scan(),
            65..72 => self.prefetch(),
            72..78 => {
                let waiting = self.oracle.waiting();
                let read = if waiting.is_empty() { ReadId(0) } else { *self.rng.pick(&waiting) };
                self.step(Input::CancelRead { read })
            }
            78..82 => self.remove_object(),
            82..85 => self.add_object(),
            85..89 => self.grow_object(),
            89..92 => {
                let object = self.some_object();
                let ttfb = Duration::from_micros(self.rng.below(100_000));
                let bandwidth = self.rng.below(1 << 30);
                self.step(Input::SourceMeasured { object, ttfb, bandwidth })
            }
            _ => self.nonsense(),
        }
    }

    fn some_object(&mut self) -> ObjectId {
        let known: Vec<ObjectId> = self.oracle.objects.keys().copied().collect();
        if known.is_empty() || self.rng.chance(2) { ObjectId(9999) } else { *self.rng.pick(&known) }
    }

    fn device_size(&self, object: ObjectId) -> u64 {
        let known = self.oracle.objects.get(&object);
        known.and_then(|object| object.chunks.last()).map_or(0, |last| last.start + u64::from(last.len))
    }

    fn read(&mut self, object: ObjectId, offset: u64, len: u64) -> Result<(), String> {
        self.next_read += 1;
        self.step(Input::Read { read: ReadId(self.next_read), object, offset, len })
    }

    fn random_read(&mut self) -> Result<(), String> {
        let object = self.some_object();
        let size = self.device_size(object);
        let offset = self.rng.below(size + 8 * KIB);
        let len = match self.rng.below(20) {
            0 => 0,
            1 => u64::MAX - self.rng.below(3),
            2 => size,
            3..8 => self.rng.within(1, 256 * KIB),
            _ => self.rng.within(1, 16 * KIB),
        };
        self.read(object, offset, len)
    }

    fn scan(&mut self) -> Result<(), String> {
        if self.scans.len() < 3 && self.rng.chance(50) || self.scans.is_empty() {
            let object = self.some_object();
            let start = self.rng.below(self.device_size(object) / 2 + 1);
            self.scans.push((object, start));
        }
        let at = usize::try_from(self.rng.below(u64::try_from(self.scans.len()).unwrap())).unwrap();
        for _ in 0..self.rng.within(1, 4) {
            let (object, offset) = self.scans[at];
            let len = self.rng.within(1, 16) * 4 * KIB;
            self.scans[at].1 += len;
            self.read(object, offset, len)?;
        }
        Ok(())
    }

    fn prefetch(&mut self) -> Result<(), String> {
        let object = self.some_object();
        let start = self.rng.below(self.device_size(object) + 1);
        let end = match self.rng.below(4) {
            0 => u64::MAX,
            1 => start / 2,
            _ => start + self.rng.below(1 << 20),
        };
        if self.rng.chance(10) {
            return self.step(Input::StopFill { object });
        }
        if self.rng.chance(10) {
            let exact = self.rng.chance(50);
            return self.step(Input::SetExact { object, exact });
        }
        let background = self.rng.chance(40);
        self.step(Input::Prefetch { object, range: start..end, background })
    }

    fn chunks(&mut self) -> Vec<Chunk> {
        let count = if self.rng.chance(10) { 200 } else { 40 };
        let largest = *self.rng.pick(&[4 * KIB, 32 * KIB, 128 * KIB]);
        let (mut start, mut stored) = (0, 0);
        let mut chunks = Vec::new();
        for _ in 0..self.rng.below(count) {
            if self.rng.chance(15) {
                // A chunk that no image refers to.
                start += self.rng.within(1, 8) * 4 * KIB;
                stored += self.rng.below(20 * KIB);
            }
            let len = u32::try_from(self.rng.within(1, largest)).unwrap();
            let stored_len = self.rng.below32(len) + 1;
            // Seldom, a blob whose stored order is not its device order.
            let stored_start = if self.rng.chance(3) { stored / 2 } else { stored };
            chunks.push(Chunk { start, len, stored_start, stored_len });
            start += u64::from(len).div_ceil(4096) * 4096;
            stored += u64::from(stored_len);
        }
        chunks
    }

    fn some_ready(&mut self, count: usize) -> ReadySet {
        let count = u32::try_from(count).unwrap();
        let mut ready = ReadySet::new(count);
        for _ in 0..self.rng.below(4) {
            let start = self.rng.below32(count + 1);
            let len = self.rng.below32(20);
            ready.insert(start..start + len);
        }
        ready
    }

    fn add_object(&mut self) -> Result<(), String> {
        let reuse = self.next_object > 0 && self.rng.chance(50);
        let object = ObjectId(if reuse { self.rng.below32(self.next_object) } else { self.next_object });
        self.next_object += u32::from(!reuse);
        let known = self.oracle.objects.contains_key(&object);
        let chunks = self.chunks();
        let ready = self.some_ready(chunks.len());
        self.step(Input::AddObject { object, chunks, ready })?;
        if known {
            return Ok(());
        }
        let mut sources = Vec::new();
        for _ in 0..self.rng.within(1, 3) {
            sources.push(self.source());
        }
        let count = u32::try_from(sources.len()).unwrap();
        self.sources.insert(object, sources);
        let piece = *self.rng.pick(&[0, 0, 4096, 100_000, 4 << 20]);
        if count > 1 || piece > 0 { self.step(Input::SetSources { object, count, piece }) } else { Ok(()) }
    }

    fn source(&mut self) -> Source {
        let percent = self.rng.within(1, 60);
        match self.rng.below(16) {
            0..5 => Source::Good,
            5 => Source::Slow,
            6..8 => Source::Flaky { percent: percent / 2 },
            8..10 => {
                use FailureClass::{Corrupt, Denied, Fatal, NotFound, Transient};
                let class = *self.rng.pick(&[Transient, Transient, Denied, NotFound, Corrupt, Fatal]);
                let patience = Duration::from_millis(self.rng.below(3000));
                Source::Dead { class, patience: self.rng.chance(50).then_some(patience) }
            }
            10..12 => Source::DeadUntil { time: self.rng.below(2000 * MS) },
            12 => Source::Lying { each: self.rng.within(1, 12) },
            13..15 => Source::Hanging { percent: percent / 3 },
            _ => Source::Short { percent: percent / 2 },
        }
    }

    fn remove_object(&mut self) -> Result<(), String> {
        let object = self.some_object();
        self.step(Input::RemoveObject { object })
    }

    /// Another image refers to more chunks of a blob: some of its holes become chunks, and its end moves.
    fn grow_object(&mut self) -> Result<(), String> {
        let object = self.some_object();
        let Some(known) = self.oracle.objects.get(&object) else { return Ok(()) };
        let old = known.pending.as_ref().unwrap_or(&known.chunks).clone();
        let mut chunks: Vec<Chunk> = Vec::new();
        let mut end = 0;
        for chunk in old {
            if chunk.start > end && self.rng.chance(70) {
                let stored_start = chunk.stored_start.saturating_sub(1000);
                chunks.push(Chunk { start: end, len: 4096, stored_start, stored_len: 1000 });
            }
            end = chunk.padded_end();
            chunks.push(chunk);
        }
        for more in 0..self.rng.below(10) {
            chunks.push(Chunk { start: end + more * 4096, len: 4000, stored_start: end, stored_len: 4000 });
        }
        if self.rng.chance(10) && !chunks.is_empty() {
            let lost = usize::try_from(self.rng.below(u64::try_from(chunks.len()).unwrap())).unwrap();
            chunks.remove(lost);
        }
        let ready = self.some_ready(chunks.len());
        self.step(Input::AddObject { object, chunks, ready })
    }

    /// Inputs that name nothing, or things long gone, or make no sense.
    fn nonsense(&mut self) -> Result<(), String> {
        let finished: BTreeSet<FlightId> = self.oracle.finished.iter().copied().collect();
        let gone = finished.last().copied().unwrap_or(FlightId(u64::MAX));
        let input = match self.rng.below(9) {
            0 => Input::ChunkVerified { flight: gone, chunk: self.rng.below32(50) },
            1 => Input::FlightEnded { flight: gone, result: Ok(()) },
            2 => Input::WriteDone { write: WriteId(u64::MAX), result: Ok(()) },
            3 => Input::CancelRead { read: ReadId(u64::MAX) },
            4 => {
                let live = self.oracle.flights.iter().next();
                let (flight, chunk) = live.map_or((gone, 7), |(id, flight)| (*id, flight.chunks.end));
                Input::ChunkVerified { flight, chunk }
            }
            5 => {
                let waiting = self.oracle.waiting();
                let read = if waiting.is_empty() { ReadId(u64::MAX) } else { *self.rng.pick(&waiting) };
                let object = self.some_object();
                Input::Read { read, object, offset: u64::MAX, len: u64::MAX }
            }
            6 => {
                let start = *self.rng.pick(&[0, 1, 8192, u64::MAX - 4095, u64::MAX]);
                let chunk = Chunk { start, len: 9000, stored_start: start, stored_len: u32::MAX };
                let bad = Chunk { start: 4096, ..chunk };
                let chunks = vec![Chunk { start: 0, ..chunk }, bad];
                Input::AddObject { object: ObjectId(7777), chunks, ready: ReadySet::new(2) }
            }
            7 => Input::SetSources { object: ObjectId(4242), count: 0, piece: 0 },
            _ => Input::Tick,
        };
        self.step(input)
    }
}
