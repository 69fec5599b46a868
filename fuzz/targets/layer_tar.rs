//! libFuzzer calls `skimmer_fuzz::layer_tar`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skimmer_fuzz::layer_tar::run(data));
