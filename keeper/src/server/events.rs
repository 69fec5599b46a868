//! The accesses that wait for an answer: a fixed number of slots, nothing is allocated per event.

use crate::protocol::{EventId, FileId};
use skimmer_fanotify::PreAccess;
use std::collections::VecDeque;

/// Bits of an event's name that are its slot; the rest counts up and is never used twice.
const SLOT_BITS: u32 = 16;
/// More slots than this have no name.
pub(crate) const SLOTS_MAX: u16 = u16::MAX;

/// One waiting access.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) id: EventId,
    pub(crate) file: FileId,
    pub(crate) offset: u64,
    pub(crate) count: u64,
    /// The daemon that is connected has it.
    sent: bool,
    token: PreAccess,
}

/// All of them.
#[derive(Debug)]
pub(crate) struct EventTable {
    slots: Box<[Option<Event>]>,
    free: Vec<u16>,
    /// Slots that the daemon has not been told of, oldest first.
    unsent: VecDeque<u16>,
    next: u64,
}

impl EventTable {
    pub(crate) fn new(slots: u16) -> Self {
        Self {
            slots: (0..slots).map(|_| None).collect(),
            free: (0..slots).rev().collect(),
            unsent: VecDeque::with_capacity(usize::from(slots)),
            next: 1,
        }
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes an access in. Without a free slot it is dropped, which denies it; callers look at [`Self::free`] first.
    pub(crate) fn insert(&mut self, file: FileId, offset: u64, count: u64, token: PreAccess) {
        let Some(slot) = self.free.pop() else { return };
        let id = EventId(self.next << SLOT_BITS | u64::from(slot));
        self.next += 1;
        self.slots[usize::from(slot)] = Some(Event { id, file, offset, count, sent: false, token });
        self.unsent.push_back(slot);
    }

    /// Takes the access of that name out to answer it; `None` for a name that does not wait.
    pub(crate) fn take(&mut self, id: EventId) -> Option<(FileId, PreAccess)> {
        let slot = u16::try_from(id.0 & u64::from(u16::MAX)).ok()?;
        let entry = self.slots.get_mut(usize::from(slot))?;
        let event = entry.take_if(|event| event.id == id)?;
        if !event.sent {
            self.unsent.retain(|&waiting| waiting != slot);
        }
        self.free.push(slot);
        Some((event.file, event.token))
    }

    /// Any waiting access of that file.
    pub(crate) fn of_file(&self, file: FileId) -> Option<EventId> {
        self.slots.iter().flatten().find(|event| event.file == file).map(|event| event.id)
    }

    /// The oldest access that the daemon has not been told of.
    pub(crate) fn next_unsent(&self) -> Option<&Event> {
        self.unsent.front().and_then(|&slot| self.slots[usize::from(slot)].as_ref())
    }

    /// The daemon has been told of the oldest one.
    pub(crate) fn mark_sent(&mut self) {
        if let Some(event) = self.unsent.pop_front().and_then(|slot| self.slots[usize::from(slot)].as_mut()) {
            event.sent = true;
        }
    }

    /// A new daemon has to be told of everything, in the order in which it came.
    pub(crate) fn resend_all(&mut self) {
        self.unsent.clear();
        for (slot, event) in (0..=u16::MAX).zip(&mut self.slots) {
            if let Some(event) = event {
                event.sent = false;
                self.unsent.push_back(slot);
            }
        }
        let slots = &self.slots;
        let age = |&slot: &u16| slots[usize::from(slot)].as_ref().map(|event| event.id);
        self.unsent.make_contiguous().sort_unstable_by_key(age);
    }
}
