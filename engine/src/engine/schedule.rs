//! Which flights start: demand before read-ahead before prefetch, objects in turn, within the budget.

use core::ops::Range;

use super::{Engine, Timer, count};
use crate::chunk::{Chunk, index, span};
use crate::flight::Flight;
use crate::mutation::Mutation;
use crate::plan::{Limits, Priority};
use crate::retry::Tries;
use crate::{FlightId, ObjectId, Output};

/// Flights that read-ahead and prefetch leave free for demand.
const RESERVED_FLIGHTS: u64 = 2;
/// In nanoseconds.
const SECOND: u128 = 1_000_000_000;

impl Engine {
    /// Puts an object with something queued into the lines it belongs to.
    pub(super) fn line_up(&mut self, id: ObjectId) {
        let Some(object) = self.objects.get_mut(&id) else { return };
        for priority in Priority::ALL {
            if let Some(in_line) = object.in_line.get_mut(priority.rank())
                && !*in_line
                && object.plan.has_queued(priority)
            {
                *in_line = true;
                self.lines.join(id, priority);
            }
        }
        self.may_start = true;
    }

    /// Starts every flight that may start now.
    pub(super) fn start_flights(&mut self) {
        if !core::mem::take(&mut self.may_start) {
            return;
        }
        for priority in Priority::ALL {
            while let Some(id) = self.lines.first(priority) {
                if priority == Priority::Fill && self.fill_waits() {
                    return;
                }
                let largest = match priority {
                    Priority::Demand => self.config.max_flight,
                    _ => self.config.chain_flight.min(self.config.max_flight),
                };
                let limit = largest.min(self.share(priority)).max(1);
                let Some(object) = self.objects.get_mut(&id) else {
                    self.lines.leave(priority);
                    continue;
                };
                let gap = if object.exact { 0 } else { object.link.gap(&self.config) };
                let limits = Limits { span: limit, gap };
                // A chain that is long enough goes on when one of its flights is released.
                let long = priority != Priority::Demand && object.chained >= self.config.chain_depth.max(1);
                let piece = match object.growth {
                    Some(_) => None,
                    None if long => None,
                    None => object.plan.next_piece(priority, &object.chunks, &object.ready, limits),
                };
                let Some(piece) = piece else {
                    if let Some(in_line) = object.in_line.get_mut(priority.rank()) {
                        *in_line = false;
                    }
                    self.lines.leave(priority);
                    continue;
                };
                if priority == Priority::Demand && !object.waiters.any(&piece.chunks) {
                    object.plan.clear(&piece.chunks);
                    continue;
                }
                let span = span(&object.chunks, &piece.chunks);
                if !self.admits(priority, span) {
                    // In strict order: what comes later would only keep this one waiting longer.
                    return;
                }
                self.lines.rotate(priority);
                if self.broken(Mutation::DoubleFlight) {
                    self.launch(id, piece.chunks.clone(), priority, piece.tries);
                }
                self.launch(id, piece.chunks, priority, piece.tries);
            }
        }
    }

    pub(super) fn launch(&mut self, id: ObjectId, chunks: Range<u32>, priority: Priority, tries: Tries) {
        let Some(object) = self.objects.get_mut(&id) else { return };
        let flight_id = FlightId(self.next_flight);
        self.next_flight += 1;
        let gap = object.link.gap(&self.config);
        let limits = Limits { span: self.config.max_request, gap };
        let least = if self.config.fill_bandwidth == 0 && self.config.fill_rate == 0 {
            priority.max(Priority::Prefetch)
        } else {
            Priority::Prefetch
        };
        // A run that failed, or fails, has a request of its own.
        // Nor does a reader take over what a request under way will bring.
        let goes_on = tries == Tries::FIRST && (priority != Priority::Demand || object.chained == 0);
        let until = match goes_on {
            true => object.plan.goes_on(&chunks, least, &object.chunks, &object.ready, limits),
            false => chunks.end,
        };
        let flight = Flight::new(id, chunks.clone(), &object.chunks, priority, tries);
        object.plan.fly(&chunks, priority, tries, flight_id);
        object.flights += 1;
        object.chained += u32::from(priority != Priority::Demand);
        self.in_flight = self.in_flight.saturating_add(flight.span);
        if priority >= Priority::Prefetch {
            self.prefetching = self.prefetching.saturating_add(flight.span);
        }
        self.stats.fetches += 1;
        self.stats.fetches_demand += u64::from(priority == Priority::Demand);
        self.stats.retries += u64::from(tries.attempt > 1);
        let bytes = stored(&object.chunks, &chunks);
        self.stats.fetched_stored_bytes += bytes;
        if priority == Priority::Fill {
            let (bandwidth, rate) = (self.config.fill_bandwidth, self.config.fill_rate);
            let nanos = (u128::from(bytes) * SECOND).checked_div(bandwidth.into()).unwrap_or(0);
            let nanos = nanos.max(SECOND.checked_div(rate.into()).unwrap_or(0));
            let pause = core::time::Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
            self.fill_after = self.fill_after.max(self.now).after(pause);
        }
        self.flights.insert(flight_id, flight);
        self.outputs.push_back(Output::Fetch {
            flight: flight_id,
            object: id,
            chunks,
            until,
            attempt: tries.attempt,
            demand: priority == Priority::Demand,
        });
    }

    /// Whether background fills have to wait; then a timer calls them back.
    fn fill_waits(&mut self) -> bool {
        if self.reads.values().any(|read| read.missing > 0) {
            // The read's end lets them go on.
            return true;
        }
        if self.fill_after <= self.now {
            return false;
        }
        if !core::mem::replace(&mut self.fill_timer, true) {
            self.timers.insert((self.fill_after, Timer::Fill));
        }
        true
    }

    /// How much of the budget a priority may fill: read-ahead leaves a quarter to demand, prefetch three.
    fn share(&self, priority: Priority) -> u64 {
        let budget = self.config.budget_bytes;
        match priority {
            Priority::Demand => budget,
            Priority::Ahead => budget - budget / 4,
            Priority::Prefetch | Priority::Fill => budget / 4,
        }
    }

    fn admits(&self, priority: Priority, span: u64) -> bool {
        let most = u64::from(self.config.max_flights).max(1);
        let fits = |used: u64, share: Priority| used.saturating_add(span) <= self.share(share);
        let (room, reserved) = match priority {
            Priority::Demand => (fits(self.in_flight, Priority::Demand), 0),
            Priority::Ahead => (fits(self.in_flight, Priority::Ahead), RESERVED_FLIGHTS),
            Priority::Prefetch | Priority::Fill => (
                fits(self.in_flight, Priority::Ahead) && fits(self.prefetching, Priority::Prefetch),
                RESERVED_FLIGHTS,
            ),
        };
        // Alone, anything may fly: nothing would ever make more room for it.
        self.flights.is_empty()
            || (room || self.broken(Mutation::IgnoreBudget))
                && count(self.flights.len()) < most.saturating_sub(reserved).max(1)
    }
}

/// Stored bytes of a run, holes included.
fn stored(map: &[Chunk], chunks: &Range<u32>) -> u64 {
    match map.get(index(chunks.start)..index(chunks.end)) {
        Some([first, .., last]) => last.stored_end().saturating_sub(first.stored_start),
        Some([only]) => u64::from(only.stored_len),
        _ => 0,
    }
}
