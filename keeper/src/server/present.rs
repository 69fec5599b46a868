//! Which pages of a watched file are filled: such accesses need no daemon.

use std::ops::Range;

/// The kernel asks for whole pages.
const PAGE: u64 = 4096;
/// Bytes of files that all maps together may stand for (16 MiB of bits). A file beyond it gets no map: its accesses all
/// go to the daemon. Sizes come from images, and a keeper without memory would end and let every reader through.
pub(crate) const MAX_MAPPED: u64 = 512 << 30;

/// One bit per page.
#[derive(Debug)]
pub(crate) struct Present {
    words: Box<[u64]>,
    size: u64,
}

impl Present {
    /// Nothing of a file of `size` bytes is filled. Without room for it among `mapped` bytes of other files, or without
    /// memory, the map stays empty for ever.
    pub(crate) fn new(size: u64, mapped: u64) -> Self {
        let size = if size <= MAX_MAPPED.saturating_sub(mapped) { size } else { 0 };
        let count = usize::try_from(size.div_ceil(PAGE).div_ceil(64)).unwrap_or(0);
        let mut words = Vec::new();
        if words.try_reserve_exact(count).is_err() {
            return Self { words: Box::default(), size: 0 };
        }
        words.resize(count, 0);
        Self { words: words.into(), size }
    }

    /// The map itself, 64 pages a word.
    pub(crate) fn words(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// Bytes of the file that the map stands for.
    pub(crate) fn mapped(&self) -> u64 {
        self.size
    }

    /// The pages that lie fully in the range are filled; the file's last page counts when its last byte is. Returns
    /// their numbers.
    pub(crate) fn insert(&mut self, offset: u64, count: u64) -> Range<u64> {
        let end = offset.saturating_add(count).min(self.size);
        let last = if end == self.size { end.div_ceil(PAGE) } else { end / PAGE };
        self.set(offset.div_ceil(PAGE)..last, true)
    }

    /// The pages that the range touches are not filled. Returns their numbers.
    pub(crate) fn remove(&mut self, offset: u64, count: u64) -> Range<u64> {
        let end = offset.saturating_add(count).min(self.size);
        self.set(offset / PAGE..end.div_ceil(PAGE), false)
    }

    fn set(&mut self, pages: Range<u64>, filled: bool) -> Range<u64> {
        set(&mut self.words, 0, &pages, filled);
        pages
    }

    /// Whether every page that the range touches is filled. A range that is empty or starts behind the end is not: it
    /// is no ordinary read, and the daemon decides.
    pub(crate) fn covers(&self, offset: u64, count: u64) -> bool {
        let end = offset.saturating_add(count).min(self.size);
        offset < end
            && (offset / PAGE..end.div_ceil(PAGE)).all(|page| {
                let word = usize::try_from(page / 64).ok().and_then(|at| self.words.get(at));
                word.is_some_and(|word| word & 1 << (page % 64) != 0)
            })
    }
}

/// Sets or clears the bits of pages in some words of a map, the first of which is number `first`.
pub(crate) fn set(words: &mut [u64], first: u64, pages: &Range<u64>, filled: bool) {
    let behind = first.saturating_add(u64::try_from(words.len()).unwrap_or(u64::MAX));
    for page in pages.start.max(first.saturating_mul(64))..pages.end.min(behind.saturating_mul(64)) {
        if let Some(word) = usize::try_from(page / 64 - first).ok().and_then(|at| words.get_mut(at)) {
            match filled {
                true => *word |= 1 << (page % 64),
                false => *word &= !(1 << (page % 64)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn edges() {
        let mut present = Present::new(3 * PAGE + 1, 0);
        assert!(!present.covers(0, 1));
        // Half pages fill nothing.
        present.insert(1, 2 * PAGE - 1);
        assert!(present.covers(PAGE, PAGE) && !present.covers(0, PAGE));
        // The last, short page.
        present.insert(3 * PAGE, 1);
        assert!(present.covers(3 * PAGE, PAGE) && present.covers(3 * PAGE, u64::MAX));
        // Empty and beyond the end are not ordinary reads.
        assert!(!present.covers(PAGE, 0) && !present.covers(4 * PAGE, PAGE));
        present.insert(u64::MAX, u64::MAX);
        // A page of which a part is lost is not filled.
        present.remove(3 * PAGE, 1);
        present.remove(PAGE + 5, 1);
        assert!(!present.covers(3 * PAGE, 1) && !present.covers(PAGE, 1));
        present.remove(u64::MAX, u64::MAX);
        // No room for a map: nothing is ever filled.
        for (size, mapped) in [(MAX_MAPPED + 1, 0), (PAGE, MAX_MAPPED), (PAGE, u64::MAX)] {
            let mut present = Present::new(size, mapped);
            present.insert(0, PAGE);
            assert!(!present.covers(0, PAGE) && present.mapped() == 0);
        }
    }

    proptest! {
        #[test]
        fn covers_what_was_filled_and_nothing_else(
            fills in proptest::collection::vec((0..40_u64, 0..20_u64, any::<bool>()), 0..12),
            asks in proptest::collection::vec((0..200_000_u64, 1..100_000_u64), 0..12),
        ) {
            const SIZE: u64 = 40 * PAGE;
            let mut present = Present::new(SIZE, 0);
            let mut filled = [false; 40];
            for (first, pages, fill) in fills {
                let change = if fill { Present::insert } else { Present::remove };
                let changed = change(&mut present, first * PAGE, pages * PAGE);
                prop_assert_eq!(changed.is_empty(), pages == 0 || first >= 40);
                for page in first..(first + pages).min(40) {
                    filled[usize::try_from(page).unwrap()] = fill;
                }
            }
            for (offset, count) in asks {
                let end = (offset + count).min(SIZE);
                let pages = offset / PAGE..end.div_ceil(PAGE);
                let expected = offset < end
                    && pages.into_iter().all(|page| filled[usize::try_from(page).unwrap()]);
                prop_assert_eq!(present.covers(offset, count), expected);
            }
        }
    }
}
