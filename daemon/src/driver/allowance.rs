//! How much may be written to cache files before it has been looked what of the cache can go.

use std::time::{Duration, Instant};

/// How long flights are held back at most: whoever makes room may be waiting for a mount, and that for a read.
const PATIENCE: Duration = Duration::from_secs(2);

/// The allowance, as a count of bytes written since the driver began. There is none until one is given.
#[derive(Debug)]
pub(super) struct Allowance {
    until: u64,
    /// Nothing began since it was given.
    fresh: bool,
    /// Since when a flight is held back.
    held: Option<Instant>,
}

/// Whether a flight may begin.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Begin,
    /// Not yet, and this is the first that has to wait: somebody is to be told.
    Tell,
    Wait,
}

impl Default for Allowance {
    fn default() -> Self {
        Self { until: u64::MAX, fresh: true, held: None }
    }
}

impl Allowance {
    /// Another one is given.
    pub(super) fn give(&mut self, until: u64) {
        *self = Self { until, fresh: true, held: None };
    }

    /// Whether a flight of `bytes` may begin when `written` were written and `in_flight` are still going to be. The first of
    /// an allowance may pass it when nothing flies beside, so that the largest one comes to its turn.
    pub(super) fn ask(
        &mut self,
        now: Instant,
        bytes: u64,
        in_flight: u64,
        written: impl Fn() -> u64,
    ) -> Verdict {
        if self.until == u64::MAX {
            return Verdict::Begin;
        }
        let begun = written().saturating_add(in_flight);
        if begun.saturating_add(bytes) <= self.until || (self.fresh && in_flight == 0 && begun < self.until) {
            (self.fresh, self.held) = (false, None);
            return Verdict::Begin;
        }
        let Some(since) = self.held else {
            self.held = Some(now);
            return Verdict::Tell;
        };
        if now.saturating_duration_since(since) < PATIENCE {
            return Verdict::Wait;
        }
        tracing::warn!("no room was made in the cache for {PATIENCE:?}: it may pass its budget");
        *self = Self::default();
        Verdict::Begin
    }

    /// No flight waits any more.
    pub(super) fn rest(&mut self) {
        self.held = None;
    }

    /// When flights that are held back begin all the same.
    pub(super) fn due(&self) -> Option<Instant> {
        self.held.map(|since| since + PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flights_begin_within_the_allowance_and_wait_for_another() {
        let start = Instant::now();
        let mut allowance = Allowance::default();
        assert_eq!(allowance.ask(start, 1000, 1 << 40, || 1 << 40), Verdict::Begin);
        allowance.give(100);
        assert_eq!(allowance.ask(start, 60, 0, || 0), Verdict::Begin);
        assert_eq!(allowance.ask(start, 40, 50, || 10), Verdict::Begin);
        assert_eq!(allowance.due(), None);
        assert_eq!(allowance.ask(start, 1, 40, || 60), Verdict::Tell);
        assert_eq!(allowance.ask(start, 1, 0, || 100), Verdict::Wait);
        assert_eq!(allowance.due(), Some(start + PATIENCE));
        allowance.give(200);
        assert_eq!(allowance.due(), None);
        assert_eq!(allowance.ask(start, 100, 0, || 100), Verdict::Begin);
    }

    #[test]
    fn one_that_is_too_large_flies_alone_once_for_each_allowance() {
        let start = Instant::now();
        let mut allowance = Allowance::default();
        allowance.give(100);
        assert_eq!(allowance.ask(start, 400, 10, || 0), Verdict::Tell);
        assert_eq!(allowance.ask(start, 400, 0, || 10), Verdict::Begin);
        assert_eq!(allowance.ask(start, 400, 0, || 10), Verdict::Tell);
        // Behind the allowance nothing begins.
        allowance.give(410);
        assert_eq!(allowance.ask(start, 1, 0, || 410), Verdict::Tell);
    }

    #[test]
    fn patience_ends_and_a_flight_that_is_gone_leaves_no_date() {
        let start = Instant::now();
        let mut allowance = Allowance::default();
        allowance.give(0);
        assert_eq!(allowance.ask(start, 1, 0, || 0), Verdict::Tell);
        allowance.rest();
        assert_eq!(allowance.due(), None);
        let later = start + PATIENCE;
        assert_eq!(allowance.ask(later, 1, 0, || 0), Verdict::Tell);
        assert_eq!(allowance.ask(later + PATIENCE / 2, 1, 0, || 0), Verdict::Wait);
        assert_eq!(allowance.ask(later + PATIENCE, 1, 0, || 0), Verdict::Begin);
        assert_eq!(allowance.due(), None);
        assert_eq!(allowance.ask(later + PATIENCE, 1000, 1, || 1 << 40), Verdict::Begin);
    }
}
