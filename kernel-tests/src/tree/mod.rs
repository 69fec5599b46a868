//! Directory trees: a canonical listing, and every difference between two.

mod compare;
mod entry;
mod walk;

pub use compare::{Difference, compare, report};
pub use entry::{Entry, Kind, escape, unescape};
pub use walk::{list, walk};
