//! Tests of the tests: the simulator must notice each promise that the engine is made to break.
#![allow(clippy::unwrap_used, reason = "a test may fail by panic")]

#[path = "sim/oracle.rs"]
mod oracle;
#[path = "sim/rng.rs"]
mod rng;
#[path = "sim/world.rs"]
mod world;

use skimmer_engine::{Engine, Mutation};

/// Worlds in which each fault must show.
const WORLDS: u64 = 500;

#[test]
fn the_simulator_notices_each_fault() {
    let mut missed = Vec::new();
    for mutation in Mutation::ALL {
        let found = (0..WORLDS).find_map(|seed| {
            let broken = |config| Engine::new(config).with_mutation(mutation);
            world::live(seed, broken).err().map(|why| (seed, why))
        });
        match found {
            Some((seed, why)) => println!("{mutation:?}: world {seed}: {why}"),
            None => missed.push(mutation),
        }
    }
    assert!(missed.is_empty(), "not noticed in {WORLDS} worlds: {missed:?}");
}

#[test]
fn the_same_worlds_are_sound_without_a_fault() {
    let mut total = [0; 6];
    for seed in 0..WORLDS {
        let life = world::live(seed, Engine::new).unwrap_or_else(|why| panic!("world {seed}: {why}"));
        let counts = [life.served, life.failed, life.fetches, life.retries, life.cancels, life.promotions];
        total.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
    assert!(total.iter().all(|sum| *sum > 0), "nothing of some kind ever happens: {total:?}");
}
