//! Which flights start: demand before read-ahead before prefetch, objects in turn, within the budget.

use core::ops::Range;

use super::{Engine, count};
use crate::chunk::{Chunk, index, span};
use crate::flight::Flight;
use crate::mutation::Mutation;
use crate::plan::{Limits, Priority};
use crate::retry::Tries;
use crate::{FlightId, ObjectId, Output};

/// Flights that read-ahead and prefetch leave free for demand.
const RESERVED_FLIGHTS: u64 = 2;

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
                let limit = self.config.max_flight.min(self.share(priority)).max(1);
                let Some(object) = self.objects.get_mut(&id) else {
                    self.lines.leave(priority);
                    continue;
                };
                let limits = Limits { span: limit, gap: object.link.gap(&self.config) };
                let piece = match object.growth {
                    Some(_) => None,
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
        let flight = Flight::new(id, chunks.clone(), &object.chunks, priority, tries);
        object.plan.fly(&chunks, priority, tries, flight_id);
        object.flights += 1;
        self.in_flight = self.in_flight.saturating_add(flight.span);
        if priority == Priority::Prefetch {
            self.prefetching = self.prefetching.saturating_add(flight.span);
        }
        self.stats.fetches += 1;
        self.stats.fetches_demand += u64::from(priority == Priority::Demand);
        self.stats.retries += u64::from(tries.attempt > 1);
        self.stats.fetched_stored_bytes += stored(&object.chunks, &chunks);
        self.flights.insert(flight_id, flight);
        self.outputs.push_back(Output::Fetch {
            flight: flight_id,
            object: id,
            chunks,
            attempt: tries.attempt,
            demand: priority == Priority::Demand,
        });
    }

    /// How much of the budget a priority may fill: read-ahead leaves a quarter to demand, prefetch three.
    fn share(&self, priority: Priority) -> u64 {
        let budget = self.config.budget_bytes;
        match priority {
            Priority::Demand => budget,
            Priority::Ahead => budget - budget / 4,
            Priority::Prefetch => budget / 4,
        }
    }

    fn admits(&self, priority: Priority, span: u64) -> bool {
        let most = u64::from(self.config.max_flights).max(1);
        let fits = |used: u64, share: Priority| used.saturating_add(span) <= self.share(share);
        let (room, reserved) = match priority {
            Priority::Demand => (fits(self.in_flight, Priority::Demand), 0),
            Priority::Ahead => (fits(self.in_flight, Priority::Ahead), RESERVED_FLIGHTS),
            Priority::Prefetch => (
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
