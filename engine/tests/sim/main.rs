//! The engine in worlds of virtual time.
//!
//! `SKIMMER_SIM_WORLDS=n` sets how many worlds are lived, `SKIMMER_SIM_SEED=s` lives the one of that seed.
#![allow(clippy::unwrap_used, reason = "a test may fail by panic")]

mod oracle;
mod rng;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use skimmer_engine::Engine;
use world::{Life, live};

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}: not a number")))
}

#[test]
fn every_promise_holds_in_every_world() {
    if let Some(seed) = number("SKIMMER_SIM_SEED") {
        let life = live(seed, Engine::new).unwrap_or_else(|why| panic!("world {seed}: {why}"));
        println!("world {seed}: {life:?}");
        return;
    }
    let worlds = number("SKIMMER_SIM_WORLDS").unwrap_or(20_000);
    let (next, total) = (AtomicU64::new(0), Mutex::new(Life::default()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let faults: Vec<String> = std::thread::scope(|scope| {
        let work = || {
            let mut faults = Vec::new();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= worlds || faults.len() >= 3 {
                    return faults;
                }
                match catch_unwind(AssertUnwindSafe(|| live(seed, Engine::new))) {
                    Ok(Ok(life)) => {
                        let mut total = total.lock().unwrap();
                        total.served += life.served;
                        total.failed += life.failed;
                        total.fetches += life.fetches;
                        total.retries += life.retries;
                        total.cancels += life.cancels;
                        total.promotions += life.promotions;
                    }
                    Ok(Err(why)) => faults.push(format!("SKIMMER_SIM_SEED={seed}: {why}")),
                    Err(_) => faults.push(format!("SKIMMER_SIM_SEED={seed}: panicked, see above")),
                }
            }
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(faults.is_empty(), "{} worlds broke a promise:\n{}", faults.len(), faults.join("\n"));
    let total = *total.lock().unwrap();
    println!("{worlds} worlds: {total:?}");
    // Worlds in which nothing happens would prove nothing.
    if worlds >= 1000 {
        for (what, count) in [
            ("reads served", total.served),
            ("reads failed", total.failed),
            ("fetches", total.fetches),
            ("retries", total.retries),
            ("cancels", total.cancels),
            ("promotions", total.promotions),
        ] {
            assert!(count > worlds / 10, "only {count} {what} in {worlds} worlds");
        }
    }
}

#[test]
fn a_world_is_the_same_each_time() {
    for seed in 0..20 {
        let first = format!("{:?}", live(seed, Engine::new));
        assert_eq!(first, format!("{:?}", live(seed, Engine::new)), "world {seed}");
    }
}
