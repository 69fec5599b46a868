//! Objects come, grow and go.

use alloc::vec::Vec;
use core::ops::Range;

use super::Engine;
use crate::mutation::Mutation;
use crate::object::{Growth, Object, carry_over, check};
use crate::plan::{Plan, Priority};
use crate::{Chunk, FlightId, ObjectId, Output, ReadError, ReadId, ReadySet};

impl Engine {
    pub(super) fn add_object(&mut self, id: ObjectId, chunks: Vec<Chunk>, mut ready: ReadySet) {
        let known = self.objects.get(&id);
        let checked = check(&chunks, &ready).and_then(|()| match known {
            None => Ok(()),
            Some(Object { growth: Some(growth), .. }) => {
                carry_over(&growth.chunks, &growth.ready, &chunks, &mut ready)
            }
            Some(object) => carry_over(&object.chunks, &object.ready, &chunks, &mut ready),
        });
        if let Err(reason) = checked {
            self.outputs.push_back(Output::ObjectRefused { object: id, reason });
            return;
        }
        let Some(object) = self.objects.get_mut(&id) else {
            let object = Object::new(chunks, ready);
            if object.ready.is_full() {
                self.outputs.push_back(Output::ObjectReady { object: id });
            }
            self.objects.insert(id, object);
            return;
        };
        match &mut object.growth {
            Some(growth) => (growth.chunks, growth.ready) = (chunks, ready),
            None => {
                object.growth = Some(Growth { chunks, ready, parked: Vec::new(), prefetches: Vec::new() });
            }
        }
        // What they have verified so far is still written; the rest is planned anew on the new list.
        self.cancel_flights(id);
        self.grow_if_idle(id);
    }

    pub(super) fn remove_object(&mut self, id: ObjectId) {
        let Some(object) = self.objects.remove(&id) else {
            self.ignore();
            return;
        };
        self.lines.forget(id);
        self.cancel_flights(id);
        for flight in self.flights.values_mut().filter(|flight| flight.object == id) {
            flight.orphan = true;
        }
        let mut waiting: Vec<ReadId> = object.waiters.all().map(|(read, _)| read).collect();
        waiting.extend(object.growth.into_iter().flat_map(|growth| growth.parked));
        waiting.sort_unstable();
        if self.broken(Mutation::ForgetRemoved) {
            return;
        }
        for read in waiting {
            // A parked read may have been completed and its name used again for another object.
            if self.reads.get(&read).is_some_and(|read| read.object == id) {
                self.complete(read, Err(ReadError::Removed));
            }
        }
    }

    pub(super) fn prefetch(&mut self, id: ObjectId, range: Range<u64>, background: bool) {
        let Some(object) = self.objects.get_mut(&id) else {
            self.ignore();
            return;
        };
        match &mut object.growth {
            Some(growth) => growth.prefetches.push((range, background)),
            None => {
                let chunks = object.chunks_of(&range);
                self.want(id, &chunks, if background { Priority::Fill } else { Priority::Prefetch });
            }
        }
    }

    /// Puts a larger chunk list in force if no flight of the old one is left.
    pub(super) fn grow_if_idle(&mut self, id: ObjectId) {
        let Some(object) = self.objects.get_mut(&id) else { return };
        if object.flights > 0 {
            return;
        }
        let Some(mut growth) = object.growth.take() else { return };
        // Checked when it was given; the old list has not changed since, only more of it is ready.
        let carried = carry_over(&object.chunks, &object.ready, &growth.chunks, &mut growth.ready);
        debug_assert_eq!(carried, Ok(()));
        object.chunks = growth.chunks;
        object.ready = growth.ready;
        object.plan = Plan::default();
        let waiters = core::mem::take(&mut object.waiters);
        let full = object.ready.is_full();
        self.outputs.push_back(Output::MapChanged { object: id });
        if full {
            self.outputs.push_back(Output::ObjectReady { object: id });
        }
        let mut waiting: Vec<ReadId> = waiters.all().map(|(read, _)| read).chain(growth.parked).collect();
        waiting.sort_unstable();
        for read in waiting {
            if self.reads.get(&read).is_some_and(|read| read.object == id) {
                self.admit(read);
            }
        }
        for (range, background) in growth.prefetches {
            self.prefetch(id, range, background);
        }
    }

    pub(super) fn stop_fill(&mut self, id: ObjectId) {
        let Some(object) = self.objects.get_mut(&id) else { return self.ignore() };
        if let Some(growth) = &mut object.growth {
            growth.prefetches.retain(|(_, background)| !background);
        }
        object.plan.drop_queued(&(0..object.ready.len()), Priority::Fill);
    }

    fn cancel_flights(&mut self, id: ObjectId) {
        let flights: Vec<FlightId> =
            self.flights.iter().filter(|(_, flight)| flight.object == id).map(|(id, _)| *id).collect();
        for flight in flights {
            self.cancel_flight(flight);
        }
    }
}
