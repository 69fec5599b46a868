//! libFuzzer calls `skimmer_fuzz::signature`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skimmer_fuzz::signature::run(data));
