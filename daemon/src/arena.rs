//! The buffer memory: one region of the byte budget, given out in whole blocks and taken back from any thread.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use skimmer_fetcher::chunk::Verified;

use crate::ring::Waker;
use crate::ring::sys::Piece;

/// Slabs begin at multiples of this and are this long or a multiple: what direct writes to a cache file need.
const BLOCK: usize = 4096;

/// The free pieces by offset; neighbours are always joined.
struct Free {
    pieces: BTreeMap<usize, Piece>,
    bytes: usize,
    /// Somebody asked for more than there was: tell when something comes back.
    short: bool,
}

impl Free {
    fn put(&mut self, mut piece: Piece) {
        self.bytes += piece.len();
        if let Some((_, before)) = self.pieces.range(..piece.offset()).next_back()
            && before.touches(&piece)
        {
            let at = before.offset();
            if let Some(before) = self.pieces.remove(&at) {
                piece = join(before, piece);
            }
        }
        if let Some(after) = self.pieces.remove(&(piece.offset() + piece.len())) {
            piece = join(piece, after);
        }
        self.pieces.insert(piece.offset(), piece);
    }

    /// The smallest free piece that is large enough, cut to size.
    fn take(&mut self, len: usize) -> Option<Piece> {
        let fits = self.pieces.values().filter(|piece| piece.len() >= len);
        let at = fits.min_by_key(|piece| piece.len())?.offset();
        let (taken, rest) = self.pieces.remove(&at)?.split_at(len);
        self.bytes -= taken.len();
        if rest.len() > 0 {
            self.pieces.insert(rest.offset(), rest);
        }
        Some(taken)
    }
}

fn join(first: Piece, second: Piece) -> Piece {
    // Both come from this arena's only mapping and the caller saw that they touch.
    first.join(second).unwrap_or_else(|_| unreachable!("pieces that touch can be joined"))
}

struct Pool {
    capacity: usize,
    free: Mutex<Free>,
    waker: OnceLock<Waker>,
}

impl Pool {
    fn free(&self) -> MutexGuard<'_, Free> {
        // Nothing panics halfway through a change, so a poisoned map is still whole.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All buffer memory of one driver. Clones share it.
#[derive(Clone)]
pub struct Arena {
    pool: Arc<Pool>,
}

impl Arena {
    /// Maps `capacity` bytes, a multiple of 4096, and shows the whole of it to `register` before any of it is given
    /// out.
    pub(crate) fn new<T>(capacity: usize, register: impl FnOnce(&Piece) -> T) -> io::Result<(Self, T)> {
        if capacity == 0 || !capacity.is_multiple_of(BLOCK) {
            let what = format!("buffer memory of {capacity} bytes is not a multiple of 4096");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let whole = Piece::map(capacity)?;
        let registered = register(&whole);
        let mut free = Free { pieces: BTreeMap::new(), bytes: 0, short: false };
        free.put(whole);
        let pool = Pool { capacity, free: Mutex::new(free), waker: OnceLock::new() };
        Ok((Self { pool: Arc::new(pool) }, registered))
    }

    /// An arena that no ring knows.
    pub fn unregistered(capacity: usize) -> io::Result<Self> {
        Self::new(capacity, |_| ()).map(|(arena, ())| arena)
    }

    /// Has `waker` woken when memory comes back after an [`Arena::alloc`] that failed. The first one given counts.
    pub(crate) fn wake_on_return(&self, waker: Waker) {
        let _ = self.pool.waker.set(waker);
    }

    /// Bytes in all.
    pub fn capacity(&self) -> usize {
        self.pool.capacity
    }

    /// Bytes given out now.
    pub fn in_use(&self) -> usize {
        self.pool.capacity - self.pool.free().bytes
    }

    /// One slab of `len` bytes rounded up to whole blocks; `None` when no free range is that long. The bytes are
    /// what the last user left.
    pub fn alloc(&self, len: usize) -> Option<Slab> {
        let len = len.checked_next_multiple_of(BLOCK).filter(|len| *len > 0)?;
        let mut free = self.pool.free();
        let piece = free.take(len);
        free.short |= piece.is_none();
        drop(free);
        let piece = piece?;
        Some(Slab { piece: Some(piece), pool: Arc::clone(&self.pool) })
    }
}

/// A range of buffer memory: owned, sendable, given back when dropped.
pub struct Slab {
    /// `None` only while being taken apart.
    piece: Option<Piece>,
    pool: Arc<Pool>,
}

impl Slab {
    fn piece(&self) -> &Piece {
        self.piece.as_ref().expect("a slab holds its piece until it is dropped")
    }

