//! Single promises, each in the smallest story that shows it.
#![allow(clippy::unwrap_used, reason = "a test may fail by panic")]

use std::ops::Range;
use std::time::Duration;

use skimmer_engine::{
    Chunk, Config, Engine, Failure, FailureClass, FlightId, Input, ObjectId, ObjectStatus, Output, ReadError,
    ReadId, ReadySet, Time, WriteFailure, WriteId,
};

const A: ObjectId = ObjectId(1);
const B: ObjectId = ObjectId(2);
const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

struct Shell {
    engine: Engine,
    now: u64,
    reads: u64,
}

fn even(count: u64, len: u32) -> Vec<Chunk> {
    let len64 = u64::from(len);
    (0..count)
        .map(|i| Chunk { start: i * len64, len, stored_start: i * len64 / 2, stored_len: len / 2 })
        .collect()
}

impl Shell {
    fn new(config: Config) -> Self {
        Self { engine: Engine::new(config), now: 0, reads: 0 }
    }

    fn give(&mut self, input: Input) -> Vec<Output> {
        self.engine.handle(Time(self.now), input);
        std::iter::from_fn(|| self.engine.poll_output()).collect()
    }

    fn add(&mut self, object: ObjectId, chunks: Vec<Chunk>) -> Vec<Output> {
        let ready = ReadySet::new(u32::try_from(chunks.len()).unwrap());
        self.give(Input::AddObject { object, chunks, ready })
    }

    fn read(&mut self, object: ObjectId, offset: u64, len: u64) -> Vec<Output> {
        self.reads += 1;
        self.give(Input::Read { read: ReadId(self.reads), object, offset, len })
    }

    fn verify(&mut self, flight: FlightId, chunks: Range<u32>) -> Vec<Output> {
        chunks.flat_map(|chunk| self.give(Input::ChunkVerified { flight, chunk })).collect()
    }

    fn end(&mut self, flight: FlightId) -> Vec<Output> {
        self.give(Input::FlightEnded { flight, result: Ok(()) })
    }

    fn fail(&mut self, flight: FlightId, class: FailureClass) -> Vec<Output> {
        self.give(Input::FlightEnded { flight, result: Err(Failure { class, retry_after: None }) })
    }

    fn written(&mut self, write: WriteId) -> Vec<Output> {
        self.give(Input::WriteDone { write, result: Ok(()) })
    }

    /// Verifies, ends and writes a whole flight.
    fn land(&mut self, flight: FlightId, chunks: Range<u32>) -> Vec<Output> {
        let mut all = self.verify(flight, chunks);
        all.extend(self.end(flight));
        for (write, _) in writes(&all) {
            all.extend(self.written(write));
        }
        all
    }

    /// Lets time pass to the next timer.
    fn wait(&mut self) -> Vec<Output> {
        self.now = self.engine.next_timeout().expect("a timer runs").0;
        self.give(Input::Tick)
    }
}

fn fetches(outputs: &[Output]) -> Vec<(FlightId, ObjectId, Range<u32>, u32)> {
    outputs
        .iter()
        .filter_map(|output| match output {
            Output::Fetch { flight, object, chunks, attempt, .. } => {
                Some((*flight, *object, chunks.clone(), *attempt))
            }
            _ => None,
        })
        .collect()
}

fn runs(outputs: &[Output]) -> Vec<Range<u32>> {
    fetches(outputs).into_iter().map(|(_, _, chunks, _)| chunks).collect()
}

fn writes(outputs: &[Output]) -> Vec<(WriteId, Range<u32>)> {
    outputs
        .iter()
        .filter_map(|output| match output {
            Output::Write { write, chunks, .. } => Some((*write, chunks.clone())),
            _ => None,
        })
        .collect()
}

fn answers(outputs: &[Output]) -> Vec<(u64, Result<(), ReadError>)> {
    outputs
        .iter()
        .filter_map(|output| match output {
            Output::Complete { read, result } => Some((read.0, *result)),
            _ => None,
        })
        .collect()
}

fn off() -> Config {
    Config { max_window: 0, read_deadline: None, ..Config::default() }
}

