//! Which reads wait for which chunks: an index of intervals.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Range;

use crate::ReadId;

/// Runs of chunks by start, in one level per order of magnitude of their length. A query looks, in each level that
/// is in use, only at runs that start at most one such length before it.
#[derive(Debug, Default)]
pub(crate) struct Waiters {
    runs: BTreeMap<(u32, u32, ReadId), u32>,
    per_level: [u32; 32],
}

impl Waiters {
    /// Adds a read that waits for a run that is not empty.
    pub(crate) fn add(&mut self, read: ReadId, chunks: &Range<u32>) {
        let level = level(chunks);
        if self.runs.insert((level, chunks.start, read), chunks.end).is_none() {
            self.count(level, true);
        }
    }

    /// Removes a read; `chunks` as it was added.
    pub(crate) fn remove(&mut self, read: ReadId, chunks: &Range<u32>) {
        let level = level(chunks);
        if self.runs.remove(&(level, chunks.start, read)).is_some() {
            self.count(level, false);
        }
    }

    fn count(&mut self, level: u32, up: bool) {
        if let Some(count) = self.per_level.get_mut(crate::chunk::index(level)) {
            *count = if up { *count + 1 } else { count.saturating_sub(1) };
        }
    }

    /// The reads that wait for a chunk of `chunks`, with their runs.
    pub(crate) fn overlapping(&self, chunks: &Range<u32>) -> impl Iterator<Item = (ReadId, Range<u32>)> + '_ {
        let Range { start: low, end: high } = *chunks;
        (0u32..).zip(&self.per_level).filter(move |(_, count)| **count > 0 && low < high).flat_map(
            move |(level, _)| {
                // No run of this level is as long as `2 << level`.
                let longest = 2u32.checked_shl(level).filter(|longest| *longest > 0).unwrap_or(u32::MAX);
                let from = (level, low.saturating_sub(longest), ReadId(0));
                self.runs
                    .range(from..(level, high, ReadId(0)))
                    .filter(move |(_, end)| **end > low)
                    .map(|(&(_, start, read), &end)| (read, start..end))
            },
        )
    }

    /// Whether any read waits for a chunk of `chunks`.
    pub(crate) fn any(&self, chunks: &Range<u32>) -> bool {
        self.overlapping(chunks).next().is_some()
    }

    /// Every read, with its run.
    pub(crate) fn all(&self) -> impl Iterator<Item = (ReadId, Range<u32>)> + '_ {
        self.runs.iter().map(|(&(_, start, read), &end)| (read, start..end))
    }

    /// The parts of `chunks` that some read waits for: disjoint, in order, touching ones joined.
    pub(crate) fn demanded(&self, chunks: &Range<u32>) -> Vec<Range<u32>> {
        let mut parts: Vec<Range<u32>> = self
            .overlapping(chunks)
            .map(|(_, run)| run.start.max(chunks.start)..run.end.min(chunks.end))
            .collect();
        parts.sort_unstable_by_key(|part| part.start);
        let mut joined: Vec<Range<u32>> = Vec::with_capacity(parts.len());
        for part in parts {
            match joined.last_mut() {
                Some(last) if part.start <= last.end => last.end = last.end.max(part.end),
                _ => joined.push(part),
            }
        }
        joined
    }

    pub(crate) fn len(&self) -> usize {
        self.runs.len()
    }
}

/// The order of magnitude of a run's length.
fn level(chunks: &Range<u32>) -> u32 {
    chunks.end.saturating_sub(chunks.start).max(1).ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_a_plain_list() {
        let mut waiters = Waiters::default();
        let mut list: Vec<(ReadId, Range<u32>)> = Vec::new();
        let mut x: u32 = 7;
        let mut next = |below: u32| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) % below
        };
        for i in 0..2000u64 {
            let start = next(1000);
            let longest = 1 << next(9);
            let run = start..start + 1 + next(longest);
            waiters.add(ReadId(i), &run);
            list.push((ReadId(i), run));
            if next(3) == 0 {
                let at = crate::chunk::index(next(u32::try_from(list.len()).unwrap()));
                let (read, run) = list.swap_remove(at);
                waiters.remove(read, &run);
            }
            let query = next(1100)..next(1100);
            let mut got: Vec<_> = waiters.overlapping(&query).map(|(read, _)| read).collect();
            got.sort_unstable();
            let mut want: Vec<_> = list
                .iter()
                .filter(|(_, run)| !query.is_empty() && run.start < query.end && query.start < run.end)
                .map(|(read, _)| *read)
                .collect();
            want.sort_unstable();
            assert_eq!(got, want);
        }
        let longest = 0..u32::MAX;
        waiters.add(ReadId(u64::MAX), &longest);
        assert!(waiters.any(&(u32::MAX - 1..u32::MAX)));
    }

    #[test]
    fn demanded_parts_are_joined_and_cut() {
        let mut waiters = Waiters::default();
        for (id, run) in [(1, 0..4), (2, 4..6), (3, 5..9), (4, 12..20)] {
            waiters.add(ReadId(id), &run);
        }
        assert_eq!(waiters.demanded(&(2..14)), [2..9, 12..14]);
        assert_eq!(waiters.demanded(&(9..12)), []);
    }
}
