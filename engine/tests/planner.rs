//! The planner against a naive oracle: one flight at a time, so that what each takes along can be foretold.
#![allow(clippy::unwrap_used, reason = "a test may fail by panic")]

use std::ops::Range;

use proptest::prelude::*;
use skimmer_engine::{Chunk, Config, Engine, FlightId, Input, ObjectId, Output, ReadId, ReadySet, Time};

const BLOCKER: ObjectId = ObjectId(0);
const OBJECT: ObjectId = ObjectId(1);

fn ix(chunk: u32) -> usize {
    usize::try_from(chunk).unwrap()
}

fn end_of(chunk: &Chunk) -> u64 {
    (chunk.start + u64::from(chunk.len)).div_ceil(4096) * 4096
}

/// Chunks with the given holes before them, in pages and stored bytes.
fn chunks() -> impl Strategy<Value = Vec<Chunk>> {
    let one = (0..4u64, prop_oneof![4 => Just(0u64), 1 => 0..20_000u64], 1..20_000u32, 1..9_000u32);
    prop::collection::vec(one, 1..80).prop_map(|parts| {
        let (mut start, mut stored_start) = (0, 0);
        let mut chunks = Vec::new();
        for (pages, hole, len, stored_len) in parts {
            start += if hole > 0 { pages * 4096 } else { 0 };
            stored_start += hole;
            let chunk = Chunk { start, len, stored_start, stored_len };
            start = end_of(&chunk);
            stored_start = chunk.stored_end();
            chunks.push(chunk);
        }
        chunks
    })
}

/// The naive planner: one cell per chunk.
struct Naive {
    chunks: Vec<Chunk>,
    ready: Vec<bool>,
    /// Age of the demand for each chunk; a run of neighbours is as old as its oldest.
    wanted: Vec<Option<u64>>,
    limit: u64,
    gap: u64,
}

impl Naive {
    fn read(&mut self, age: u64, bytes: &Range<u64>) {
        if bytes.is_empty() {
            return;
        }
        for (at, chunk) in self.chunks.iter().enumerate() {
            if chunk.start < bytes.end && bytes.start < end_of(chunk) && !self.ready[at] {
                self.wanted[at].get_or_insert(age);
            }
        }
        let mut at = 0;
        while at < self.wanted.len() {
            let end =
                (at..self.wanted.len()).find(|i| self.wanted[*i].is_none()).unwrap_or(self.wanted.len());
            let oldest = self.wanted[at..end].iter().flatten().min().copied();
            self.wanted[at..end].fill(oldest);
            at = end + 1;
        }
    }

    fn near(&self, at: usize) -> bool {
        let (last, next) = (&self.chunks[at - 1], &self.chunks[at]);
        next.start - end_of(last) <= self.gap && next.stored_start - last.stored_end() <= self.gap
    }

    fn fits(&self, first: usize, at: usize) -> bool {
        end_of(&self.chunks[at]) - self.chunks[first].start <= self.limit
    }

    fn next_flight(&mut self) -> Option<Range<usize>> {
        let oldest = self.wanted.iter().flatten().min().copied()?;
        let first = self.wanted.iter().position(|age| *age == Some(oldest)).unwrap();
        let mut end = first + 1;
        loop {
            let joins = |at: usize| at < self.chunks.len() && self.near(at) && self.fits(first, at);
            while joins(end) && self.wanted[end].is_some() {
                end += 1;
            }
            if end < self.chunks.len() && self.wanted[end].is_some() {
                break;
            }
            // Over the hole, if a wanted chunk can be reached and the stored bytes to it are worth less than a request.
            let Some(next) = (end..self.chunks.len()).find(|at| self.wanted[*at].is_some()) else { break };
            let hole = self.chunks[next].stored_start - self.chunks[end - 1].stored_end();
            let clear = (end..next).all(|at| !self.ready[at]);
            if hole > self.gap || !clear || !(end..=next).all(joins) {
                break;
            }
            end = next;
        }
        for at in first..end {
            self.wanted[at] = None;
            self.ready[at] = true;
        }
        Some(first..end)
    }
}