#[test]
fn the_demanded_part_of_a_window_flies_first_and_alone() {
    let mut shell = Shell::new(Config::default());
    shell.add(A, even(1000, 65536));
    let out = shell.read(A, 10 * 65536, 2 * 65536);
    assert_eq!(runs(&out), [10..12, 12..26], "the read, then the rest of a 1 MiB window");
    let demand: Vec<bool> = out
        .iter()
        .filter_map(|output| match output {
            Output::Fetch { demand, .. } => Some(*demand),
            _ => None,
        })
        .collect();
    assert_eq!(demand, [true, false]);
}

#[test]
fn a_small_read_is_enlarged_to_the_floor() {
    let mut shell = Shell::new(Config { first_window: 0, ..Config::default() });
    shell.add(A, even(1000, 4096));
    assert_eq!(runs(&shell.read(A, 5000, 10)), [Range { start: 1, end: 33 }], "128 KiB in one flight");
    let mut shell = Shell::new(off());
    shell.add(A, even(1000, 4096));
    assert_eq!(runs(&shell.read(A, 5000, 10)), [Range { start: 1, end: 2 }], "off is off");
}

#[test]
fn demand_goes_before_read_ahead_and_prefetch() {
    let config = Config { max_flights: 3, ..Config::default() };
    let mut shell = Shell::new(config);
    shell.add(A, even(4096, 65536));
    shell.add(B, even(4096, 65536));
    let out = shell.give(Input::Prefetch { object: A, range: 0..200 * MIB, background: false });
    let busy = fetches(&out);
    assert_eq!(busy.len(), 1, "two of three flights are kept for demand");
    let first = shell.read(B, 0, 65536);
    let second = shell.read(B, 100 * MIB, 65536);
    assert_eq!((runs(&first).len(), runs(&second).len()), (1, 1));
    assert!(runs(&shell.read(A, 150 * MIB, 65536)).is_empty(), "no flight is left");
    let (flight, _, chunks, _) = busy[0].clone();
    let next = fetches(&shell.land(flight, chunks));
    assert_eq!((next[0].1, next[0].2.start), (A, 2400), "the read that came last, not more prefetch");
}

#[test]
fn objects_take_turns() {
    let mut shell = Shell::new(Config { max_flights: 1, max_flight: MIB, ..off() });
    shell.add(A, even(1000, 65536));
    shell.add(B, even(1000, 65536));
    let mut out = shell.read(A, 0, 20 * MIB);
    shell.read(B, 0, 2 * MIB);
    let mut order = Vec::new();
    while let Some((flight, object, chunks, _)) = fetches(&out).first().cloned() {
        order.push(object);
        out = shell.land(flight, chunks);
    }
    assert_eq!(order[..7], [A, A, B, A, B, A, A], "B came when A had had one turn");
    assert_eq!(order.len(), 22);
}

#[test]
fn a_second_reader_waits_for_the_first_ones_flight() {
    let mut shell = Shell::new(off());
    shell.add(A, even(100, 4096));
    let (flight, ..) = fetches(&shell.read(A, 0, 8 * 4096))[0].clone();
    assert_eq!(shell.read(A, 4096, 4096), []);
    assert_eq!(runs(&shell.read(A, 7 * 4096, 2 * 4096)), [Range { start: 8, end: 9 }]);
    let out = shell.verify(flight, 0..2);
    assert_eq!(
        writes(&out),
        [(WriteId(0), 0..2)],
        "the second reader can go on, so its chunk is written now"
    );
    assert_eq!(answers(&shell.written(WriteId(0))), [(2, Ok(()))], "long before the flight is over");
}

#[test]
fn verified_chunks_are_written_in_large_runs_unless_a_read_waits() {
    let mut shell = Shell::new(Config { write_run: 32 * KIB, ..off() });
    shell.add(A, even(100, 4096));
    let out = shell.give(Input::Prefetch { object: A, range: 0..80 * KIB, background: false });
    let (flight, ..) = fetches(&out)[0].clone();
    let sizes: Vec<_> = writes(&shell.verify(flight, 0..18)).into_iter().map(|(_, run)| run).collect();
    assert_eq!(sizes, [0..8, 8..16]);
    assert_eq!(
        writes(&shell.read(A, 17 * 4096, 1)).len(),
        1,
        "a read that comes for what is verified gets it"
    );
    let out = shell.verify(flight, 18..20);
    assert_eq!(writes(&out), []);
    assert_eq!(writes(&shell.end(flight)).len(), 1, "the rest goes at the end");
}

