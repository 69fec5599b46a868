//! All that is known of one object.

use alloc::vec::Vec;
use core::ops::Range;

use crate::chunk::{Chunk, index, lookup};
use crate::density::Misses;
use crate::link::Link;
use crate::plan::Plan;
use crate::waiters::Waiters;
use crate::window::Windows;
use crate::{MapError, ReadId, ReadySet, check_map};

#[derive(Debug)]
pub(crate) struct Object {
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) ready: ReadySet,
    pub(crate) plan: Plan,
    pub(crate) waiters: Waiters,
    pub(crate) windows: Windows,
    pub(crate) misses: Misses,
    pub(crate) link: Link,
    pub(crate) sources: u32,
    /// Stored bytes that they move at once, or 0.
    pub(crate) piece: u64,
    /// Exactly the chunks asked for are fetched.
    pub(crate) exact: bool,
    /// Flights that are not released yet.
    pub(crate) flights: u32,
    /// Those of them that are not of demand.
    pub(crate) chained: u32,
    /// Whether it stands in the line of each priority.
    pub(crate) in_line: [bool; 4],
    pub(crate) growth: Option<Growth>,
}

/// A larger chunk list that takes effect when the last flight of the old one is released.
#[derive(Debug)]
pub(crate) struct Growth {
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) ready: ReadySet,
    /// Reads that came meanwhile; some may be gone by now.
    pub(crate) parked: Vec<ReadId>,
    pub(crate) prefetches: Vec<(Range<u64>, bool)>,
}

/// A look at one object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ObjectStatus {
    /// Chunks it has.
    pub chunks: u32,
    /// Chunks on disk and verified.
    pub ready: u32,
    /// Reads that wait.
    pub waiting: u64,
    /// Flights between `Fetch` and `Release`.
    pub flights: u32,
}

impl Object {
    /// Takes a checked chunk list.
    pub(crate) fn new(chunks: Vec<Chunk>, ready: ReadySet) -> Self {
        Self {
            chunks,
            ready,
            plan: Plan::default(),
            waiters: Waiters::default(),
            windows: Windows::default(),
            misses: Misses::default(),
            link: Link::default(),
            sources: 1,
            piece: 0,
            exact: false,
            flights: 0,
            chained: 0,
            in_line: [false; 4],
            growth: None,
        }
    }

    /// The chunks that hold a byte of a device range.
    pub(crate) fn chunks_of(&self, bytes: &Range<u64>) -> Range<u32> {
        lookup(&self.chunks, bytes)
    }

    /// How much of `chunks` to fetch ahead so as to end at a piece of the source: a piece that is begun moves whole.
    pub(crate) fn within_pieces(&self, chunks: &Range<u32>) -> Range<u32> {
        let run = self.chunks.get(index(chunks.start)..index(chunks.end)).unwrap_or(&[]);
        let (true, Some(last)) = (chunks.end < self.ready.len(), run.last()) else { return chunks.clone() };
        let border =
            last.stored_end().checked_next_multiple_of(self.piece).filter(|next| *next > last.stored_end());
        let Some(border) = border.and_then(|next| next.checked_sub(self.piece)) else {
            return chunks.clone();
        };
        let behind = run.iter().rev().take_while(|chunk| chunk.stored_end() > border).count();
        match u32::try_from(behind).ok().and_then(|behind| chunks.end.checked_sub(behind)) {
            Some(end) if end > chunks.start => chunks.start..end,
            _ => chunks.clone(),
        }
    }

    /// Whether at least half of a chunk lies before the end of a device range: windows end at the nearest chunk.
    pub(crate) fn mostly_within(&self, chunk: u32, bytes: &Range<u64>) -> bool {
        self.chunks.get(index(chunk)).is_some_and(|chunk| chunk.start + u64::from(chunk.len) / 2 <= bytes.end)
    }

    pub(crate) fn status(&self) -> ObjectStatus {
        ObjectStatus {
            chunks: self.ready.len(),
            ready: self.ready.count(),
            waiting: u64::try_from(self.waiters.len()).unwrap_or(u64::MAX),
            flights: self.flights,
        }
    }
}

/// Checks a chunk list and its ready set.
pub(crate) fn check(chunks: &[Chunk], ready: &ReadySet) -> Result<(), MapError> {
    check_map(chunks)?;
    let count = u32::try_from(chunks.len()).map_err(|_| MapError::TooMany)?;
    if ready.len() == count {
        Ok(())
    } else {
        Err(MapError::ReadyLength { chunks: count, ready: ready.len() })
    }
}

