//! Long suites that try to make a reader see a wrong byte or an error.

mod content;
mod kills;
mod place;
mod resets;

pub use kills::{Kills, Outcome, kills_in_guest, kills_on_host};
pub use place::Place;
pub use resets::{Fill, Resets, resets};
