//! libFuzzer calls `skimmer_fuzz::chunk_fetch`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skimmer_fuzz::chunk_fetch::run(data));
