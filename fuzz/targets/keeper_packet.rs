//! libFuzzer calls `skimmer_fuzz::keeper_packet`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skimmer_fuzz::keeper_packet::run(data));
