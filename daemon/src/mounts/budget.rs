//! The cache's budget: what no mounted image needs goes, the least recently used first.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Failure, Mounts, State};
use crate::store::held::{Held, Item};

/// Room that is made ahead of need, so that what is written while something is evicted stays within the budget.
const ROOM: u64 = 256 << 20;
/// Growth after which it is looked again when nothing could be evicted before.
const STEP: u64 = 16 << 20;
/// Ranges are evicted by this much more than has to go, so that it is not looked again at once.
const SLACK: u64 = 64 << 20;
/// How often it is said that the budget cannot be kept.
const REMIND: Duration = Duration::from_secs(60);

/// What the budget came to.
#[derive(Debug, Default)]
pub struct CacheUse {
    used: AtomicU64,
    evicted: AtomicU64,
}

impl CacheUse {
    /// Disk space that the cache took when it was last looked at, and what was written since.
    pub fn used_bytes(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Disk space that was given back for the budget's sake.
    pub fn evicted_bytes(&self) -> u64 {
        self.evicted.load(Ordering::Relaxed)
    }
}

impl Mounts {
    /// Keeps the cache within its budget, and some of the file system free. `written` tells the bytes written to cache
    /// files so far; when it passes what is allowed, flights wait until it was looked what can go. Never ends.
    pub async fn keep_budget(self: Arc<Self>, written: impl Fn() -> u64) {
        let (mut base, mut base_written, mut next) = (0, written(), 0);
        let mut reminded: Option<Instant> = None;
        loop {
            let (now, short) = (written(), self.journal.was_short());
            let estimate = base + now.saturating_sub(base_written);
            self.cache.used.store(estimate, Ordering::Relaxed);
            let high = self.high(estimate);
            if self.journal.was_full()
                || short
                || estimate >= next
                || (estimate > high && now.saturating_sub(base_written) >= STEP)
            {
                base_written = now;
                let made = self.make_room(high).await;
                let used = made.as_ref().ok().copied();
                let allowed = allowance(self.config.cache.budget_mib << 20, high, used, short);
                // It fails when the daemon ends.
                let _ = self.driver.allow(now.saturating_add(allowed)).await;
                match made {
                    Ok(used) => {
                        base = used;
                        // What is over the mark now is needed; it is looked again when there is more of it.
                        next = if used <= high { high } else { used.saturating_add(STEP) };
                        if used > high && reminded.is_none_or(|when| when.elapsed() > REMIND) {
                            reminded = Some(Instant::now());
                            let (used, high) = (used >> 20, high >> 20);
                            tracing::warn!(
                                "mounted images need {used} MiB of the cache, of {high} MiB that it should take"
                            );
                        }
                    }
                    Err(failure) => {
                        tracing::error!("the cache's budget cannot be looked after: {failure}");
                        tokio::time::sleep(REMIND).await;
                    }
                }
            }
            self.journal.grown().await;
        }
    }

    /// What the cache should take at most now, when it takes `used`.
    fn high(&self, used: u64) -> u64 {
        let config = &self.config.cache;
        let space = rustix::fs::statvfs(&self.config.root).ok();
        let space = space.map(|space| {
            let bytes = |blocks: u64| blocks.saturating_mul(space.f_frsize);
            (bytes(space.f_blocks), bytes(space.f_bavail))
        });
        mark(config.budget_mib << 20, config.keep_free_percent, space, used)
    }

    /// Evicts until the cache takes no more than `high`, if it can; says what it takes.
    async fn make_room(&self, high: u64) -> Result<u64, Failure> {
        let held = self.store.held()?;
        let mut used: u64 = held.iter().map(|held| held.bytes).sum();
        for held in held {
            if used <= high {
                break;
            }
            // Not held throughout: mounts need not wait for all of it.
            let mut state = self.state.lock().await;
            self.release_unused(&mut state).await;
            if is_needed(&state, &held.item) {
                continue;
            }
            let over = used - high;
            let ranges = self.evict_ranges(&held, over, over.saturating_add(SLACK.min(high / 8)));
            let bytes = match ranges {
                Some(freed) => freed,
                None => self.store.evict(&held.item).map(|()| held.bytes)?,
            };
            if let Item::Blob(blob) = &held.item {
                self.set_complete(*blob, false);
            }
            drop(state);
            used = used.saturating_sub(bytes);
            self.cache.evicted.fetch_add(bytes, Ordering::Relaxed);
            let what = if ranges.is_some() { "evicted ranges of it" } else { "evicted" };
            tracing::info!(item = ?held.item, bytes, "{what}");
        }
        self.cache.used.store(used, Ordering::Relaxed);
        Ok(used)
    }

