//! What is to become of an object's missing chunks: a map of disjoint runs, each queued, held back, or in the air.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use core::ops::Range;

use crate::chunk::{Chunk, index};
use crate::retry::Tries;
use crate::{FlightId, ReadySet, Time};

/// Who wants a run. Lower values go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Priority {
    /// A read waits.
    Demand,
    /// The window of a stream of reads.
    Ahead,
    /// The shell asked for it.
    Prefetch,
    /// The shell asked for it when there is nothing else to do.
    Fill,
}

impl Priority {
    pub(crate) const ALL: [Self; 4] = [Self::Demand, Self::Ahead, Self::Prefetch, Self::Fill];

    pub(crate) fn rank(self) -> usize {
        match self {
            Self::Demand => 0,
            Self::Ahead => 1,
            Self::Prefetch => 2,
            Self::Fill => 3,
        }
    }
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Waits for its turn.
    Queued,
    /// Waits for its backoff to end.
    Held { until: Time },
    /// Belongs to a flight, until its chunks are ready or the flight has given them back.
    Flying(FlightId),
}

/// One run of missing chunks; its start is its key in the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) end: u32,
    pub(crate) priority: Priority,
    pub(crate) tries: Tries,
    /// Order of arrival, for turns among queued runs.
    pub(crate) seq: u64,
    pub(crate) stage: Stage,
}

impl Segment {
    /// Whether it may share a flight with others of its kind: a run that failed flies alone.
    fn mixes(&self) -> bool {
        self.stage == Stage::Queued && self.tries == Tries::FIRST
    }
}

/// The next flight of an object, not yet taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) chunks: Range<u32>,
    pub(crate) tries: Tries,
}

/// How large a flight may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Device bytes, unless a single chunk is larger.
    pub(crate) span: u64,
    /// Hole between two chunks, in stored and in device bytes.
    pub(crate) gap: u64,
}

/// What [`Plan::want`] changed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wanted {
    /// Runs queued anew.
    pub(crate) queued: u32,
    /// Runs whose priority rose.
    pub(crate) promoted: u32,
}

#[derive(Debug, Default)]
pub(crate) struct Plan {
    segments: BTreeMap<u32, Segment>,
    queues: [BTreeSet<(u64, u32)>; 4],
    seq: u64,
}