fn outputs(engine: &mut Engine) -> Vec<Output> {
    std::iter::from_fn(|| engine.poll_output()).collect()
}

fn the_fetch(outputs: &[Output]) -> Option<(FlightId, Range<u32>)> {
    let mut fetches = outputs.iter().filter_map(|output| match output {
        Output::Fetch { flight, chunks, .. } => Some((*flight, chunks.clone())),
        _ => None,
    });
    let first = fetches.next();
    assert!(fetches.next().is_none(), "two flights at once");
    first
}

/// Verifies and writes a whole flight; what follows from it.
fn land(engine: &mut Engine, flight: FlightId, chunks: Range<u32>) -> Vec<Output> {
    let mut all = Vec::new();
    for chunk in chunks {
        engine.handle(Time(0), Input::ChunkVerified { flight, chunk });
        all.extend(outputs(engine));
    }
    engine.handle(Time(0), Input::FlightEnded { flight, result: Ok(()) });
    all.extend(outputs(engine));
    let writes: Vec<_> = all
        .iter()
        .filter_map(|output| match output {
            Output::Write { write, .. } => Some(*write),
            _ => None,
        })
        .collect();
    for write in writes {
        engine.handle(Time(0), Input::WriteDone { write, result: Ok(()) });
        all.extend(outputs(engine));
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn flights_are_as_foretold(
        chunks in chunks(),
        reads in prop::collection::vec((0..1_000_000u64, 0..60_000u64), 1..12),
        present in prop::collection::vec(0..80u32, 0..20),
        limit in 1..60u64,
        gap in prop_oneof![Just(0u64), 0..20_000u64],
    ) {
        let limit = limit * 4096;
        let size = end_of(chunks.last().unwrap());
        let count = u32::try_from(chunks.len()).unwrap();
        let mut ready = ReadySet::new(count);
        let mut naive = Naive {
            ready: vec![false; chunks.len()],
            wanted: vec![None; chunks.len()],
            chunks: chunks.clone(),
            limit,
            gap,
        };
        for chunk in present.into_iter().filter(|chunk| *chunk < count) {
            ready.insert(chunk..chunk + 1);
            naive.ready[ix(chunk)] = true;
        }
        let config = Config { max_window: 0, max_flights: 1, max_flight: limit, gap, ..Config::default() };
        let mut engine = Engine::new(config);
        let only = vec![Chunk { start: 0, len: 1, stored_start: 0, stored_len: 1 }];
        engine.handle(Time(0), Input::AddObject { object: BLOCKER, chunks: only, ready: ReadySet::new(1) });
        engine.handle(Time(0), Input::AddObject { object: OBJECT, chunks, ready });
        engine.handle(Time(0), Input::Read { read: ReadId(1000), object: BLOCKER, offset: 0, len: 1 });
        let (mut flight, mut run) = the_fetch(&outputs(&mut engine)).unwrap();
        let mut waiting = Vec::new();
        for (age, (offset, len)) in (0u64..).zip(reads) {
            let offset = offset % (size + 4096);
            engine.handle(Time(0), Input::Read { read: ReadId(age), object: OBJECT, offset, len });
            let out = outputs(&mut engine);
            naive.read(age, &(offset..offset + len));
            let bytes = offset..offset + len;
            let served = naive.chunks.iter().zip(&naive.ready).all(|(chunk, ready)| {
                *ready || bytes.is_empty() || chunk.start >= bytes.end || bytes.start >= end_of(chunk)
            });
            prop_assert_eq!(out.contains(&Output::Complete { read: ReadId(age), result: Ok(()) }), served);
            if !served {
                waiting.push(ReadId(age));
            }
        }
        loop {
            let out = land(&mut engine, flight, run);
            waiting.retain(|read| !out.contains(&Output::Complete { read: *read, result: Ok(()) }));
            let expected = naive.next_flight();
            let Some((next, chunks)) = the_fetch(&out) else {
                prop_assert_eq!(expected, None);
                break;
            };
            prop_assert_eq!(Some(ix(chunks.start)..ix(chunks.end)), expected);
            (flight, run) = (next, chunks);
        }
        prop_assert_eq!(waiting, []);
    }
}
