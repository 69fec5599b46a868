//! Reads come, wait, and are answered.

use alloc::vec::Vec;
use core::ops::Range;

use super::{Engine, Read, Timer};
use crate::chunk::index;
use crate::density;
use crate::mutation::Mutation;
use crate::object::top_up;
use crate::plan::{Priority, Stage};
use crate::window::Advice;
use crate::{FlightId, ObjectId, Output, ReadError, ReadId};

impl Engine {
    pub(super) fn read(&mut self, id: ReadId, object: ObjectId, offset: u64, len: u64) {
        if self.reads.contains_key(&id) {
            // Two answers with one name could not be told apart; the first keeps it.
            self.ignore();
            return;
        }
        self.stats.reads += 1;
        self.stats.asked_bytes = self.stats.asked_bytes.saturating_add(len);
        let bytes = offset..offset.saturating_add(len);
        let deadline = self.config.read_deadline.map(|wait| self.now.after(wait));
        self.reads.insert(id, Read { object, bytes, chunks: 0..0, missing: 0, deadline });
        if let Some(deadline) = deadline {
            self.timers.insert((deadline, Timer::Deadline(id)));
        }
        let sticky = self.broken(Mutation::StickyError) && self.stats.given_up > 0;
        match self.objects.get_mut(&object) {
            None => self.complete(id, Err(ReadError::UnknownObject)),
            Some(_) if sticky => {
                let class = crate::FailureClass::Transient;
                self.complete(id, Err(ReadError::Source { class, attempts: 1 }));
            }
            Some(known) => match &mut known.growth {
                Some(growth) => growth.parked.push(id),
                None => self.admit(id),
            },
        }
    }

    /// Serves a read from what is ready, or makes it wait for what is planned.
    pub(super) fn admit(&mut self, id: ReadId) {
        let Some(read) = self.reads.get_mut(&id) else { return };
        let object_id = read.object;
        let Some(object) = self.objects.get_mut(&object_id) else { return };
        let bytes = read.bytes.clone();
        if bytes.is_empty() {
            return self.complete(id, Ok(()));
        }
        let chunks = object.chunks_of(&bytes);
        read.chunks = chunks.clone();
        read.missing = object.ready.missing(chunks.clone());
        let (missing, advice) = (
            read.missing,
            if object.exact { Advice::default() } else { object.windows.on_read(&bytes, &self.config) },
        );
        let mut fresh = false;
        if missing > 0 {
            object.waiters.add(id, &chunks);
            fresh = self.want(object_id, &chunks, Priority::Demand);
            self.top_up(object_id, &chunks);
            self.overtake(object_id, &chunks);
            self.write_what_waits(object_id, &chunks);
        } else {
            self.stats.reads_ready += 1;
            if self.broken(Mutation::RefetchReady) && !chunks.is_empty() {
                self.launch(object_id, chunks, Priority::Demand, crate::retry::Tries::FIRST);
            }
            self.complete(id, Ok(()));
        }
        if let Some(object) = self.objects.get_mut(&object_id) {
            if let Some(stale) = advice.stale {
                let chunks = object.chunks_of(&stale);
                object.plan.drop_queued(&chunks, Priority::Ahead);
            }
            if let Some(ahead) = advice.ahead.filter(|ahead| !ahead.is_empty()) {
                let mut chunks = object.chunks_of(&ahead);
                if chunks.end.checked_sub(1).is_some_and(|last| !object.mostly_within(last, &ahead)) {
                    chunks.end -= 1;
                }
                let within = object.within_pieces(&chunks);
                if within != chunks
                    && let Some(next) = object.chunks.get(index(within.end))
                {
                    object.windows.cut(ahead.end, next.start);
                    chunks = within;
                }
                // Too little for a request of its own: it goes with the demand.
                let small = missing > 0 && ahead.end.saturating_sub(bytes.end) < self.config.min_fetch;
                let priority = if small { Priority::Demand } else { Priority::Ahead };
                self.want(object_id, &chunks, priority);
            }
        }
        // What is wanted already was seen to when it was.
        if fresh {
            self.complete_block(object_id, bytes.start);
        }
    }