impl Plan {
    /// The runs that touch `chunks`, with their starts.
    pub(crate) fn overlapping(&self, chunks: &Range<u32>) -> impl Iterator<Item = (u32, Segment)> + '_ {
        let before = self.segments.range(..chunks.start).next_back();
        let inside = self.segments.range(chunks.start..chunks.end.max(chunks.start));
        let low = chunks.start;
        before.filter(move |(_, segment)| segment.end > low).into_iter().chain(inside).map(|(s, g)| (*s, *g))
    }

    /// Wants a run of missing chunks: queues what is in nobody's hands, raises what is queued with less priority,
    /// and leaves the rest to those who have it.
    pub(crate) fn want(&mut self, chunks: &Range<u32>, priority: Priority) -> Wanted {
        let mut wanted = Wanted::default();
        let mut at = chunks.start;
        let present: Vec<(u32, Segment)> = self.overlapping(chunks).collect();
        for (start, segment) in present {
            if at < start {
                self.queue(at..start, priority, Tries::FIRST);
                wanted.queued += 1;
            }
            let part = start.max(chunks.start)..segment.end.min(chunks.end);
            at = part.end;
            if segment.priority > priority && !matches!(segment.stage, Stage::Flying(_)) {
                // A queue may have joined this run to its neighbour meanwhile, but its chunks are still queued.
                self.clear(&part);
                self.queue(part, priority, segment.tries);
                wanted.promoted += 1;
            }
        }
        if at < chunks.end {
            self.queue(at..chunks.end, priority, Tries::FIRST);
            wanted.queued += 1;
        }
        wanted
    }

    /// Queues a run that is in nobody's hands, joined with queued neighbours of its kind.
    pub(crate) fn queue(&mut self, chunks: Range<u32>, priority: Priority, tries: Tries) {
        if chunks.is_empty() {
            return;
        }
        let (mut chunks, mut seq) = (chunks, self.seq);
        self.seq += 1;
        if tries == Tries::FIRST {
            let alike = |other: &Segment| other.mixes() && other.priority == priority;
            let before = self.segments.range(..chunks.start).next_back().map(|(s, g)| (*s, *g));
            if let Some((start, segment)) = before.filter(|(_, g)| g.end == chunks.start && alike(g)) {
                self.remove(start);
                (chunks.start, seq) = (start, seq.min(segment.seq));
            }
            if let Some(segment) = self.segments.get(&chunks.end).copied().filter(alike) {
                self.remove(chunks.end);
                (chunks.end, seq) = (segment.end, seq.min(segment.seq));
            }
        }
        self.insert(chunks.start, Segment { end: chunks.end, priority, tries, seq, stage: Stage::Queued });
    }

    /// Holds a run that is in nobody's hands back until its backoff ends.
    pub(crate) fn hold(&mut self, chunks: &Range<u32>, priority: Priority, tries: Tries, until: Time) {
        let stage = Stage::Held { until };
        self.insert(chunks.start, Segment { end: chunks.end, priority, tries, seq: 0, stage });
    }

    /// Queues the held run at `start` if its backoff ended at `until`; false when it is no longer there.
    pub(crate) fn unhold(&mut self, start: u32, until: Time) -> bool {
        match self.segments.get(&start) {
            Some(segment) if segment.stage == (Stage::Held { until }) => {
                let Segment { end, priority, tries, .. } = *segment;
                self.remove(start);
                self.queue(start..end, priority, tries);
                true
            }
            _ => false,
        }
    }

    /// Takes `chunks` out of every run that has some of them.
    pub(crate) fn clear(&mut self, chunks: &Range<u32>) {
        let present: Vec<(u32, Segment)> = self.overlapping(chunks).collect();
        for (start, segment) in present {
            self.remove(start);
            if start < chunks.start {
                self.insert(start, Segment { end: chunks.start, ..segment });
            }
            if chunks.end < segment.end {
                self.insert(chunks.end, segment);
            }
        }
    }

    /// Drops the queued runs of one priority inside `chunks`.
    pub(crate) fn drop_queued(&mut self, chunks: &Range<u32>, priority: Priority) {
        let queued: Vec<u32> = self
            .overlapping(chunks)
            .filter(|(_, segment)| segment.stage == Stage::Queued && segment.priority == priority)
            .filter(|(start, segment)| *start >= chunks.start && segment.end <= chunks.end)
            .map(|(start, _)| start)
            .collect();
        for start in queued {
            self.remove(start);
        }
    }

    /// Whether a run of this priority waits for its turn.
    pub(crate) fn has_queued(&self, priority: Priority) -> bool {
        self.queues.get(priority.rank()).is_some_and(|queue| !queue.is_empty())
    }

    /// Gives `chunks` to a flight.
    pub(crate) fn fly(&mut self, chunks: &Range<u32>, priority: Priority, tries: Tries, flight: FlightId) {
        self.clear(chunks);
        let stage = Stage::Flying(flight);
        self.insert(chunks.start, Segment { end: chunks.end, priority, tries, seq: 0, stage });
    }

    /// Takes a run out whole.
    pub(crate) fn remove(&mut self, start: u32) -> Option<Segment> {
        let segment = self.segments.remove(&start)?;
        if let Some(queue) = self.queues.get_mut(segment.priority.rank()) {
            queue.remove(&(segment.seq, start));
        }
        Some(segment)
    }

    fn insert(&mut self, start: u32, segment: Segment) {
        if segment.stage == Stage::Queued
            && let Some(queue) = self.queues.get_mut(segment.priority.rank())
        {
            queue.insert((segment.seq, start));
        }
        self.segments.insert(start, segment);
    }

    /// The next flight of this priority: the head of its oldest run, as long as the limits allow, and further runs
    /// of its kind when the hole before them is cheaper than a request.
    pub(crate) fn next_piece(
        &self,
        priority: Priority,
        map: &[Chunk],
        ready: &ReadySet,
        limits: Limits,
    ) -> Option<Piece> {
        let &(_, first) = self.queues.get(priority.rank())?.first()?;
        let head = self.segments.get(&first)?;
        let mut end = extend(map, first, first + 1, head.end, limits);
        if end == head.end && head.mixes() {
            let mut seen = end;
            let reach_limit = map.get(index(first))?.start.saturating_add(limits.span);
            for (&start, segment) in self.segments.range(end..) {
                // Runs of less priority are looked through: worth taking only to reach one of this priority.
                let hole = hole(map, end, start);
                let far = map.get(index(start)).is_none_or(|chunk| chunk.start > reach_limit);
                if far || !segment.mixes() || hole > limits.gap || ready.next_present(seen..start).is_some() {
                    break;
                }
                seen = segment.end;
                if segment.priority != priority {
                    continue;
                }
                let reach = extend(map, first, end, segment.end, limits);
                if reach <= start {
                    break;
                }
                end = reach;
                if end < segment.end {
                    break;
                }
            }
        }
        Some(Piece { chunks: first..end, tries: head.tries })
    }

    /// How far a request for `piece` may go on: over what is queued behind it, of whatever kind up to `least`.
    pub(crate) fn goes_on(
        &self,
        piece: &Range<u32>,
        least: Priority,
        map: &[Chunk],
        ready: &ReadySet,
        limits: Limits,
    ) -> u32 {
        let mut end = piece.end;
        for (start, segment) in self.overlapping(&(piece.end..u32::MAX)) {
            let start = start.max(piece.end);
            let joined = segment.mixes()
                && segment.priority <= least
                && ready.next_present(end..start).is_none()
                && hole(map, end, start) <= limits.gap;
            let reach = if joined { extend(map, piece.start, end, segment.end, limits) } else { start };
            if reach <= start {
                break;
            }
            end = reach;
            if end < segment.end {
                break;
            }
        }
        end
    }

    #[cfg(test)]
    pub(crate) fn dump(&self) -> Vec<(Range<u32>, Priority, Stage)> {
        self.segments.iter().map(|(s, g)| (*s..g.end, g.priority, g.stage)).collect()
    }
}

