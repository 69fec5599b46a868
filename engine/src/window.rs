//! How far to fetch ahead of the reads of an object.
//!
//! The kernel tells of misses only on one attach mode, and of every read on the other. So a stream is judged by where
//! its next read lands, never by how much of a window was read.

use alloc::vec::Vec;
use core::ops::Range;

use crate::Config;

/// Streams remembered per object; further ones replace the one used longest ago.
const STREAMS: usize = 8;
/// A read this many bytes before a stream's window still belongs to it…
const BACK: u64 = 1 << 20;
/// …and one this many bytes after its end too.
const FORWARD: u64 = 16 << 20;

/// One sequence of reads that go forward.
#[derive(Clone, Debug)]
struct Stream {
    /// The window that was last asked for.
    start: u64,
    end: u64,
    size: u64,
    hits: u32,
    used: u64,
}

/// The streams of one object.
#[derive(Debug, Default)]
pub(crate) struct Windows {
    streams: Vec<Stream>,
    /// Halvings of the first window of new streams: grows while reads jump about, shrinks when they run on.
    halvings: u32,
    clock: u64,
}

/// What to do besides serving the read itself.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Advice {
    /// Device bytes worth fetching ahead.
    pub(crate) ahead: Option<Range<u64>>,
    /// Device bytes of a window that was left: what is only queued of it may be dropped.
    pub(crate) stale: Option<Range<u64>>,
}

impl Windows {
    /// Learns of a read of device bytes `read`.
    pub(crate) fn on_read(&mut self, read: &Range<u64>, config: &Config) -> Advice {
        if config.max_window == 0 {
            return Advice::default();
        }
        self.clock += 1;
        let floor = config.min_fetch.clamp(1, config.max_window);
        let matching = self.streams.iter_mut().filter(|stream| {
            let back = BACK.max(stream.end - stream.start);
            read.start >= stream.start.saturating_sub(back)
                && read.start <= stream.end.saturating_add(FORWARD)
        });
        let Some(stream) = matching.min_by_key(|stream| stream.end.abs_diff(read.start)) else {
            return self.open(read, config, floor);
        };
        stream.used = self.clock;
        if read.start > stream.end.saturating_add(stream.size) {
            // It went on, but over more than the window would have brought: a stride, not a scan.
            stream.size = (stream.size / 2).max(floor);
            stream.start = read.start;
            stream.end = read.end.max(read.start.saturating_add(stream.size));
            return Advice { ahead: Some(read.end..stream.end), stale: None };
        }
        if read.end < stream.start.saturating_add((stream.end.saturating_sub(stream.start)) / 2) {
            return Advice::default();
        }
        // Half of the window is consumed: ask for the next one.
        stream.hits = stream.hits.saturating_add(1);
        stream.size = stream.size.saturating_mul(2).min(config.max_window);
        stream.start = stream.end;
        stream.end = stream.end.max(read.end).saturating_add(stream.size);
        self.halvings = self.halvings.saturating_sub(1);
        Advice { ahead: Some(stream.start..stream.end), stale: None }
    }

    /// A window that was to end at `end` ends at `cut` instead; the next one goes on from there.
    pub(crate) fn cut(&mut self, end: u64, cut: u64) {
        for stream in self.streams.iter_mut().filter(|stream| stream.end == end && stream.start < cut) {
            stream.end = cut;
        }
    }

    /// Starts a stream at a read that belongs to none.
    fn open(&mut self, read: &Range<u64>, config: &Config, floor: u64) -> Advice {
        let last = self.streams.iter().max_by_key(|stream| stream.used);
        if last.is_some_and(|stream| stream.hits == 0) {
            self.halvings = (self.halvings + 1).min(63);
        }
        let first = config.first_window.clamp(floor, config.max_window);
        let size = (first >> self.halvings).max(floor);
        if size == floor {
            // Do not dig deeper than the floor, or a later scan would have to climb out again.
            self.halvings = self.halvings.min(first.div_ceil(floor).ilog2() + 1);
        }
        let mut stale = None;
        if self.streams.len() >= STREAMS
            && let Some(oldest) = (0..self.streams.len()).min_by_key(|at| self.streams[*at].used)
        {
            let old = self.streams.swap_remove(oldest);
            stale = Some(old.start..old.end);
        }
        let end = read.end.max(read.start.saturating_add(size));
        self.streams.push(Stream { start: read.start, end, size, hits: 0, used: self.clock });
        Advice { ahead: Some(read.end..end), stale }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;

    fn ahead(windows: &mut Windows, start: u64, len: u64) -> u64 {
        let advice = windows.on_read(&(start..start + len), &Config::default());
        advice.ahead.map_or(0, |range| range.end.saturating_sub(range.start))
    }

    #[test]
    fn a_scan_doubles_up_to_the_maximum() {
        let mut windows = Windows::default();
        let (mut at, mut asked) = (0, Vec::new());
        while at < 100 * MIB {
            match ahead(&mut windows, at, 128 * KIB) {
                0 => {}
                bytes => asked.push(bytes / KIB),
            }
            at += 128 * KIB;
        }
        assert_eq!(asked[..6], [896, 2048, 4096, 8192, 16384, 16384]);
        assert!(asked[6..].iter().all(|kib| *kib == 16384));
    }

    #[test]
    fn a_scan_seen_only_through_its_misses_doubles_too() {
        let mut windows = Windows::default();
        let (mut at, mut asked) = (0, Vec::new());
        for _ in 0..6 {
            let advice = windows.on_read(&(at..at + 4 * KIB), &Config::default());
            let range = advice.ahead.unwrap();
            asked.push((range.end - at) / MIB);
            at = range.end;
        }
        assert_eq!(asked, [1, 2, 4, 8, 16, 16]);
    }

    #[test]
    fn random_reads_fall_to_the_floor_and_a_scan_climbs_out() {
        let mut windows = Windows::default();
        let mut last = 0;
        for i in 1..40u64 {
            last = ahead(&mut windows, (i * 7919 % 1000) * 64 * MIB, 4 * KIB);
        }
        assert_eq!(last, 124 * KIB);
        let base = 1 << 50;
        assert_eq!(ahead(&mut windows, base, 128 * KIB), 0);
        assert_eq!(ahead(&mut windows, base + 128 * KIB, 128 * KIB), 256 * KIB + 128 * KIB);
    }

    #[test]
    fn strides_beyond_the_window_shrink_it() {
        let mut windows = Windows::default();
        let asked: Vec<u64> = (0..6).map(|i| ahead(&mut windows, i * 8 * MIB, 4 * KIB) / KIB).collect();
        assert_eq!(asked, [1020, 508, 252, 124, 124, 124]);
    }

    #[test]
    fn two_scans_at_once_keep_their_windows() {
        let mut windows = Windows::default();
        let mut best = [0, 0];
        for i in 0..800 {
            for (side, base) in [0, 1 << 40].into_iter().enumerate() {
                best[side] = best[side].max(ahead(&mut windows, base + i * 128 * KIB, 128 * KIB));
            }
        }
        assert_eq!(best, [16 * MIB, 16 * MIB]);
    }

    #[test]
    fn off_is_off_and_odd_offsets_are_safe() {
        let mut windows = Windows::default();
        let off = Config { max_window: 0, ..Config::default() };
        assert_eq!(windows.on_read(&(0..100), &off), Advice::default());
        for start in [0, u64::MAX, u64::MAX - 5, 1 << 63, 0] {
            windows.on_read(&(start..u64::MAX), &Config::default());
        }
    }
}
