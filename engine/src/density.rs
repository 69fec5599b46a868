//! How much around a miss is worth fetching: the largest aligned block of which most is there already.
//!
//! Reads of many files follow no order that a window could see, but they lie near each other. Of the aligned blocks of
//! doubled size around a miss, the largest is completed of which more than half is ready or on its way. So a scan in
//! any order doubles what it brings at each miss, and no more is brought than what was asked for in the same places.
//! Misses that jump about fill many a block to more than half by chance; unless some of the last ones were near, the
//! block has to be fuller than chance makes it.

use core::ops::Range;

use crate::chunk::Chunk;

/// Blocks this many times the largest window are looked at, to learn that all of an object is being read.
const FARTHER: u64 = 64;

/// Where the last misses of an object were.
#[derive(Debug, Default)]
pub(crate) struct Misses {
    places: [Option<u64>; 8],
    next: usize,
}

impl Misses {
    pub(crate) fn note(&mut self, at: u64) {
        self.places[self.next] = Some(at);
        self.next = (self.next + 1) % self.places.len();
    }

    /// Whether more than one was that near, so that it is hardly by chance.
    fn gather_within(&self, distance: u64, at: u64) -> bool {
        self.places.iter().flatten().filter(|place| place.abs_diff(at) <= distance).count() > 1
    }
}

/// Device bytes to complete around `at`; `taken` counts the chunks of a run that are ready or on their way.
pub(crate) fn around(
    map: &[Chunk],
    taken: impl Fn(&Range<u32>) -> u32,
    misses: &Misses,
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
        let all = block.end - block.start;
        // Three standard deviations of a block that is half full by chance.
        let luck = if misses.gather_within(size.min(most / 16), at) { 0 } else { all.isqrt() * 3 / 2 };
        if taken(&block) > (all / 2).saturating_add(luck) {
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

    /// Reads chunks in the order given, each one taken with what it brings; tells how many had to be asked for, and
    /// how many are there then.
    fn read(map: &[Chunk], order: impl Iterator<Item = usize>) -> (usize, usize) {
        let mut taken = alloc::vec![false; map.len()];
        let (mut misses, mut last) = (0, Misses::default());
        for position in order {
            if core::mem::replace(&mut taken[position], true) {
                continue;
            }
            misses += 1;
            let seen = taken.clone();
            let at = map[position].start;
            let more = around(map, |run| count(&seen, run), &last, at, 128 * KIB, 16 * MIB);
            last.note(at);
            for (at, chunk) in map.iter().enumerate() {
                taken[at] |= more.as_ref().is_some_and(|more| more.contains(&chunk.start));
            }
        }
        (misses, taken.iter().filter(|taken| **taken).count())
    }

    fn misses(map: &[Chunk], order: impl Iterator<Item = usize>) -> usize {
        read(map, order).0
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
        let (mut misses, at) = (Misses::default(), 77 * 64 * KIB);
        assert_eq!(around(&map, |run| u32::from(run.contains(&77)), &misses, at, 128 * KIB, 16 * MIB), None);
        misses.note(at - MIB / 2);
        misses.note(at - MIB);
        let near = |run: &Range<u32>| run.end.min(80).saturating_sub(run.start.max(64));
        assert_eq!(around(&map, near, &misses, at, 128 * KIB, 16 * MIB), Some(4 * MIB..5 * MIB));
    }

    #[test]
    fn chance_brings_little() {
        // Two fifths of the chunks, in an order that jumps about.
        let map = map(512, MIB);
        let mut random = 1_u64;
        let mut next = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(random >> 55).unwrap()
        };
        let order: Vec<usize> = (0..250).map(|_| next()).collect();
        let asked = order.iter().collect::<alloc::collections::BTreeSet<_>>().len();
        let brought = read(&map, order.into_iter()).1;
        assert!(brought <= asked + asked / 100, "{brought} chunks for {asked}");
    }

    #[test]
    fn odd_values_are_safe() {
        let map = map(4, 4096);
        for at in [0, u64::MAX, 1 << 63] {
            for size in [0, 1, u64::MAX, 1 << 63] {
                let _ = around(&map, |run| run.end - run.start, &Misses::default(), at, size, size);
            }
        }
    }
}