    /// Wants the rest of the block around a miss, if most of it is there already: first what follows, then what
    /// lies before.
    fn complete_block(&mut self, id: ObjectId, at: u64) {
        let Some(object) = self.objects.get_mut(&id) else { return };
        let most = self.config.max_window;
        if most == 0 || object.exact {
            return;
        }
        // What was only guessed does not count, or one guess would make the next.
        let taken = |run: &Range<u32>| {
            let demanded = object.plan.overlapping(run).filter(|(_, part)| part.priority == Priority::Demand);
            let demanded = demanded.map(|(start, part)| part.end.min(run.end) - start.max(run.start));
            (run.end - run.start - object.ready.missing(run.clone())).saturating_add(demanded.sum())
        };
        let block = density::around(&object.chunks, taken, &object.misses, at, self.config.min_fetch, most);
        object.misses.note(at);
        let Some(block) = block else { return };
        let (after, before) = (object.chunks_of(&(at..block.end)), object.chunks_of(&(block.start..at)));
        self.want(id, &after, Priority::Ahead);
        self.want(id, &before, Priority::Ahead);
    }

    /// Makes sure that the missing ones of these chunks are somebody's job; whether some of them were nobody's.
    pub(super) fn want(&mut self, id: ObjectId, chunks: &Range<u32>, priority: Priority) -> bool {
        let Some(object) = self.objects.get_mut(&id) else { return false };
        let (mut changed, mut fresh) = (false, false);
        for run in object.ready.missing_runs(chunks.clone()) {
            let wanted = object.plan.want(&run, priority);
            self.stats.promotions += u64::from(wanted.promoted);
            changed |= wanted.queued + wanted.promoted > 0;
            fresh |= wanted.queued > 0;
        }
        if changed {
            self.line_up(id);
        }
        fresh
    }

    /// Enlarges a demand too small for a request of its own by the chunks that follow it.
    fn top_up(&mut self, id: ObjectId, chunks: &Range<u32>) {
        let Some(object) = self.objects.get(&id) else { return };
        if self.config.max_window == 0 || object.exact {
            return;
        }
        let Some(last) = chunks.end.checked_sub(1) else { return };
        let Some((start, segment)) = object.plan.overlapping(&(last..chunks.end)).next() else { return };
        if segment.stage != Stage::Queued || segment.priority != Priority::Demand {
            return;
        }
        let wanted = start..segment.end;
        let mut more = top_up(&object.chunks, &wanted, self.config.min_fetch, object.ready.len());
        more.end = object.ready.next_present(more.clone()).unwrap_or(more.end);
        let taken = object.plan.overlapping(&more).find(|(_, other)| matches!(other.stage, Stage::Flying(_)));
        more.end = taken.map_or(more.end, |(start, _)| start.max(more.start));
        if !more.is_empty() {
            self.want(id, &more, Priority::Demand);
        }
    }

    /// Orders the writes that a read of `chunks` waits for, now that it waits.
    fn write_what_waits(&mut self, id: ObjectId, chunks: &Range<u32>) {
        let Some(object) = self.objects.get(&id) else { return };
        let flying: Vec<FlightId> = object
            .plan
            .overlapping(chunks)
            .filter_map(|(_, segment)| match segment.stage {
                Stage::Flying(flight) => Some(flight),
                _ => None,
            })
            .collect();
        for flight in flying {
            if self.flights.get(&flight).is_some_and(|flight| flight.has_verified(chunks)) {
                self.write_runs(flight, chunks);
            }
        }
    }