/// Stored bytes between the end of the run before chunk `end` and chunk `start`; the cost of joining them.
fn hole(map: &[Chunk], end: u32, start: u32) -> u64 {
    match (end.checked_sub(1).and_then(|last| map.get(index(last))), map.get(index(start))) {
        (Some(last), Some(next)) => next.stored_start.checked_sub(last.stored_end()).unwrap_or(u64::MAX),
        _ => u64::MAX,
    }
}

/// How far the run `first..from` may grow towards `to` within the limits.
pub(crate) fn extend(map: &[Chunk], first: u32, from: u32, to: u32, limits: Limits) -> u32 {
    let Some(base) = map.get(index(first)).map(|chunk| chunk.start) else { return from };
    let mut end = from;
    while end < to {
        let (Some(last), Some(next)) = (map.get(index(end) - 1), map.get(index(end))) else { break };
        let near = next.start - last.padded_end() <= limits.gap
            && next.stored_start.checked_sub(last.stored_end()).is_some_and(|hole| hole <= limits.gap);
        if !near || next.padded_end() - base > limits.span {
            break;
        }
        end += 1;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;
    use Priority::{Ahead, Demand, Prefetch};
    use Stage::{Flying, Queued};

    fn map(count: u64) -> Vec<Chunk> {
        (0..count)
            .map(|i| Chunk { start: i * 4096, len: 4096, stored_start: i * 1000, stored_len: 1000 })
            .collect()
    }

    const WIDE: Limits = Limits { span: 1 << 20, gap: 3000 };

    #[test]
    fn wants_split_promote_and_join() {
        let mut plan = Plan::default();
        plan.want(&(0..10), Ahead);
        plan.want(&(3..5), Demand);
        assert_eq!(plan.dump(), [(0..3, Ahead, Queued), (3..5, Demand, Queued), (5..10, Ahead, Queued)]);
        plan.fly(&(5..6), Ahead, Tries::FIRST, FlightId(1));
        let wanted = plan.want(&(4..12), Demand);
        assert_eq!((wanted.queued, wanted.promoted), (1, 1));
        assert_eq!(
            plan.dump(),
            [
                (0..3, Ahead, Queued),
                (3..5, Demand, Queued),
                (5..6, Ahead, Flying(FlightId(1))),
                (6..12, Demand, Queued)
            ]
        );
        plan.clear(&(0..12));
        assert_eq!(plan.dump(), []);
        assert!(plan.queues.iter().all(BTreeSet::is_empty));
    }

    #[test]
    fn a_piece_reaches_over_cheap_holes_only() {
        let (map, mut ready) = (map(100), ReadySet::new(100));
        let mut plan = Plan::default();
        plan.want(&(0..2), Demand);
        plan.want(&(5..6), Demand);
        plan.want(&(10..11), Demand);
        assert_eq!(plan.next_piece(Demand, &map, &ready, WIDE).map(|p| p.chunks), Some(0..6));
        plan.want(&(3..4), Prefetch);
        assert_eq!(plan.next_piece(Demand, &map, &ready, WIDE).map(|p| p.chunks), Some(0..6));
        ready.insert(4..5);
        assert_eq!(plan.next_piece(Demand, &map, &ready, WIDE).map(|p| p.chunks), Some(0..2));
        let narrow = Limits { span: 4096, gap: 0 };
        assert_eq!(plan.next_piece(Demand, &map, &ready, narrow).map(|p| p.chunks), Some(0..1));
    }

    #[test]
    fn a_run_that_failed_flies_alone() {
        let (map, ready) = (map(10), ReadySet::new(10));
        let mut plan = Plan::default();
        let tries = Tries { attempt: 2, strikes: 0 };
        plan.hold(&(0..2), Demand, tries, Time(5));
        plan.want(&(2..4), Demand);
        assert_eq!(plan.next_piece(Demand, &map, &ready, WIDE).map(|p| p.chunks), Some(2..4));
        assert!(!plan.unhold(0, Time(4)));
        assert!(plan.unhold(0, Time(5)));
        plan.remove(2);
        assert_eq!(plan.next_piece(Demand, &map, &ready, WIDE), Some(Piece { chunks: 0..2, tries }));
    }
}