#[test]
fn a_waiting_prefetch_is_promoted() {
    let mut shell = Shell::new(Config { max_flights: 1, ..off() });
    shell.add(A, even(1000, 65536));
    shell.add(B, even(1000, 65536));
    let (flight, _, chunks, _) = fetches(&shell.read(B, 0, 65536))[0].clone();
    shell.give(Input::Prefetch { object: A, range: 0..60 * MIB, background: false });
    assert_eq!(shell.read(A, 30 * MIB, 65536), []);
    assert_eq!(shell.engine.stats().promotions, 1);
    assert_eq!(runs(&shell.land(flight, chunks)), [Range { start: 480, end: 481 }]);
}

#[test]
fn failures_are_retried_with_backoff_and_then_told_and_then_forgotten() {
    let mut shell = Shell::new(Config { max_attempts: 3, ..off() });
    shell.add(A, even(10, 4096));
    let mut out = shell.read(A, 0, 4096);
    for attempt in 1..=3 {
        let (flight, _, chunks, number) = fetches(&out)[0].clone();
        assert_eq!((number, chunks), (attempt, 0..1));
        out = shell.fail(flight, FailureClass::Transient);
        if attempt < 3 {
            out = if fetches(&out).is_empty() { shell.wait() } else { out };
        }
    }
    let class = FailureClass::Transient;
    assert_eq!(answers(&out), [(1, Err(ReadError::Source { class, attempts: 3 }))]);
    assert_eq!(fetches(&shell.read(A, 0, 4096))[0].3, 1, "a later read tries afresh");
}

#[test]
fn other_sources_are_tried_at_once_and_each_once() {
    let mut shell = Shell::new(off());
    shell.add(A, even(10, 4096));
    shell.give(Input::SetSources { object: A, count: 3, piece: 0 });
    let mut out = shell.read(A, 0, 4096);
    for attempt in 1..=3 {
        let (flight, _, _, number) = fetches(&out)[0].clone();
        assert_eq!(number, attempt);
        out = shell.fail(flight, FailureClass::NotFound);
    }
    let class = FailureClass::NotFound;
    assert_eq!(answers(&out), [(1, Err(ReadError::Source { class, attempts: 3 }))]);
    assert_eq!(shell.now, 0);
}

#[test]
fn one_bad_chunk_fails_only_the_reads_of_it() {
    let mut shell = Shell::new(off());
    shell.add(A, even(10, 4096));
    let (flight, ..) = fetches(&shell.read(A, 0, 4096))[0].clone();
    shell.read(A, 4096, 8192);
    shell.read(A, 8192, 4096);
    // The second flight covers chunks 1 and 2; chunk 1 is bad.
    shell.land(flight, 0..1);
    let out = shell.fail(FlightId(1), FailureClass::Corrupt);
    let class = FailureClass::Corrupt;
    assert_eq!(answers(&out), [(2, Err(ReadError::Source { class, attempts: 1 }))]);
    assert_eq!(runs(&out), [Range { start: 2, end: 3 }], "the other chunk is fetched for the other read");
}

#[test]
fn retry_after_is_honoured() {
    let mut shell = Shell::new(off());
    shell.add(A, even(10, 4096));
    let (flight, ..) = fetches(&shell.read(A, 0, 4096))[0].clone();
    let wish = Duration::from_secs(7);
    let failure = Failure { class: FailureClass::Transient, retry_after: Some(wish) };
    shell.give(Input::FlightEnded { flight, result: Err(failure) });
    assert_eq!(shell.engine.next_timeout(), Some(Time(0).after(wish)));
    assert_eq!(fetches(&shell.wait())[0].3, 2);
}

#[test]
fn the_deadline_ends_a_read_and_its_hanging_flight() {
    let mut shell = Shell::new(Config { read_deadline: Some(Duration::from_secs(5)), ..off() });
    shell.add(A, even(10, 4096));
    let (flight, ..) = fetches(&shell.read(A, 0, 4096))[0].clone();
    let out = shell.wait();
    assert_eq!(shell.now, 5_000_000_000);
    assert_eq!(answers(&out), [(1, Err(ReadError::Deadline))]);
    assert!(out.contains(&Output::CancelFlight { flight }));
    assert_eq!(shell.read(A, 0, 4096), [], "the chunk is free when its flight has ended, not before");
    let out = shell.fail(flight, FailureClass::Transient);
    assert!(out.contains(&Output::Release { flight }));
    assert_eq!(fetches(&out)[0].3, 1);
}

