//! What measurements stand on: scenarios, their runner and results, and the emulated link.
#![forbid(unsafe_code)]

pub mod ab;
pub mod build;
pub mod cold;
pub mod contender;
pub mod content;
pub mod data;
pub mod density;
pub mod fuse;
pub mod link;
pub mod probe;
pub mod record;
pub mod report;
pub mod run;
pub mod scenario;
pub mod stats;
pub mod warm;
