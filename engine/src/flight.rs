//! One fetch in the air and its way to the disk.

use alloc::vec::Vec;
use core::ops::Range;

use crate::chunk::{Chunk, index};
use crate::plan::Priority;
use crate::retry::Tries;
use crate::{ObjectId, ReadySet, span};

#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) object: ObjectId,
    pub(crate) chunks: Range<u32>,
    /// Device bytes of its buffer.
    pub(crate) span: u64,
    pub(crate) priority: Priority,
    pub(crate) tries: Tries,
    /// Chunks verified, counted from the flight's first.
    verified: ReadySet,
    /// Verified chunks not handed to a write yet: runs contiguous on the device, in order.
    runs: Vec<Range<u32>>,
    /// Writes ordered and not back.
    pub(crate) writes: u32,
    pub(crate) ended: bool,
    pub(crate) cancelled: bool,
    /// Cancelled because a reader could not wait for its turn: what it has not brought is still wanted.
    pub(crate) overtaken: bool,
    /// Its object is gone: nothing of it counts any more but its buffer.
    pub(crate) orphan: bool,
}

impl Flight {
    pub(crate) fn new(
        object: ObjectId,
        chunks: Range<u32>,
        map: &[Chunk],
        priority: Priority,
        tries: Tries,
    ) -> Self {
        Self {
            object,
            span: span(map, &chunks),
            verified: ReadySet::new(chunks.end - chunks.start),
            runs: Vec::new(),
            chunks,
            priority,
            tries,
            writes: 0,
            ended: false,
            cancelled: false,
            overtaken: false,
            orphan: false,
        }
    }

    /// Notes a verified chunk. Returns the run it now belongs to; `None` when it is not of this flight or not new.
    pub(crate) fn verify(&mut self, chunk: u32, map: &[Chunk]) -> Option<Range<u32>> {
        if !self.chunks.contains(&chunk) || self.verified.insert(self.relative(&(chunk..chunk + 1))) == 0 {
            return None;
        }
        let mut at = self.runs.partition_point(|run| run.end <= chunk);
        let mut run = chunk..chunk + 1;
        if self.runs.get(at).is_some_and(|next| next.start == run.end && adjoin(map, run.end)) {
            run.end = self.runs.remove(at).end;
        }
        if let Some(before) = at.checked_sub(1)
            && self.runs.get(before).is_some_and(|last| last.end == run.start && adjoin(map, run.start))
        {
            run.start = self.runs.remove(before).start;
            at = before;
        }
        self.runs.insert(at, run.clone());
        Some(run)
    }

    /// Whether every chunk of `chunks` that is of this flight has been verified.
    pub(crate) fn has_verified(&self, chunks: &Range<u32>) -> bool {
        let part = self.relative(chunks);
        self.verified.next_missing(part).is_none()
    }

    /// Whether any chunk has been verified.
    pub(crate) fn progressed(&self) -> bool {
        self.verified.count() > 0
    }

    /// The first chunk that has not been verified.
    pub(crate) fn position(&self) -> u32 {
        let missing = self.verified.next_missing(0..self.verified.len()).unwrap_or(self.verified.len());
        self.chunks.start.saturating_add(missing)
    }

    /// Takes the runs that touch `chunks`, to be written.
    pub(crate) fn take_runs(&mut self, chunks: &Range<u32>) -> Vec<Range<u32>> {
        let low = self.runs.partition_point(|run| run.end <= chunks.start);
        let high = self.runs.partition_point(|run| run.start < chunks.end).max(low);
        self.runs.drain(low..high).collect()
    }

    /// The runs of chunks not verified.
    pub(crate) fn unverified(&self) -> Vec<Range<u32>> {
        let base = self.chunks.start;
        self.verified
            .missing_runs(0..self.verified.len())
            .map(|run| base + run.start..base + run.end)
            .collect()
    }

    fn relative(&self, chunks: &Range<u32>) -> Range<u32> {
        let base = self.chunks.start;
        chunks.start.saturating_sub(base)..chunks.end.min(self.chunks.end).saturating_sub(base)
    }
}

/// Whether chunk `at` starts on the device where the one before it ends, padding included.
pub(crate) fn adjoin(map: &[Chunk], at: u32) -> bool {
    let before = at.checked_sub(1).and_then(|before| map.get(index(before)));
    matches!((before, map.get(index(at))), (Some(last), Some(next)) if last.padded_end() == next.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_grow_join_and_stop_at_device_holes() {
        let map: Vec<Chunk> = [0, 4096, 8192, 20480, 24576]
            .into_iter()
            .map(|start| Chunk { start, len: 4000, stored_start: start, stored_len: 4000 })
            .collect();
        let mut flight = Flight::new(ObjectId(1), 0..5, &map, Priority::Demand, Tries::FIRST);
        assert_eq!(flight.span, 28672);
        assert_eq!(flight.verify(0, &map), Some(0..1));
        assert_eq!(flight.verify(2, &map), Some(2..3));
        assert!(!flight.has_verified(&(0..2)));
        assert_eq!(flight.verify(1, &map), Some(0..3));
        assert_eq!(flight.verify(1, &map), None);
        assert_eq!(flight.verify(5, &map), None);
        assert_eq!(flight.verify(4, &map), Some(4..5));
        assert_eq!(flight.verify(3, &map), Some(3..5));
        assert!(flight.has_verified(&(0..9)));
        assert_eq!(flight.take_runs(&(4..9)), core::slice::from_ref(&(3..5)));
        assert_eq!(flight.take_runs(&(0..9)), core::slice::from_ref(&(0..3)));
        assert_eq!(flight.unverified(), []);
    }
}
