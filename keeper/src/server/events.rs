//! The accesses that wait for an answer: a fixed number of slots, nothing is allocated per event.

use crate::protocol::{EventId, FileId};
use std::collections::VecDeque;

/// Bits of an event's name that are its slot; the rest counts up and is never used twice.
const SLOT_BITS: u32 = 16;
/// More slots than this have no name.
pub(crate) const SLOTS_MAX: u16 = u16::MAX;

/// The slot that an event's name speaks of.
pub(crate) fn slot_of(id: EventId) -> usize {
    let [.., high, low] = id.0.to_be_bytes();
    usize::from(u16::from_be_bytes([high, low]))
}

/// One waiting access.
#[derive(Debug)]
pub(crate) struct Event<T> {
    pub(crate) id: EventId,
    pub(crate) file: FileId,
    pub(crate) offset: u64,
    pub(crate) count: u64,
    /// The daemon that is connected has it.
    sent: bool,
    token: T,
}

/// All of them. `T` is what answers one.
#[derive(Debug)]
pub(crate) struct EventTable<T> {
    slots: Box<[Option<Event<T>>]>,
    free: Vec<u16>,
    /// Slots that the daemon has not been told of, oldest first.
    unsent: VecDeque<u16>,
    next: u64,
}

impl<T> EventTable<T> {
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

    /// Takes an access in. Without a free slot its token is dropped, which denies it; callers look at [`Self::free`] first.
    pub(crate) fn insert(&mut self, file: FileId, offset: u64, count: u64, token: T) -> Option<EventId> {
        let slot = self.free.pop()?;
        let id = EventId(self.next << SLOT_BITS | u64::from(slot));
        self.next += 1;
        self.slots[usize::from(slot)] = Some(Event { id, file, offset, count, sent: false, token });
        self.unsent.push_back(slot);
        Some(id)
    }

    /// Takes an access in that another process had named; false when its slot is not free.
    pub(crate) fn restore(&mut self, id: EventId, file: FileId, offset: u64, count: u64, token: T) -> bool {
        let slot = slot_of(id);
        let Some(place) = self.free.iter().position(|&free| usize::from(free) == slot) else { return false };
        let slot = self.free.swap_remove(place);
        self.slots[usize::from(slot)] = Some(Event { id, file, offset, count, sent: false, token });
        self.unsent.push_back(slot);
        true
    }

    /// What the next name counts from; after [`EventTable::count_from`] with it no name comes twice.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    pub(crate) fn count_from(&mut self, next: u64) {
        self.next = self.next.max(next);
    }

    /// Takes the access of that name out to answer it; `None` for a name that does not wait.
    pub(crate) fn take(&mut self, id: EventId) -> Option<(FileId, T)> {
        let slot = u16::try_from(slot_of(id)).ok()?;
        let entry = self.slots.get_mut(usize::from(slot))?;
        let event = entry.take_if(|event| event.id == id)?;
        if !event.sent {
            self.unsent.retain(|&waiting| waiting != slot);
        }
        self.free.push(slot);
        Some((event.file, event.token))
    }

    /// What answers those that wait.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().flatten().map(|event| &event.token)
    }

    /// Any waiting access of that file.
    pub(crate) fn of_file(&self, file: FileId) -> Option<EventId> {
        self.slots.iter().flatten().find(|event| event.file == file).map(|event| event.id)
    }

    /// The oldest access that the daemon has not been told of.
    pub(crate) fn next_unsent(&self) -> Option<&Event<T>> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u64),
        Send,
        /// Answers one of those that wait.
        Take(usize),
        /// Answers a name that never was or no longer is.
        TakeStale(u64),
        Resend,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..3u64).prop_map(Step::Insert),
            3 => Just(Step::Send),
            3 => any::<usize>().prop_map(Step::Take),
            1 => any::<u64>().prop_map(Step::TakeStale),
            1 => Just(Step::Resend),
        ]
    }

    proptest! {
        /// Against a plain list: names are never used twice, the daemon hears of each access once per connection, in
        /// order, and every token comes out exactly once.
        #[test]
        fn behaves_like_a_list(steps in proptest::collection::vec(step(), 0..200)) {
            const SLOTS: u16 = 8;
            let mut table = EventTable::new(SLOTS);
            let mut list: Vec<(EventId, u64, u64, bool)> = Vec::new();
            let mut names = HashSet::new();
            for (token, step) in (0u64..).zip(steps) {
                match step {
                    Step::Insert(file) => {
                        if table.free() == 0 {
                            continue;
                        }
                        table.insert(FileId(file), token, 1, token);
                        let id = table.slots.iter().flatten().map(|event| event.id).max().unwrap();
                        prop_assert!(names.insert(id));
                        list.push((id, file, token, false));
                    }
                    Step::Send => {
                        let next = list.iter_mut().find(|(.., sent)| !sent);
                        let told = table.next_unsent().map(|event| (event.id, event.offset));
                        prop_assert_eq!(told, next.as_ref().map(|(id, _, token, _)| (*id, *token)));
                        table.mark_sent();
                        if let Some((.., sent)) = next {
                            *sent = true;
                        }
                    }
                    Step::Take(which) if !list.is_empty() => {
                        let (id, file, token, _) = list.remove(which % list.len());
                        prop_assert_eq!(table.take(id), Some((FileId(file), token)));
                        prop_assert_eq!(table.take(id), None);
                    }
                    Step::Take(_) => {}
                    Step::TakeStale(name) => {
                        let id = EventId(name);
                        prop_assume!(list.iter().all(|(known, ..)| *known != id));
                        prop_assert_eq!(table.take(id), None);
                    }
                    Step::Resend => {
                        table.resend_all();
                        list.iter_mut().for_each(|(.., sent)| *sent = false);
                    }
                }
                prop_assert_eq!(table.len(), list.len());
                for file in 0..3 {
                    let found = table.of_file(FileId(file)).is_some();
                    prop_assert_eq!(found, list.iter().any(|(_, known, ..)| *known == file));
                }
            }
        }
    }

    #[test]
    fn a_full_table_drops_the_token() {
        let mut table = EventTable::new(1);
        let token = std::rc::Rc::new(());
        table.insert(FileId(1), 0, 1, token.clone());
        table.insert(FileId(1), 0, 1, token.clone());
        assert_eq!((std::rc::Rc::strong_count(&token), table.len(), table.free()), (2, 1, 0));
    }
}