    /// Bytes in the slab; a multiple of 4096.
    pub fn len(&self) -> usize {
        self.piece().len()
    }

    /// Never so: a slab has at least one block.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first `at` bytes, and the rest. `at` is a multiple of 4096 inside the slab; else the slab comes back.
    pub fn split_at(mut self, at: usize) -> Result<(Self, Self), Self> {
        if at == 0 || at >= self.len() || !at.is_multiple_of(BLOCK) {
            return Err(self);
        }
        let piece = self.piece.take().expect("a slab holds its piece until it is dropped");
        let (first, rest) = piece.split_at(at);
        let rest = Self { piece: Some(rest), pool: Arc::clone(&self.pool) };
        self.piece = Some(first);
        Ok((self, rest))
    }

    /// One slab of this one and `next`, which begins where this one ends; else both come back.
    pub fn join(mut self, mut next: Self) -> Result<Self, (Self, Self)> {
        let (Some(first), Some(second)) = (self.piece.take(), next.piece.take()) else {
            unreachable!("a slab holds its piece until it is dropped")
        };
        match first.join(second) {
            Ok(piece) => {
                self.piece = Some(piece);
                Ok(self)
            }
            Err((first, second)) => {
                self.piece = Some(first);
                next.piece = Some(second);
                Err((self, next))
            }
        }
    }
}

impl AsRef<[u8]> for Slab {
    fn as_ref(&self) -> &[u8] {
        self.piece().bytes()
    }
}

impl AsMut<[u8]> for Slab {
    fn as_mut(&mut self) -> &mut [u8] {
        self.piece.as_mut().expect("a slab holds its piece until it is dropped").bytes_mut()
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        let Some(piece) = self.piece.take() else { return };
        let mut free = self.pool.free();
        free.put(piece);
        let short = std::mem::take(&mut free.short);
        drop(free);
        if short && let Some(waker) = self.pool.waker.get() {
            waker.wake();
        }
    }
}

/// Verified chunks that lie one after the other in buffer memory: what one write takes. Nothing else can be written.
pub struct Run {
    parts: Vec<Verified<Slab>>,
    len: usize,
}

impl Run {
    /// A run of one chunk, padding included.
    pub fn new(first: Verified<Slab>) -> Self {
        let len = first.padded().len();
        Self { parts: vec![first], len }
    }

    /// Adds the chunk that lies right behind the run in memory; gives it back when it lies elsewhere.
    pub fn push(&mut self, next: Verified<Slab>) -> Result<(), Verified<Slab>> {
        let end = self.parts.last().map(|last| last.padded().as_ptr_range().end);
        if end != Some(next.padded().as_ptr()) {
            return Err(next);
        }
        self.len += next.padded().len();
        self.parts.push(next);
        Ok(())
    }

