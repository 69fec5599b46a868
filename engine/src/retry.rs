//! Whether and when to try again.

use core::time::Duration;

use crate::plan::Priority;
use crate::{Config, Failure, FailureClass};

/// How often a run of chunks has been tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tries {
    /// Number of the next (or present) attempt, from 1.
    pub(crate) attempt: u32,
    /// Sources in a row that cannot help, now or later.
    pub(crate) strikes: u32,
}

impl Tries {
    pub(crate) const FIRST: Self = Self { attempt: 1, strikes: 0 };
}

/// What follows from a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Again { tries: Tries, delay: Duration },
    GiveUp,
}

/// A small generator of jitter (SplitMix64), so that the engine needs no entropy.
#[derive(Clone, Debug)]
pub(crate) struct Jitter(pub(crate) u64);

impl Jitter {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Anything from nothing to `most`.
    fn up_to(&mut self, most: Duration) -> Duration {
        let nanos = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(self.next() % nanos.saturating_add(1).max(1))
    }
}

/// Judges the failure of the attempt that `tries` names, with `sources` of them to turn to.
pub(crate) fn judge(
    failure: Failure,
    tries: Tries,
    sources: u32,
    priority: Priority,
    config: &Config,
    jitter: &mut Jitter,
) -> Verdict {
    let strikes = match failure.class {
        FailureClass::Transient => 0,
        FailureClass::Denied | FailureClass::NotFound | FailureClass::Corrupt => tries.strikes + 1,
        FailureClass::Fatal => return Verdict::GiveUp,
    };
    if strikes >= sources || tries.attempt >= config.max_attempts.max(sources) {
        return Verdict::GiveUp;
    }
    let tries_next = Tries { attempt: tries.attempt + 1, strikes };
    let delay = match tries.attempt.checked_sub(sources) {
        // A source not asked yet is asked at once; what another one wished for does not concern it.
        None => Duration::ZERO,
        Some(rounds) => {
            let cap = match priority {
                Priority::Demand => config.backoff_cap,
                Priority::Ahead | Priority::Prefetch | Priority::Fill => config.prefetch_backoff_cap,
            };
            let most = config.backoff_base.saturating_mul(2u32.saturating_pow(rounds)).min(cap);
            let wish = failure.retry_after.unwrap_or_default().min(config.retry_after_cap);
            jitter.up_to(most).max(wish)
        }
    };
    Verdict::Again { tries: tries_next, delay }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(class: FailureClass, sources: u32) -> (u32, Duration) {
        let (config, mut jitter) = (Config { max_attempts: 6, ..Config::default() }, Jitter(1));
        let (mut tries, mut total) = (Tries::FIRST, Duration::ZERO);
        let failure = Failure { class, retry_after: None };
        while let Verdict::Again { tries: next, delay } =
            judge(failure, tries, sources, Priority::Demand, &config, &mut jitter)
        {
            tries = next;
            total += delay;
        }
        (tries.attempt, total)
    }

    #[test]
    fn only_transient_failures_come_back_to_the_same_source() {
        let (attempts, total) = run(FailureClass::Transient, 1);
        assert_eq!(attempts, 6);
        assert!(total <= Duration::from_millis(50 + 100 + 200 + 400 + 800));
        assert!(total > Duration::ZERO);
        for class in [FailureClass::Denied, FailureClass::NotFound, FailureClass::Corrupt] {
            assert_eq!(run(class, 1), (1, Duration::ZERO));
            assert_eq!(run(class, 3), (3, Duration::ZERO));
        }
        assert_eq!(run(FailureClass::Fatal, 3).0, 1);
        assert_eq!(run(FailureClass::Transient, 9).0, 9, "each source is asked at least once");
    }

    #[test]
    fn a_source_that_lacks_the_blob_does_not_end_the_tries_of_another() {
        let (config, mut jitter) = (Config::default(), Jitter(1));
        let mut tries = Tries::FIRST;
        for attempt in 1..config.max_attempts {
            let class = if attempt % 2 == 1 { FailureClass::NotFound } else { FailureClass::Transient };
            let failure = Failure { class, retry_after: None };
            match judge(failure, tries, 2, Priority::Demand, &config, &mut jitter) {
                Verdict::Again { tries: next, .. } => tries = next,
                Verdict::GiveUp => panic!("gave up at attempt {attempt}"),
            }
        }
    }

    #[test]
    fn the_source_may_ask_for_patience_within_reason() {
        let (config, mut jitter) = (Config::default(), Jitter(1));
        let failure =
            Failure { class: FailureClass::Transient, retry_after: Some(Duration::from_secs(90_000)) };
        let verdict = judge(failure, Tries::FIRST, 1, Priority::Demand, &config, &mut jitter);
        let tries = Tries { attempt: 2, strikes: 0 };
        assert_eq!(verdict, Verdict::Again { tries, delay: config.retry_after_cap });
        let elsewhere = judge(failure, Tries::FIRST, 2, Priority::Demand, &config, &mut jitter);
        assert_eq!(elsewhere, Verdict::Again { tries, delay: Duration::ZERO });
    }
}
