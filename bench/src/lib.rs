//! What measurements stand on: the emulated link, and micro benches beside it.
#![forbid(unsafe_code)]

pub mod link;
