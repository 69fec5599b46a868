//! The state machine: inputs in, outputs out.

use alloc::collections::VecDeque;

use crate::{Config, Input, Output, Stats, Time};

/// The core: plans fetches for reads, orders writes, answers each read once. See the crate's documentation.
#[derive(Debug)]
pub struct Engine {
    config: Config,
    outputs: VecDeque<Output>,
    stats: Stats,
}

impl Engine {
    /// An engine that knows no object.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self { config, outputs: VecDeque::new(), stats: Stats::default() }
    }

    /// The limits it was made with.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Takes one event. A `now` that lies before an earlier one counts as the earlier one.
    pub fn handle(&mut self, _now: Time, _input: Input) {}

    /// The next thing to do; call until `None` after each `handle`.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When to call with [`Input::Tick`] at the latest; `None` when no timer runs.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        None
    }

    /// What has happened so far.
    #[must_use]
    pub fn stats(&self) -> &Stats {
        &self.stats
    }
}
