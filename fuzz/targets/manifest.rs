//! libFuzzer calls `skimmer_fuzz::manifest`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skimmer_fuzz::manifest::run(data));
