//! libFuzzer calls `skimmer_fuzz::fanotify_event`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| skimmer_fuzz::fanotify_event::run(data));