    /// Bytes in the run; a multiple of 4096.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never so: a run has at least one chunk.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its first byte and its length. Stays the same, and readable, for as long as the run lives, wherever it moves.
    pub(crate) fn span(&self) -> (*const u8, usize) {
        (self.parts[0].padded().as_ptr(), self.len)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use skimmer_fetcher::chunk::{ChunkDigest, ChunkSpec, Codec, verify};

    use super::*;

    fn checked(slab: Slab, fill: u8) -> Verified<Slab> {
        let stored = vec![fill; slab.len()];
        let len = u32::try_from(slab.len()).unwrap();
        let digest = ChunkDigest::Blake3(*blake3::hash(&stored).as_bytes());
        let spec = ChunkSpec { stored_offset: 0, stored_len: len, len, codec: Codec::None, digest };
        verify(&spec, &stored, slab).unwrap()
    }

    #[test]
    fn gives_back_on_drop_from_another_thread() {
        let arena = Arena::unregistered(8 * BLOCK).unwrap();
        let slab = arena.alloc(1).unwrap();
        assert_eq!((slab.len(), arena.in_use()), (BLOCK, BLOCK));
        assert_eq!(slab.as_ref().as_ptr().addr() % BLOCK, 0);
        std::thread::spawn(move || drop(slab)).join().unwrap();
        assert_eq!(arena.in_use(), 0);
        assert_eq!(arena.alloc(8 * BLOCK).unwrap().len(), 8 * BLOCK);
    }

    #[test]
    fn refuses_odd_splits_and_strangers() {
        let arena = Arena::unregistered(8 * BLOCK).unwrap();
        assert!(Arena::unregistered(0).is_err() && Arena::unregistered(BLOCK + 1).is_err());
        assert!(arena.alloc(0).is_none() && arena.alloc(9 * BLOCK).is_none());
        let slab = arena.alloc(4 * BLOCK).unwrap();
        let slab = slab.split_at(100).err().unwrap().split_at(4 * BLOCK).err().unwrap();
        let (a, rest) = slab.split_at(BLOCK).ok().unwrap();
        let (b, c) = rest.split_at(BLOCK).ok().unwrap();
        let (a, c) = a.join(c).err().unwrap();
        let whole = a.join(b).ok().unwrap().join(c).ok().unwrap();
        assert_eq!(whole.len(), 4 * BLOCK);
        // Two arenas never join, wherever the kernel put them.
        let other = Arena::unregistered(BLOCK).unwrap();
        assert!(whole.join(other.alloc(BLOCK).unwrap()).is_err());
        assert_eq!((arena.in_use(), other.in_use()), (0, 0));
    }

    #[test]
    fn runs_take_neighbours_only() {
        let arena = Arena::unregistered(4 * BLOCK).unwrap();
        let (a, rest) = arena.alloc(4 * BLOCK).unwrap().split_at(BLOCK).ok().unwrap();
        let (b, c) = rest.split_at(BLOCK).ok().unwrap();
        let (a, b, c) = (checked(a, 1), checked(b, 2), checked(c, 3));
        let mut run = Run::new(a);
        let c = run.push(c).unwrap_err();
        run.push(b).unwrap();
        run.push(c).unwrap();
        assert_eq!(run.len(), 4 * BLOCK);
        drop(run);
        assert_eq!(arena.in_use(), 0);
    }

    proptest! {
        /// Whatever is asked, split, joined and dropped in whatever order: no two slabs share a byte, and in the end
        /// everything is back in one piece.
        #[test]
        fn never_hands_out_twice(ops in prop::collection::vec((0..4u8, any::<usize>(), any::<usize>()), 0..200)) {
            let arena = Arena::unregistered(32 * BLOCK).unwrap();
            let mut slabs: Vec<(Slab, u8)> = Vec::new();
            let mut mark = 0u8;
            for (op, x, y) in ops {
                mark = mark.wrapping_add(1);
                match op {
                    0 => if let Some(mut slab) = arena.alloc((x % 9) * BLOCK + y % BLOCK) {
                        slab.as_mut().fill(mark);
                        slabs.push((slab, mark));
                    },
                    1 if !slabs.is_empty() => drop(slabs.swap_remove(x % slabs.len())),
                    2 if !slabs.is_empty() => {
                        let (slab, old) = slabs.swap_remove(x % slabs.len());
                        match slab.split_at((y % 9) * BLOCK) {
                            Ok((a, b)) => slabs.extend([(a, old), (b, old)]),
                            Err(slab) => slabs.push((slab, old)),
                        }
                    }
                    3 if slabs.len() > 1 => {
                        let (a, mark_a) = slabs.swap_remove(x % slabs.len());
                        let (b, mark_b) = slabs.swap_remove(y % slabs.len());
                        match a.join(b) {
                            Ok(mut both) => { both.as_mut().fill(mark); slabs.push((both, mark)); }
                            Err((a, b)) => slabs.extend([(a, mark_a), (b, mark_b)]),
                        }
                    }
                    _ => {}
                }
                let mut ranges: Vec<_> =
                    slabs.iter().map(|(slab, _)| slab.as_ref().as_ptr_range()).collect();
                ranges.sort_by_key(|range| range.start);
                prop_assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
                prop_assert!(slabs.iter().all(|(slab, mark)| slab.as_ref().iter().all(|byte| byte == mark)));
                let out: usize = slabs.iter().map(|(slab, _)| slab.len()).sum();
                prop_assert_eq!(out, arena.in_use());
            }
            slabs.clear();
            prop_assert_eq!(arena.alloc(32 * BLOCK).map(|slab| slab.len()), Some(32 * BLOCK));
        }
    }
}