    /// Chunks of an object have become ready: answers the reads that waited for the last of theirs.
    pub(super) fn serve(&mut self, id: ObjectId, chunks: &Range<u32>) {
        let Some(object) = self.objects.get_mut(&id) else { return };
        let waiting: Vec<(ReadId, Range<u32>)> = object.waiters.overlapping(chunks).collect();
        let mut served = Vec::new();
        for (read_id, run) in waiting {
            let Some(read) = self.reads.get_mut(&read_id) else { continue };
            read.missing = read.missing.saturating_sub(run.end.min(chunks.end) - run.start.max(chunks.start));
            if read.missing == 0 {
                served.push(read_id);
            }
        }
        for read in served {
            self.complete(read, Ok(()));
        }
    }

    /// Fails the reads that wait for any of these chunks, and drops what is queued for nobody else.
    pub(super) fn fail(&mut self, id: ObjectId, chunks: &Range<u32>, error: ReadError) {
        let Some(object) = self.objects.get(&id) else { return };
        let failed: Vec<(ReadId, Range<u32>)> = object.waiters.overlapping(chunks).collect();
        for (read, _) in &failed {
            self.complete(*read, Err(error));
        }
        for (_, run) in failed {
            self.drop_unwanted(id, &run, |_| false);
        }
    }

    pub(super) fn cancel_read(&mut self, id: ReadId) {
        let Some(read) = self.reads.get(&id).cloned() else {
            self.ignore();
            return;
        };
        self.complete(id, Err(ReadError::Cancelled));
        self.drop_unwanted(read.object, &read.chunks, |priority| priority == Priority::Demand);
    }

    pub(super) fn expire_read(&mut self, id: ReadId) {
        let Some(read) = self.reads.get(&id).cloned() else { return };
        self.stats.reads_expired += 1;
        self.complete(id, Err(ReadError::Deadline));
        // Its flights are slow or hang, whoever asked for them first: the next read shall not wait for the same.
        self.drop_unwanted(read.object, &read.chunks, |_| true);
    }

    /// Answers a read and forgets it.
    pub(super) fn complete(&mut self, id: ReadId, result: Result<(), ReadError>) {
        if self.broken(Mutation::DropCompletion) && id.0 % 4 == 1 {
            return;
        }
        let Some(read) = self.reads.remove(&id) else { return };
        if let Some(deadline) = read.deadline {
            self.timers.remove(&(deadline, Timer::Deadline(id)));
        }
        if let Some(object) = self.objects.get_mut(&read.object)
            && !read.chunks.is_empty()
        {
            object.waiters.remove(id, &read.chunks);
        }
        if !read.chunks.is_empty() {
            self.fill_after = self.fill_after.max(self.now.after(self.config.fill_quiet));
        }
        self.may_start = true;
        match result {
            Ok(()) => self.stats.reads_served += 1,
            Err(_) => self.stats.reads_failed += 1,
        }
        self.outputs.push_back(Output::Complete { read: id, result });
        if self.broken(Mutation::CompleteTwice) {
            self.outputs.push_back(Output::Complete { read: id, result });
        }
    }

    /// Some reads of `chunks` are gone: drops the demand that no other read has, and cancels flights that no read
    /// waits for if `cancel` says so of their priority.
    fn drop_unwanted(&mut self, id: ObjectId, chunks: &Range<u32>, cancel: impl Fn(Priority) -> bool) {
        let Some(object) = self.objects.get_mut(&id) else { return };
        let segments: Vec<_> = object.plan.overlapping(chunks).collect();
        let mut cancelled = Vec::new();
        for (start, segment) in segments {
            match segment.stage {
                Stage::Flying(flight) => {
                    let all = self.flights.get(&flight).map_or(0..0, |flight| flight.chunks.clone());
                    if cancel(segment.priority) && !object.waiters.any(&all) {
                        cancelled.push(flight);
                    }
                }
                Stage::Queued | Stage::Held { .. } => {
                    if segment.priority == Priority::Demand && !object.waiters.any(&(start..segment.end)) {
                        object.plan.remove(start);
                    }
                }
            }
        }
        for flight in cancelled {
            self.cancel_flight(flight);
        }
    }
}
