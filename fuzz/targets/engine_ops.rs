//! libFuzzer calls `skimmer_fuzz::engine_ops`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skimmer_fuzz::engine_ops::run(data));
