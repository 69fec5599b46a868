//! libFuzzer calls `skimmer_fuzz::reference`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skimmer_fuzz::reference::run(data));
