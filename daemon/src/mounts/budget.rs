//! The cache's budget: what no mounted image needs goes, the least recently used first.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Failure, Mounts, State};
use crate::store::held::Item;

/// Room that is made ahead of need, so that what is written while something is evicted stays within the budget.
const ROOM: u64 = 256 << 20;
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
    /// Keeps the cache within its budget. `written` tells the bytes written to cache files so far. Never ends.
    pub async fn keep_budget(self: Arc<Self>, written: impl Fn() -> u64) {
        let budget = self.config.cache.budget_mib << 20;
        let high = if budget == 0 { u64::MAX } else { budget - ROOM.min(budget / 4) };
        let (mut base, mut base_written, mut next) = (0, written(), 0);
        let mut reminded: Option<Instant> = None;
        loop {
            let now = written();
            let estimate = base + now.saturating_sub(base_written);
            self.cache.used.store(estimate, Ordering::Relaxed);
            if estimate >= next {
                base_written = now;
                match self.make_room(high).await {
                    Ok(used) => {
                        base = used;
                        // What is over the mark now is needed; it is looked again when there is more of it.
                        next = used.max(high).saturating_add(ROOM.min(budget / 16).max(1));
                        if used <= high {
                            next = high;
                        } else if reminded.is_none_or(|when| when.elapsed() > REMIND) {
                            reminded = Some(Instant::now());
                            let mib = used >> 20;
                            tracing::warn!(
                                "the cache takes {mib} MiB that mounted images need; `cache.budget_mib` is {}",
                                budget >> 20
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
            self.store.evict(&held.item)?;
            if let Item::Blob(blob) = &held.item {
                self.set_complete(*blob, false);
            }
            drop(state);
            used = used.saturating_sub(held.bytes);
            self.cache.evicted.fetch_add(held.bytes, Ordering::Relaxed);
            tracing::info!(item = ?held.item, bytes = held.bytes, "evicted");
        }
        self.cache.used.store(used, Ordering::Relaxed);
        Ok(used)
    }
}

/// Whether a superblock, the data path or the kernel has it.
fn is_needed(state: &State, item: &Item) -> bool {
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
