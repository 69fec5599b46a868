//! What the engine costs per read, for objects of a thousand and of a million chunks.
#![allow(missing_docs, reason = "criterion's macros make public functions")]

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use skimmer_engine::{
    Chunk, Config, Engine, Failure, FailureClass, Input, ObjectId, Output, ReadId, ReadySet, Time,
};

const OBJECT: ObjectId = ObjectId(1);
/// Bytes of a chunk.
const LEN: u32 = 65_536;
const SIZES: [u32; 2] = [1_000, 1_000_000];

fn chunks(count: u32) -> Vec<Chunk> {
    let stored_len = LEN / 2;
    (0..count)
        .map(|at| Chunk {
            start: u64::from(at) * u64::from(LEN),
            len: LEN,
            stored_start: u64::from(at) * u64::from(stored_len),
            stored_len,
        })
        .collect()
}

/// An engine that knows one object.
fn engine(count: u32, ready: ReadySet) -> Engine {
    let mut engine = Engine::new(Config { read_deadline: None, ..Config::default() });
    engine.handle(Time(0), Input::AddObject { object: OBJECT, chunks: chunks(count), ready });
    while engine.poll_output().is_some() {}
    assert_eq!(engine.object(OBJECT).map(|object| object.chunks), Some(count));
    engine
}

/// The reads of one run: all over the object, each another one.
struct Reads {
    next: u64,
    count: u32,
}

impl Reads {
    fn next(&mut self) -> (ReadId, Input) {
        self.next += 1;
        // A stride that shares no factor with the counts visits every chunk.
        let chunk = self.next * 7_919 % u64::from(self.count);
        let read = ReadId(self.next);
        (read, Input::Read { read, object: OBJECT, offset: chunk * u64::from(LEN), len: 4096 })
    }
}

fn hit(c: &mut Criterion) {
    let mut group = c.benchmark_group("read of ready chunks");
    for count in SIZES {
        let mut engine = engine(count, ReadySet::full(count));
        let mut reads = Reads { next: 0, count };
        let mut served = |engine: &mut Engine| {
            let (read, input) = reads.next();
            engine.handle(Time(1), input);
            engine.poll_output() == Some(Output::Complete { read, result: Ok(()) })
        };
        assert!(served(&mut engine));
        group.bench_function(BenchmarkId::from_parameter(count), |b| b.iter(|| served(&mut engine)));
    }
    group.finish();
}

/// One read from its arrival to its answer; every fetch fails, so that the object stays as it was.
fn refused(engine: &mut Engine, reads: &mut Reads) -> bool {
    let (read, input) = reads.next();
    engine.handle(Time(1), input);
    let mut answered = false;
    while let Some(output) = engine.poll_output() {
        match output {
            Output::Fetch { flight, .. } => {
                let failure = Failure { class: FailureClass::Fatal, retry_after: None };
                engine.handle(Time(1), Input::FlightEnded { flight, result: Err(failure) });
            }
            Output::Complete { read: done, result } => answered |= done == read && result.is_err(),
            _ => {}
        }
    }
    answered
}

fn miss(c: &mut Criterion) {
    let mut group = c.benchmark_group("read planned, fetch refused");
    for count in SIZES {
        let mut engine = engine(count, ReadySet::new(count));
        let mut reads = Reads { next: 0, count };
        assert!(refused(&mut engine, &mut reads) && engine.stats().fetches > 0);
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| refused(&mut engine, &mut reads));
        });
        assert_eq!(engine.stats().flights, 0, "flights are left over");
    }
    group.finish();
}

/// One read from its arrival to its answer, every fetch and write done at once.
fn served(engine: &mut Engine, reads: &mut Reads) -> bool {
    let (read, input) = reads.next();
    engine.handle(Time(1), input);
    let mut answered = false;
    while let Some(output) = engine.poll_output() {
        match output {
            Output::Fetch { flight, chunks, .. } => {
                for chunk in chunks {
                    engine.handle(Time(1), Input::ChunkVerified { flight, chunk });
                }
                engine.handle(Time(1), Input::FlightEnded { flight, result: Ok(()) });
            }
            Output::Write { write, .. } => engine.handle(Time(1), Input::WriteDone { write, result: Ok(()) }),
            Output::Complete { read: done, result } => answered |= done == read && result.is_ok(),
            _ => {}
        }
    }
    answered
}

fn fill(c: &mut Criterion) {
    let mut group = c.benchmark_group("read fetched and written");
    for count in SIZES {
        let new = || engine(count, ReadySet::new(count));
        let (mut current, mut reads) = (new(), Reads { next: 0, count });
        assert!(served(&mut current, &mut reads) && current.stats().written_bytes > 0);
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter_custom(|times| {
                let mut spent = Duration::ZERO;
                for _ in 0..times {
                    // An object that fills up gives hits: a fresh one, off the clock, before it is half full.
                    if current.object(OBJECT).is_none_or(|object| object.ready > count / 2) {
                        current = new();
                    }
                    let start = Instant::now();
                    let done = served(&mut current, &mut reads);
                    spent += start.elapsed();
                    assert!(done);
                }
                spent
            });
        });
    }
    group.finish();
}

fn add(c: &mut Criterion) {
    let mut group = c.benchmark_group("object added");
    group.sample_size(10);
    for count in SIZES {
        let (chunks, ready) = (chunks(count), ReadySet::new(count));
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter_batched(
                || (Engine::new(Config::default()), chunks.clone(), ready.clone()),
                |(mut engine, chunks, ready)| {
                    engine.handle(Time(0), Input::AddObject { object: OBJECT, chunks, ready });
                    assert!(engine.object(OBJECT).is_some());
                    engine
                },
                criterion::BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, hit, miss, fill, add);
criterion_main!(benches);