#[test]
fn a_full_disk_fails_the_reads_that_need_the_write_and_stops_prefetch() {
    let mut shell = Shell::new(Config { max_flights: 1, ..off() });
    shell.add(A, even(1000, 65536));
    let (flight, ..) = fetches(&shell.read(A, 0, 65536))[0].clone();
    shell.give(Input::Prefetch { object: A, range: 0..60 * MIB, background: false });
    let out = shell.verify(flight, 0..1);
    shell.end(flight);
    let (write, _) = writes(&out)[0].clone();
    let out = shell.give(Input::WriteDone { write, result: Err(WriteFailure::NoSpace) });
    assert_eq!(answers(&out), [(1, Err(ReadError::Write(WriteFailure::NoSpace)))]);
    assert!(out.contains(&Output::Release { flight }));
    assert_eq!(fetches(&out), [], "nothing more is fetched for a full disk");
    assert_eq!(runs(&shell.read(A, 0, 65536)), [Range { start: 0, end: 1 }], "the chunk is not ready");
}

#[test]
fn removal_answers_every_read_and_ignores_what_comes_late() {
    let mut shell = Shell::new(off());
    shell.add(A, even(10, 4096));
    let (flight, ..) = fetches(&shell.read(A, 0, 4096 * 4))[0].clone();
    let (write, _) = writes(&shell.verify(flight, 0..4))[0].clone();
    let (other, ..) = fetches(&shell.read(A, 4096 * 6, 1))[0].clone();
    let out = shell.give(Input::RemoveObject { object: A });
    assert_eq!(answers(&out), [(1, Err(ReadError::Removed)), (2, Err(ReadError::Removed))]);
    assert!(
        out.contains(&Output::CancelFlight { flight })
            && out.contains(&Output::CancelFlight { flight: other })
    );
    assert_eq!(shell.verify(other, 6..7), []);
    assert_eq!(shell.end(flight), []);
    assert_eq!(shell.written(write), [Output::Release { flight }]);
    assert_eq!(shell.end(other), [Output::Release { flight: other }]);
    assert_eq!(shell.engine.stats().in_flight_bytes, 0);
}

#[test]
fn a_cancelled_read_takes_its_flight_along_only_if_it_was_the_last() {
    let mut shell = Shell::new(off());
    shell.add(A, even(10, 4096));
    let (flight, ..) = fetches(&shell.read(A, 0, 4096))[0].clone();
    shell.read(A, 0, 4096);
    let cancelled = Err(ReadError::Cancelled);
    assert_eq!(
        shell.give(Input::CancelRead { read: ReadId(1) }),
        [Output::Complete { read: ReadId(1), result: cancelled }]
    );
    let out = shell.give(Input::CancelRead { read: ReadId(2) });
    assert_eq!(
        out,
        [Output::Complete { read: ReadId(2), result: cancelled }, Output::CancelFlight { flight }]
    );
}

#[test]
fn a_growing_object_keeps_its_reads_and_what_it_has() {
    let mut shell = Shell::new(off());
    let all = even(8, 4096);
    let some: Vec<Chunk> = all.iter().copied().step_by(2).collect();
    shell.add(A, some);
    let (flight, ..) = fetches(&shell.read(A, 0, 4096))[0].clone();
    shell.land(flight, 0..1);
    let (flight, ..) = fetches(&shell.read(A, 8192, 4096))[0].clone();
    assert_eq!(shell.add(A, all), [Output::CancelFlight { flight }]);
    assert_eq!(shell.read(A, 4096, 4096), [], "reads wait for the new list");
    let out = shell.fail(flight, FailureClass::Transient);
    assert_eq!(out[..2], [Output::Release { flight }, Output::MapChanged { object: A }]);
    assert_eq!(runs(&out), [Range { start: 1, end: 3 }], "both reads, in one flight on the new list");
    let status = shell.engine.object(A).unwrap();
    assert_eq!(status, ObjectStatus { chunks: 8, ready: 1, waiting: 2, flights: 1 });
    let refused = shell.add(A, even(2, 4096));
    assert!(matches!(refused[..], [Output::ObjectRefused { .. }]));
}

