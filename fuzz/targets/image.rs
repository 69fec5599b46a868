//! libFuzzer calls `skimmer_fuzz::image`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skimmer_fuzz::image::run(data));
