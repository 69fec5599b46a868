//! The workloads that run where the data is mounted: on the host or in a guest, by the program `skimmer-probe`.

mod read;
mod start;
mod sum;
mod usage;
mod walk;

pub use read::{Latency, Read, ReadOptions, read};
pub use start::{Start, StartOptions, start};
pub use sum::{Sum, sum};
pub use usage::{Usage, usage};
pub use walk::{Walk, walk};
