//! libFuzzer calls `skimmer_fuzz::chunk`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skimmer_fuzz::chunk::run(data));
