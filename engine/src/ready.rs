//! A set of chunk numbers, one bit each.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use crate::chunk::{index, narrow};

/// Which chunks of an object are on disk and verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadySet {
    words: Vec<u64>,
    len: u32,
    count: u32,
}

impl ReadySet {
    /// A set over `len` chunks with none in it.
    #[must_use]
    pub fn new(len: u32) -> Self {
        Self { words: vec![0; index(len.div_ceil(64))], len, count: 0 }
    }

    /// A set over `len` chunks with all in it.
    #[must_use]
    pub fn full(len: u32) -> Self {
        let mut set = Self::new(len);
        set.insert(0..len);
        set
    }

    /// How many chunks the set is over.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether the set is over no chunk at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many chunks are in the set.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Whether every chunk is in the set.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.count == self.len
    }

    /// Whether `chunk` is in the set; false outside of it.
    #[must_use]
    pub fn contains(&self, chunk: u32) -> bool {
        chunk < self.len
            && self.words.get(index(chunk / 64)).is_some_and(|word| word >> (chunk % 64) & 1 == 1)
    }

    /// Puts a run in, cut at the end of the set; returns how many were not in it before.
    pub fn insert(&mut self, chunks: Range<u32>) -> u32 {
        let mut added = 0;
        for (position, mask) in masks(chunks.start..chunks.end.min(self.len)) {
            if let Some(word) = self.words.get_mut(position) {
                added += (mask & !*word).count_ones();
                *word |= mask;
            }
        }
        self.count += added;
        added
    }

    /// How many of a run are not in the set; what lies outside of it does not count.
    #[must_use]
    pub fn missing(&self, chunks: Range<u32>) -> u32 {
        masks(chunks.start..chunks.end.min(self.len))
            .map(|(position, mask)| (mask & !self.words.get(position).copied().unwrap_or(0)).count_ones())
            .sum()
    }

    /// The first chunk of a run that is not in the set.
    #[must_use]
    pub fn next_missing(&self, chunks: Range<u32>) -> Option<u32> {
        self.find(chunks, |word| !word)
    }

    /// The first chunk of a run that is in the set.
    #[must_use]
    pub fn next_present(&self, chunks: Range<u32>) -> Option<u32> {
        self.find(chunks, |word| word)
    }

    /// The runs of missing chunks inside a run, in order.
    pub(crate) fn missing_runs(&self, chunks: Range<u32>) -> impl Iterator<Item = Range<u32>> + '_ {
        let end = chunks.end.min(self.len);
        let mut at = chunks.start;
        core::iter::from_fn(move || {
            let start = self.next_missing(at..end)?;
            at = self.next_present(start..end).unwrap_or(end);
            Some(start..at)
        })
    }

    fn find(&self, chunks: Range<u32>, pick: impl Fn(u64) -> u64) -> Option<u32> {
        masks(chunks.start..chunks.end.min(self.len)).find_map(|(position, mask)| {
            let hit = pick(self.words.get(position).copied().unwrap_or(0)) & mask;
            (hit != 0).then(|| narrow(position) * 64 + hit.trailing_zeros())
        })
    }
}

/// The words that a run of bits touches, each with the mask of the run in it.
fn masks(bits: Range<u32>) -> impl Iterator<Item = (usize, u64)> {
    let words = if bits.is_empty() { 0..0 } else { bits.start / 64..(bits.end - 1) / 64 + 1 };
    words.map(move |word| {
        let mut mask = u64::MAX;
        if word == bits.start / 64 {
            mask &= u64::MAX << (bits.start % 64);
        }
        if word == (bits.end - 1) / 64 {
            mask &= u64::MAX >> (63 - (bits.end - 1) % 64);
        }
        (index(word), mask)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cross_words() {
        let mut set = ReadySet::new(200);
        assert_eq!(set.insert(60..130), 70);
        assert_eq!(set.insert(100..140), 10);
        assert_eq!(set.insert(190..500), 10);
        assert_eq!(set.count(), 90);
        assert_eq!(set.missing(0..200), 110);
        assert_eq!(set.next_missing(60..200), Some(140));
        assert_eq!(set.next_present(140..200), Some(190));
        assert_eq!(set.next_missing(190..u32::MAX), None);
        assert_eq!(set.missing_runs(0..u32::MAX).collect::<Vec<_>>(), [0..60, 140..190]);
        assert!(set.contains(60) && !set.contains(59) && !set.contains(200));
        assert!(ReadySet::full(129).is_full());
        assert!(ReadySet::new(0).is_full());
    }
}
