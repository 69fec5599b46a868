//! The workloads that run where the data is mounted: on the host or in a guest, by the program `skimmer-probe`.

mod fetch;
mod parts;
mod read;
mod start;
mod sum;
mod sweep;
mod unpack;
mod usage;
mod walk;

pub use fetch::fetch;
pub use parts::{Parts, parts, tars};
pub use read::{Latency, Read, ReadOptions, read};
pub use start::{Start, StartOptions, start};
pub use sum::{Sum, sum};
pub use sweep::{Sweep, sweep};
pub use unpack::{Unpacked, unpack};
pub use usage::{Usage, cpu_seconds, usage};
pub use walk::{Walk, walk};
