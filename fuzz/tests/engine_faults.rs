//! The engine's target must see a broken engine. Alone in its binary, because it silences the panics it asks for.

use std::path::Path;

use skimmer_engine::{Engine, Mutation};
use skimmer_fuzz::engine_ops;

/// Faults that slow the engine down or ask too much of the disk, which the simulator sees and this target does not.
const UNSEEN: &[Mutation] = &[Mutation::SkipBackoff, Mutation::StickyError, Mutation::LazyWrite];

#[test]
fn the_engine_corpus_notices_faults() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/engine_ops");
    let files: Vec<_> = std::fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    let mut missed = Mutation::ALL.to_vec();
    missed.retain(|mutation| !UNSEEN.contains(mutation));
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    for file in files {
        let data = std::fs::read(file).unwrap();
        let passes = |mutation| {
            let run = || engine_ops::run_on(&data, |config| Engine::new(config).with_mutation(mutation));
            std::panic::catch_unwind(run).is_ok()
        };
        missed.retain(|mutation| passes(*mutation));
    }
    std::panic::set_hook(hook);
    assert!(missed.is_empty(), "no file of the corpus notices {missed:?}");
}