    /// Has a blob that is much larger than what has to go lose its end only; `wanted` bytes of it. `None` when it is not
    /// so large, or that did not give `over` back.
    fn evict_ranges(&self, held: &Held, over: u64, wanted: u64) -> Option<u64> {
        let Item::Blob(blob) = held.item else { return None };
        if held.bytes / 2 <= wanted {
            return None;
        }
        match self.store.evict_ranges(blob, wanted) {
            Ok(freed) => (freed >= over).then_some(freed),
            Err(error) => {
                tracing::warn!("{error}; all of it goes");
                None
            }
        }
    }
}

/// The mark that the cache is kept below: some way below its budget (0 for none), and so that a share of the file system
/// of (`all`, `free`) bytes stays free.
fn mark(budget: u64, keep_percent: u64, space: Option<(u64, u64)>, used: u64) -> u64 {
    let by_budget = if budget == 0 { u64::MAX } else { budget - ROOM.min(budget / 4) };
    let by_space = space
        .map_or(u64::MAX, |(all, free)| used.saturating_add(free).saturating_sub(all / 100 * keep_percent));
    by_budget.min(by_space)
}

/// How much may be written until it is looked again what can go: up to the budget. What mounted images need beyond it is
/// not refused, only looked at every [`STEP`] when flights wait for it (`short`).
fn allowance(budget: u64, high: u64, used: Option<u64>, short: bool) -> u64 {
    match used {
        Some(used) if budget > 0 => {
            let step = if short && used > high { STEP } else { 0 };
            budget.saturating_sub(used).max(step)
        }
        _ => u64::MAX,
    }
}

/// Whether a superblock, the data path or the kernel has it.
pub(super) fn is_needed(state: &State, item: &Item) -> bool {
    match item {
        Item::Blob(blob) => {
            state.uses(*blob)
                || state.known.contains(blob)
                || state.watched.contains(blob)
                || state.tracked.iter().any(|(_, tracked)| tracked == blob)
                || state.cookies.contains(&blob.hex())
        }
        Item::Bootstrap(name) => {
            state.cookies.contains(name)
                || state.attachments.iter().any(|attachment| attachment.record.bootstrap == *name)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_heeds_budget_and_free_space() {
        const GIB: u64 = 1 << 30;
        assert_eq!(mark(0, 0, None, 7), u64::MAX);
        assert_eq!(mark(64 << 20, 0, None, 7), 48 << 20);
        assert_eq!(mark(10 * GIB, 0, None, 7), 10 * GIB - ROOM);
        // 100 GiB, of which 20 are free: 15 more may be taken.
        let space = Some((100 * GIB, 20 * GIB));
        assert_eq!(mark(0, 5, space, 3 * GIB), 18 * GIB);
        assert_eq!(mark(10 * GIB, 5, space, 3 * GIB), 10 * GIB - ROOM);
        // 2 GiB free: 3 have to go.
        assert_eq!(mark(0, 5, Some((100 * GIB, 2 * GIB)), 30 * GIB), 27 * GIB);
        assert_eq!(mark(0, 5, Some((100 * GIB, 0)), GIB), 0);
    }

    #[test]
    fn no_more_is_allowed_than_the_budget_has_room_for() {
        const MIB: u64 = 1 << 20;
        let allowance = |used, short| allowance(64 * MIB, 48 * MIB, used, short);
        assert_eq!(allowance(Some(40 * MIB), false), 24 * MIB);
        assert_eq!(allowance(Some(40 * MIB), true), 24 * MIB);
        // Needed: up to the budget, then step by step.
        assert_eq!(allowance(Some(60 * MIB), false), 4 * MIB);
        assert_eq!(allowance(Some(60 * MIB), true), STEP);
        assert_eq!(allowance(Some(70 * MIB), false), 0);
        assert_eq!(allowance(Some(70 * MIB), true), STEP);
        // Not known how much there is, or no budget: anything.
        assert_eq!(allowance(None, true), u64::MAX);
        assert_eq!(super::allowance(0, u64::MAX, Some(MIB), true), u64::MAX);
    }
}
