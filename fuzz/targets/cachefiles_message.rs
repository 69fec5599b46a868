//! libFuzzer calls `skimmer_fuzz::cachefiles_message`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skimmer_fuzz::cachefiles_message::run(data));
