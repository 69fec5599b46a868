//! Inputs that keep no rule at all: the engine may serve nothing then, but it must not panic or answer a read twice.
#![allow(clippy::unwrap_used, reason = "a test may fail by panic")]

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;
use skimmer_engine::{
    Chunk, Config, Engine, Failure, FailureClass, FlightId, Input, ObjectId, Output, ReadId, ReadySet, Time,
    WriteFailure, WriteId,
};

fn odd() -> impl Strategy<Value = u64> {
    prop_oneof![0..70_000u64, any::<u64>(), Just(u64::MAX), Just(1 << 62), Just(u64::MAX - 4095)]
}

fn chunks() -> impl Strategy<Value = Vec<Chunk>> {
    let wild = (odd(), any::<u32>(), odd(), any::<u32>())
        .prop_map(|(start, len, stored_start, stored_len)| Chunk { start, len, stored_start, stored_len });
    let tame = (0..20u64, 1..70u32).prop_map(|(count, len)| {
        (0..count)
            .map(|i| Chunk { start: i * 8192, len: len * 100, stored_start: i * 999, stored_len: len })
            .collect::<Vec<_>>()
    });
    prop_oneof![1 => prop::collection::vec(wild, 0..4), 4 => tame]
}

fn ready() -> impl Strategy<Value = Option<Vec<u32>>> {
    prop::option::weighted(0.9, prop::collection::vec(0..20u32, 0..6))
}

fn class() -> impl Strategy<Value = FailureClass> {
    use FailureClass::{Corrupt, Denied, Fatal, NotFound, Transient};
    prop::sample::select(vec![Transient, Denied, NotFound, Corrupt, Fatal])
}

fn input() -> impl Strategy<Value = Input> {
    let object = || (0..3u32).prop_map(ObjectId);
    let flight = || (0..12u64).prop_map(FlightId);
    let read = || (0..9u64).prop_map(ReadId);
    let failure = (class(), prop::option::of(any::<Duration>()));
    let failure = failure.prop_map(|(class, retry_after)| Failure { class, retry_after });
    let ended = prop_oneof![Just(Ok(())), failure.prop_map(Err)];
    let wrote = prop_oneof![Just(Ok(())), Just(Err(WriteFailure::NoSpace)), Just(Err(WriteFailure::Io))];
    prop_oneof![
        3 => (object(), chunks(), ready()).prop_map(|(object, chunks, present)| {
            let mut ready = ReadySet::new(present.as_ref().map_or(7, |_| u32::try_from(chunks.len()).unwrap()));
            present.into_iter().flatten().for_each(|chunk| { ready.insert(chunk..chunk.saturating_add(2)); });
            Input::AddObject { object, chunks, ready }
        }),
        1 => object().prop_map(|object| Input::RemoveObject { object }),
        1 => (object(), any::<u32>(), odd()).prop_map(|(object, count, piece)| Input::SetSources { object, count, piece }),
        8 => (read(), object(), odd(), odd())
            .prop_map(|(read, object, offset, len)| Input::Read { read, object, offset, len }),
        1 => read().prop_map(|read| Input::CancelRead { read }),
        2 => (object(), odd(), odd(), any::<bool>())
            .prop_map(|(object, a, b, background)| Input::Prefetch { object, range: a..b, background }),
        1 => object().prop_map(|object| Input::StopFill { object }),
        1 => (object(), any::<bool>()).prop_map(|(object, exact)| Input::SetExact { object, exact }),
        12 => (flight(), 0..25u32).prop_map(|(flight, chunk)| Input::ChunkVerified { flight, chunk }),
        6 => (flight(), ended).prop_map(|(flight, result)| Input::FlightEnded { flight, result }),
        6 => ((0..12u64).prop_map(WriteId), wrote).prop_map(|(write, result)| Input::WriteDone { write, result }),
        1 => (object(), any::<Duration>(), any::<u64>())
            .prop_map(|(object, ttfb, bandwidth)| Input::SourceMeasured { object, ttfb, bandwidth }),
        1 => Just(Input::Tick),
    ]
}

fn config() -> impl Strategy<Value = Config> {
    let sizes = prop_oneof![Just(0u64), 1..100_000u64, Just(u64::MAX)];
    let many = prop::collection::vec(sizes, 10);
    let delays = prop::collection::vec(prop_oneof![Just(Duration::ZERO), any::<Duration>()], 5);
    let counts = (any::<u32>(), prop_oneof![0..9u32, Just(u32::MAX)], prop::option::of(any::<Duration>()));
    (many, delays, counts).prop_map(|(sizes, delays, (max_flights, max_attempts, read_deadline))| Config {
        chain_flight: sizes[7],
        chain_depth: max_flights,
        max_request: sizes[8],
        fill_bandwidth: sizes[9],
        fill_rate: sizes[9],
        fill_quiet: delays[4],

        budget_bytes: sizes[0],
        max_flights,
        first_window: sizes[1],
        max_window: sizes[2],
        max_flight: sizes[3],
        min_fetch: sizes[4],
        gap: sizes[5],
        write_run: sizes[6],
        max_attempts,
        backoff_base: delays[0],
        backoff_cap: delays[1],
        prefetch_backoff_cap: delays[2],
        retry_after_cap: delays[3],
        read_deadline,
        seed: 0,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn nothing_panics(config in config(), inputs in prop::collection::vec((odd(), input()), 0..120)) {
        let mut engine = Engine::new(config);
        let mut waiting = BTreeSet::new();
        let mut started = BTreeSet::new();
        for (time, input) in inputs {
            if let Input::Read { read, .. } = &input {
                waiting.insert(*read);
            }
            engine.handle(Time(time), input);
            while let Some(output) = engine.poll_output() {
                match output {
                    Output::Complete { read, .. } => prop_assert!(waiting.remove(&read), "{read:?} answered unasked"),
                    Output::Fetch { flight, .. } => prop_assert!(started.insert(flight)),
                    Output::Release { flight } => prop_assert!(started.remove(&flight)),
                    _ => {}
                }
            }
            prop_assert_eq!(engine.stats().reads_waiting, u64::try_from(waiting.len()).unwrap());
        }
    }
}
