//! The pieces in which Dragonfly moves a blob, and who of us is the first to ask for each.
//!
//! Its daemon fetches a piece for each request that comes while it has none yet, and registers each with the scheduler
//! (dragonfly-client 1.5, `dragonfly-client/src/resource/task.rs`). So the second reader of a piece waits here for the
//! first one's first byte of it, which comes when the daemon has the whole piece.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::digest::Digest;
use crate::source::BlobRef;

/// Least and most bytes of a piece; between them a blob has about this many.
const LEAST: u64 = 4 << 20;
const MOST: u64 = 64 << 20;
const COUNT: u64 = 500;
/// Longest wait for the one who was first: past it, a second request is the smaller harm.
const PATIENCE: Duration = Duration::from_secs(2);
/// Pieces remembered as the daemon's own. Forgetting one costs a reader who comes second a short wait.
const REMEMBERED: usize = 1 << 16;

/// Bytes of a blob's pieces; its last one may be shorter.
pub(super) fn length(blob: &BlobRef) -> u64 {
    (blob.size / COUNT).checked_next_power_of_two().map_or(MOST, |length| length.clamp(LEAST, MOST))
}

type Key = (Digest, u64);

#[derive(Debug)]
enum Piece {
    /// Somebody asked and has no byte of it; the channel closes when that changes.
    Asked(watch::Receiver<()>),
    /// The daemon had it.
    There,
}

/// What is known of the pieces of all blobs. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Pieces {
    all: Arc<Mutex<HashMap<Key, Piece>>>,
}

/// The right to ask for a range: of its pieces that nobody had, others wait for this one to have them.
#[derive(Debug)]
pub(super) struct Turn {
    pieces: Pieces,
    blob: Digest,
    length: u64,
    /// Those not begun yet.
    first: Range<u64>,
    /// Dropped with the turn, or before, which wakes those who wait.
    asked: HashMap<u64, watch::Sender<()>>,
}

impl Pieces {
    /// Waits until none of the pieces of a range is on its way for somebody else.
    pub(super) async fn turn(&self, blob: &BlobRef, range: &Range<u64>) -> Turn {
        let length = length(blob);
        let first = range.start / length..range.end.div_ceil(length);
        let until = Instant::now() + PATIENCE;
        loop {
            let mut other = match self.take(blob, length, &first, Instant::now() >= until) {
                Ok(turn) => return turn,
                Err(other) => other,
            };
            // An error is the end of the one who was first, too.
            let _ = tokio::time::timeout_at(until, other.changed()).await;
        }
    }

    /// Takes the turn, unless somebody else is to be waited for.
    fn take(
        &self,
        blob: &BlobRef,
        length: u64,
        first: &Range<u64>,
        anyway: bool,
    ) -> Result<Turn, watch::Receiver<()>> {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let mut asked = HashMap::new();
        if !anyway {
            for piece in first.clone() {
                if let Some(Piece::Asked(other)) = all.get(&(blob.digest, piece)) {
                    return Err(other.clone());
                }
            }
        }
        for piece in first.clone() {
            all.entry((blob.digest, piece)).or_insert_with(|| {
                let (sender, receiver) = watch::channel(());
                asked.insert(piece, sender);
                Piece::Asked(receiver)
            });
        }
        Ok(Turn { pieces: self.clone(), blob: blob.digest, length, first: first.clone(), asked })
    }
}

impl Turn {
    /// Bytes up to `at` have come.
    pub(super) fn reached(&mut self, at: u64) {
        let begun = at.div_ceil(self.length);
        if begun <= self.first.start {
            return;
        }
        let mut all = self.pieces.all.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= REMEMBERED {
            all.retain(|_, piece| matches!(piece, Piece::Asked(_)));
        }
        for piece in self.first.start..begun {
            if self.asked.remove(&piece).is_some() {
                all.insert((self.blob, piece), Piece::There);
            }
        }
        self.first.start = begun;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut all = self.pieces.all.lock().unwrap_or_else(PoisonError::into_inner);
        for piece in self.asked.keys() {
            all.remove(&(self.blob, *piece));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn blob(size: u64) -> BlobRef {
        BlobRef { digest: Digest::from_bytes([7; 32]), size }
    }

    #[test]
    fn pieces_are_as_long_as_dragonfly_makes_them() {
        // `Piece::calculate_piece_length` of dragonfly-client 1.5: tests of its own have the same pairs.
        for (size, expect) in [
            (0, 4 * MIB),
            (64 * MIB, 4 * MIB),
            (2000 * MIB, 4 * MIB),
            (2001 * MIB, 8 * MIB),
            (30 << 30, 64 * MIB),
            (u64::MAX, 64 * MIB),
        ] {
            assert_eq!(length(&blob(size)), expect, "{size}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_second_reader_of_a_piece_waits_for_the_first_one_s_first_byte() {
        let (pieces, blob) = (Pieces::default(), blob(64 * MIB));
        let mut one = pieces.turn(&blob, &(0..9 * MIB)).await;
        // Another piece is nobody's yet.
        drop(pieces.turn(&blob, &(12 * MIB..13 * MIB)).await);
        let second = |range: Range<u64>| {
            let pieces = pieces.clone();
            tokio::spawn(async move { pieces.turn(&blob, &range).await })
        };
        let (early, late) = (second(MIB..2 * MIB), second(8 * MIB..9 * MIB));
        tokio::time::sleep(PATIENCE / 4).await;
        assert!(!early.is_finished() && !late.is_finished());
        one.reached(1);
        tokio::time::sleep(PATIENCE / 4).await;
        assert!(early.is_finished() && !late.is_finished());
        // It never gets there: the next one is the first.
        drop(one);
        tokio::time::sleep(PATIENCE / 4).await;
        assert!(late.is_finished());
        let _first = late.await.unwrap();
        let waits = second(8 * MIB..9 * MIB);
        tokio::time::sleep(PATIENCE / 2).await;
        assert!(!waits.is_finished());
        // Nobody waits for ever.
        tokio::time::sleep(PATIENCE).await;
        assert!(waits.is_finished());
        // What came once is asked for at once by all.
        let _reader = pieces.turn(&blob, &(0..MIB)).await;
        let other = second(0..MIB);
        tokio::time::sleep(PATIENCE / 4).await;
        assert!(other.is_finished());
    }
}
