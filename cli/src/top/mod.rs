//! `skimmer top`: what the daemon does right now.

mod sample;
mod screen;

pub(crate) use sample::{Rates, Sample};
pub(crate) use screen::{Screen, draw};