#[test]
fn a_measured_source_widens_the_gap() {
    let merged = |measured: bool| {
        let mut shell = Shell::new(Config { max_flights: 1, gap: 16 * KIB, ..off() });
        shell.add(A, even(1000, 65536));
        if measured {
            let (ttfb, bandwidth) = (Duration::from_millis(20), 12_500_000);
            shell.give(Input::SourceMeasured { object: A, ttfb, bandwidth });
        }
        let (flight, _, chunks, _) = fetches(&shell.read(A, 0, 1))[0].clone();
        shell.read(A, 10 * 65536, 1);
        shell.read(A, 12 * 65536, 1);
        runs(&shell.land(flight, chunks))
    };
    assert_eq!(merged(false), [Range { start: 10, end: 11 }]);
    assert_eq!(merged(true), [Range { start: 10, end: 13 }], "32 KiB of hole against 250 kB in 20 ms");
}

/// With a search or a copy of the chunk list per read, this would take hours.
#[test]
fn what_follows_may_share_the_request() {
    let mut shell = Shell::new(Config::default());
    shell.give(Input::AddObject { object: A, chunks: even(100, 1 << 20), ready: ReadySet::new(100) });
    let out = shell.give(Input::Prefetch { object: A, range: 0..100 * MIB, background: false });
    let flights: Vec<(Range<u32>, u32)> = out
        .iter()
        .filter_map(|output| match output {
            Output::Fetch { chunks, until, .. } => Some((chunks.clone(), *until)),
            _ => None,
        })
        .collect();
    // Flights of 2 MiB, three at a time, on requests of 64 MiB.
    assert_eq!(flights, [(0..2, 64), (2..4, 66), (4..6, 68)]);
    // A reader far behind them takes a request of its own, and the rest still follows.
    let out = shell.read(A, 50 * MIB, 4096);
    assert_eq!(fetches(&out).first().map(|fetch| fetch.2.clone()), Some(50..51));
    // One who wants what has not begun to arrive does not wait for its turn.
    let out = shell.read(A, 5 * MIB, 4096);
    assert!(out.iter().any(|output| matches!(output, Output::CancelFlight { .. })), "{out:?}");
}

#[test]
fn a_fill_waits_for_quiet() {
    let config = Config { fill_bandwidth: 4 << 20, ..Config::default() };
    let mut shell = Shell::new(config);
    shell.give(Input::AddObject { object: A, chunks: even(100, 1 << 20), ready: ReadySet::new(100) });
    let out = shell.read(A, 50 * MIB, 4096);
    let demand = fetches(&out).first().cloned().unwrap();
    let out = shell.give(Input::Prefetch { object: A, range: 0..10 * MIB, background: true });
    assert_eq!(fetches(&out), [], "a read waits");
    let mut out = shell.land(demand.0, demand.2);
    while let Some((flight, _, chunks, _)) = fetches(&out).first().cloned() {
        assert!(chunks.start >= 50, "no fill before the quiet");
        out = shell.land(flight, chunks);
    }
    let out = shell.wait();
    assert_eq!(fetches(&out).first().map(|fetch| fetch.2.clone()), Some(0..2), "{out:?}");
    // The next one when the bandwidth allows it.
    let first = fetches(&out)[0].clone();
    let out = shell.land(first.0, first.2);
    assert_eq!(fetches(&out), []);
    assert_eq!(fetches(&shell.wait()).len(), 1);
    shell.give(Input::StopFill { object: A });
}

#[test]
fn a_blob_of_a_million_chunks_is_served_read_by_read() {
    let count = 1_000_000u32;
    let mut shell = Shell::new(Config::default());
    let mut ready = ReadySet::new(count);
    for chunk in (0..count).step_by(2) {
        ready.insert(chunk..chunk + 1);
    }
    shell.give(Input::AddObject { object: A, chunks: even(u64::from(count), 4096), ready });
    let mut open: Vec<(FlightId, ObjectId, Range<u32>, u32)> = Vec::new();
    let mut served = 0;
    for i in 0..50_000u64 {
        let out = shell.read(A, i * 7919 % u64::from(count) * 4096, 16 * KIB);
        served += answers(&out).len();
        open.extend(fetches(&out));
        if let Some((flight, _, chunks, _)) = open.pop() {
            let out = shell.land(flight, chunks);
            served += answers(&out).len();
            open.extend(fetches(&out));
        }
    }
    while let Some((flight, _, chunks, _)) = open.pop() {
        let out = shell.land(flight, chunks);
        served += answers(&out).len();
        open.extend(fetches(&out));
    }
    assert_eq!(served, 50_000);
}
