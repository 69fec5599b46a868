//! How much around a miss is worth fetching: the largest aligned block of which most is there already.
//!
//! Reads of many files follow no order that a window could see, but they lie near each other. Of the aligned blocks of
//! doubled size around a miss, the largest is completed of which more than half is ready or on its way. So a scan in
//! any order doubles what it brings at each miss, and no more is brought than what was asked for in the same places.

use core::ops::Range;

use crate::chunk::Chunk;

/// Blocks this many times the largest window are looked at, to learn that all of an object is being read.
const FARTHER: u64 = 64;

/// Device bytes to complete around `at`; `taken` counts the chunks of a run that are ready or on their way.
pub(crate) fn around(
    map: &[Chunk],
    taken: impl Fn(&Range<u32>) -> u32,
    at: u64,
    least: u64,
    most: u64,
) -> Option<Range<u64>> {
    let first =
        |byte: u64| u32::try_from(map.partition_point(|chunk| chunk.start < byte)).unwrap_or(u32::MAX);
    let mut best = None;
    let mut size = least.max(1).checked_next_power_of_two()?;
    while let Some(larger) = size.checked_mul(2).filter(|size| *size <= most.saturating_mul(FARTHER)) {
        size = larger;
        let start = at / size * size;
        let end = start.saturating_add(size);
        let block = first(start)..first(end);
        if taken(&block) > (block.end - block.start) / 2 {
            let near = at.saturating_sub(most / 2)..at.saturating_add(most);
            best = Some(start.max(near.start)..end.min(near.end));
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::index;
    use alloc::vec::Vec;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;

    fn map(count: u64, each: u64) -> Vec<Chunk> {
        let len = u32::try_from(each).unwrap();
        (0..count).map(|i| Chunk { start: i * each, len, stored_start: i * each, stored_len: len }).collect()
    }

    fn count(taken: &[bool], run: &Range<u32>) -> u32 {
        let run = &taken[index(run.start)..index(run.end)];
        u32::try_from(run.iter().filter(|taken| **taken).count()).unwrap()
    }

    /// Reads chunks in the order given, each one taken with what it brings; tells how many had to be asked for.
    fn misses(map: &[Chunk], order: impl Iterator<Item = usize>) -> usize {
        let mut taken = alloc::vec![false; map.len()];
        let mut misses = 0;
        for position in order {
            if core::mem::replace(&mut taken[position], true) {
                continue;
            }
            misses += 1;
            let seen = taken.clone();
            let more = around(map, |run| count(&seen, run), map[position].start, 128 * KIB, 16 * MIB);
            for (at, chunk) in map.iter().enumerate() {
                taken[at] |= more.as_ref().is_some_and(|more| more.contains(&chunk.start));
            }
        }
        misses
    }

    #[test]
    fn any_order_over_everything_asks_seldom() {
        let map = map(2048, 64 * KIB);
        assert!(misses(&map, 0..2048) < 40, "{}", misses(&map, 0..2048));
        assert!(misses(&map, (0..2048).rev()) < 40);
        // By folders: forwards in each, the folders backwards.
        let folders = (0..64).rev().flat_map(|folder| folder * 32..(folder + 1) * 32);
        assert!(misses(&map, folders.clone()) < 60, "{}", misses(&map, folders));
        // Hashed: every place is as good as any other.
        assert!(misses(&map, (0..2048).map(|i| i * 1237 % 2048)) < 1300);
    }

    #[test]
    fn a_lonely_miss_brings_nothing() {
        let map = map(4096, 64 * KIB);
        assert_eq!(
            around(&map, |run| u32::from(run.contains(&77)), 77 * 64 * KIB, 128 * KIB, 16 * MIB),
            None
        );
        let near = |run: &Range<u32>| run.end.min(80).saturating_sub(run.start.max(64));
        let block = around(&map, near, 77 * 64 * KIB, 128 * KIB, 16 * MIB);
        assert_eq!(block, Some(4 * MIB..5 * MIB));
    }

    #[test]
    fn odd_values_are_safe() {
        let map = map(4, 4096);
        for at in [0, u64::MAX, 1 << 63] {
            for size in [0, 1, u64::MAX, 1 << 63] {
                let _ = around(&map, |run| run.end - run.start, at, size, size);
            }
        }
    }
}
