//! libFuzzer calls `skimmer_fuzz::image_rows`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skimmer_fuzz::image_rows::run(data));
