//! Long suites that try to make a reader see a wrong byte or an error.

mod budget;
mod content;
mod faults;
mod kills;
mod place;
mod resets;

pub use budget::{Budget, Kept, Sizes, budget_in_guest, budget_on_host};
pub use faults::{Case, Compare, Seen, faults};
pub use kills::{Kills, Outcome, kills_in_guest, kills_on_host};
pub use place::Place;
pub use resets::{Fill, Resets, resets};