/// Checks that `new` holds every chunk of `old`, and puts those ready in the old list into `ready` of the new one.
pub(crate) fn carry_over(
    old: &[Chunk],
    old_ready: &ReadySet,
    new: &[Chunk],
    ready: &mut ReadySet,
) -> Result<(), MapError> {
    let mut fresh = (0u32..).zip(new);
    for (at, chunk) in (0u32..).zip(old) {
        let found = fresh.by_ref().find(|(_, other)| other.start >= chunk.start);
        let Some((to, _)) = found.filter(|(_, other)| *other == chunk) else {
            return Err(MapError::Lost { start: chunk.start });
        };
        if old_ready.contains(at) {
            ready.insert(to..to + 1);
        }
    }
    Ok(())
}

/// Chunks that follow `chunks` until the whole is `least` device bytes long, for a fetch that would be too small.
pub(crate) fn top_up(map: &[Chunk], chunks: &Range<u32>, least: u64, most: u32) -> Range<u32> {
    let Some(base) = map.get(index(chunks.start)).map(|chunk| chunk.start) else {
        return chunks.end..chunks.end;
    };
    let mut end = chunks.end;
    let mut reach = end.checked_sub(1).and_then(|last| map.get(index(last))).map_or(0, Chunk::padded_end);
    while end < most && reach.saturating_sub(base) < least {
        let Some(next) = map.get(index(end)) else { break };
        if next.padded_end() - base > least {
            break;
        }
        reach = next.padded_end();
        end += 1;
    }
    chunks.end..end
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn chunk(start: u64) -> Chunk {
        Chunk { start, len: 4096, stored_start: start, stored_len: 4096 }
    }

    #[test]
    fn a_larger_list_keeps_the_chunks_of_the_old() {
        let old = vec![chunk(0), chunk(8192)];
        let new = vec![chunk(0), chunk(4096), chunk(8192), chunk(12288)];
        let mut old_ready = ReadySet::new(2);
        old_ready.insert(1..2);
        let mut ready = ReadySet::new(4);
        assert_eq!(carry_over(&old, &old_ready, &new, &mut ready), Ok(()));
        assert!(ready.contains(2) && ready.count() == 1);
        assert_eq!(
            carry_over(&new, &ReadySet::new(4), &old, &mut ready),
            Err(MapError::Lost { start: 4096 })
        );
        let moved = vec![chunk(0), Chunk { stored_start: 1, ..chunk(8192) }];
        assert_eq!(
            carry_over(&old, &old_ready, &moved, &mut ReadySet::new(2)),
            Err(MapError::Lost { start: 8192 })
        );
    }

    #[test]
    fn a_window_ends_at_a_piece_of_the_source() {
        let chunks: Vec<Chunk> = (0..64).map(|i| chunk(i * 4096)).collect();
        let mut object = Object::new(chunks, ReadySet::new(64));
        assert_eq!(object.within_pieces(&(3..21)), 3..21);
        object.piece = 16 * 4096;
        assert_eq!(object.within_pieces(&(3..21)), 3..16);
        assert_eq!(object.within_pieces(&(3..16)), 3..16);
        assert_eq!(object.within_pieces(&(3..14)), 3..14, "no border within");
        assert_eq!(object.within_pieces(&(16..21)), 16..21, "from a border into its piece");
        assert_eq!(object.within_pieces(&(3..64)), 3..64);
        // A chunk over the border belongs to the next piece, too.
        object.piece = 16 * 4096 + 1000;
        assert_eq!(object.within_pieces(&(3..21)), 3..16);
        // The end of the blob is one.
        object.piece = 60 * 4096;
        assert_eq!(object.within_pieces(&(3..64)), 3..64);
        assert_eq!(object.within_pieces(&(9..9)), 9..9);
        for odd in [1, u64::MAX, u64::MAX - 1] {
            object.piece = odd;
            assert!(!object.within_pieces(&(3..21)).is_empty());
        }
    }

    #[test]
    fn small_fetches_are_topped_up_within_the_floor() {
        let map: Vec<Chunk> = (0..64).map(|i| chunk(i * 4096)).collect();
        assert_eq!(top_up(&map, &(4..5), 131_072, 64), 5..36);
        assert_eq!(top_up(&map, &(60..61), 131_072, 64), 61..64);
        assert_eq!(top_up(&map, &(0..40), 131_072, 64), 40..40);
        assert_eq!(top_up(&map, &(4..5), 131_072, 7), 5..7);
    }
}
