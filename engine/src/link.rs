//! What a request to an object's source costs, learned from requests made.

use core::time::Duration;

use crate::Config;

/// Least and most that a measured gap may be.
const GAP: core::ops::RangeInclusive<u64> = (32 << 10)..=(2 << 20);

/// Moving averages (weight 1/8 for the newest).
#[derive(Debug, Default)]
pub(crate) struct Link {
    measured: Option<(u64, u64)>,
}

impl Link {
    pub(crate) fn measure(&mut self, ttfb: Duration, bandwidth: u64) {
        let ttfb = u64::try_from(ttfb.as_micros()).unwrap_or(u64::MAX);
        self.measured = Some(match self.measured {
            None => (ttfb, bandwidth),
            Some((old_ttfb, old_bandwidth)) => (average(old_ttfb, ttfb), average(old_bandwidth, bandwidth)),
        });
    }

    /// The hole, in bytes, that costs as much to read as a new request.
    pub(crate) fn gap(&self, config: &Config) -> u64 {
        match self.measured {
            Some((ttfb, bandwidth)) if config.gap > 0 => {
                let bytes = u128::from(ttfb) * u128::from(bandwidth) / 1_000_000;
                u64::try_from(bytes).unwrap_or(u64::MAX).clamp(*GAP.start(), *GAP.end())
            }
            _ => config.gap,
        }
    }
}

fn average(old: u64, new: u64) -> u64 {
    old - old / 8 + new / 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_far_source_makes_larger_holes_worth_reading() {
        let config = Config::default();
        let mut link = Link::default();
        assert_eq!(link.gap(&config), config.gap);
        link.measure(Duration::from_millis(20), 12_500_000);
        assert_eq!(link.gap(&config), 250_000);
        for _ in 0..100 {
            link.measure(Duration::from_micros(100), 1_000_000_000);
        }
        assert!(link.gap(&config) < 250_000);
        link.measure(Duration::MAX, u64::MAX);
        assert_eq!(link.gap(&config), 2 << 20);
        assert_eq!(link.gap(&Config { gap: 0, ..config }), 0);
    }
}
