//! libFuzzer calls `skimmer_fuzz::blob_tail`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skimmer_fuzz::blob_tail::run(data));
