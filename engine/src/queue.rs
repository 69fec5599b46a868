//! Whose turn it is: objects take turns, one flight each, within a priority.

use alloc::collections::VecDeque;

use crate::ObjectId;
use crate::plan::Priority;

/// One line of objects per priority; an object stands in a line at most once (it keeps the flag itself).
#[derive(Debug, Default)]
pub(crate) struct Lines {
    lines: [VecDeque<ObjectId>; 4],
}

impl Lines {
    pub(crate) fn join(&mut self, object: ObjectId, priority: Priority) {
        if let Some(line) = self.lines.get_mut(priority.rank()) {
            line.push_back(object);
        }
    }

    pub(crate) fn first(&self, priority: Priority) -> Option<ObjectId> {
        self.lines.get(priority.rank())?.front().copied()
    }

    /// The first has had its turn and has more to do.
    pub(crate) fn rotate(&mut self, priority: Priority) {
        if let Some(line) = self.lines.get_mut(priority.rank())
            && !line.is_empty()
        {
            line.rotate_left(1);
        }
    }

    /// The first has nothing more to do.
    pub(crate) fn leave(&mut self, priority: Priority) {
        if let Some(line) = self.lines.get_mut(priority.rank()) {
            line.pop_front();
        }
    }

    pub(crate) fn forget(&mut self, object: ObjectId) {
        for line in &mut self.lines {
            line.retain(|other| *other != object);
        }
    }
}
