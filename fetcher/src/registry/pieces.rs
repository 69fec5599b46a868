//! The pieces in which Dragonfly moves a blob, and who of us is the first to ask for each.
//!
//! Its daemon fetches a piece for each request that comes while it has none yet, and registers each with the scheduler
//! (dragonfly-client 1.5, `dragonfly-client/src/resource/task.rs`). So the second reader of a piece waits here for the
//! first one's first byte of it, which comes when the daemon has the whole piece.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
pub(super) struct Pieces(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    all: HashMap<Key, Piece>,
    /// How many the daemon has, by blob.
    there: HashMap<Digest, u64>,
}

/// The right to ask for a range: of its first piece, if nobody had that, others wait for this one to have it. Later ones
/// are not claimed: a long request may be read slowly, and what its reader overtakes itself for must not wait.
#[derive(Debug)]
pub(super) struct Turn {
    pieces: Pieces,
    key: Key,
    /// Dropped with the turn, or before, which wakes those who wait.
    asked: Option<watch::Sender<()>>,
}

impl Pieces {
    /// Waits until the first piece of a range is not on its way for somebody else.
    pub(super) async fn turn(&self, blob: &BlobRef, range: &Range<u64>) -> Turn {
        let key = (blob.digest, range.start / length(blob));
        let turn = |asked| Turn { pieces: self.clone(), key, asked };
        let until = Instant::now() + PATIENCE;
        loop {
            let mut other = match self.known().all.entry(key) {
                Entry::Vacant(place) => {
                    let (sender, receiver) = watch::channel(());
                    place.insert(Piece::Asked(receiver));
                    return turn(Some(sender));
                }
                Entry::Occupied(place) => match place.get() {
                    Piece::There => return turn(None),
                    Piece::Asked(other) => other.clone(),
                },
            };
            // An error is the end of the one who was first, too.
            if tokio::time::timeout_at(until, other.changed()).await.is_err() {
                return turn(None);
            }
        }
    }

    /// Whether so much of a blob was read by way of the daemon that it may as well have the rest: a quarter, and more
    /// than one piece.
    pub(super) fn is_hot(&self, blob: &BlobRef) -> bool {
        let there = self.known().there.get(&blob.digest).copied().unwrap_or(0);
        there > 1 && there.saturating_mul(4) >= blob.size.div_ceil(length(blob))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn {
    /// The first byte of the range has come: the daemon has that piece, and gets the others of the range.
    pub(super) fn begun(&mut self) {
        if self.asked.take().is_none() {
            return;
        }
        let mut known = self.pieces.known();
        if known.all.len() >= REMEMBERED {
            known.all.retain(|_, piece| matches!(piece, Piece::Asked(_)));
            known.there.clear();
        }
        known.all.insert(self.key, Piece::There);
        *known.there.entry(self.key.0).or_default() += 1;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.asked.is_some() {
            self.pieces.known().all.remove(&self.key);
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

    #[tokio::test]
    async fn a_blob_is_hot_when_a_quarter_of_its_pieces_came() {
        let (pieces, blob) = (Pieces::default(), blob(48 * MIB));
        for (at, hot) in [(0, false), (1, false), (4, true), (11, true)] {
            // A piece that is there counts once.
            pieces.turn(&blob, &(at * 4 * MIB..at * 4 * MIB + 1)).await.begun();
            pieces.turn(&blob, &(at * 4 * MIB + 1..at * 4 * MIB + 2)).await.begun();
            assert_eq!(pieces.is_hot(&blob), hot, "{at}");
        }
        assert!(!pieces.is_hot(&BlobRef { digest: Digest::from_bytes([8; 32]), size: MIB }));
    }

    #[tokio::test(start_paused = true)]
    async fn the_second_reader_of_a_piece_waits_for_the_first_one_s_first_byte() {
        let (pieces, blob) = (Pieces::default(), blob(64 * MIB));
        let second = |at: u64| {
            let pieces = pieces.clone();
            tokio::spawn(async move { pieces.turn(&blob, &(at..at + MIB)).await })
        };
        let mut one = pieces.turn(&blob, &(0..9 * MIB)).await;
        // Another piece is nobody's yet, though the request goes on into it.
        drop(pieces.turn(&blob, &(8 * MIB..9 * MIB)).await);
        let early = second(MIB);
        tokio::time::sleep(PATIENCE / 4).await;
        assert!(!early.is_finished());
        one.begun();
        tokio::time::sleep(PATIENCE / 4).await;
        assert!(early.is_finished());
        // The first one never gets a byte: the next one is the first.
        let gives_up = pieces.turn(&blob, &(8 * MIB..9 * MIB)).await;
        let late = second(8 * MIB);
        tokio::time::sleep(PATIENCE / 4).await;
        assert!(!late.is_finished());
        drop(gives_up);
        tokio::time::sleep(PATIENCE / 4).await;
        let _first = late.await.unwrap();
        let waits = second(8 * MIB);
        tokio::time::sleep(PATIENCE / 2).await;
        assert!(!waits.is_finished());
        // Nobody waits for ever.
        tokio::time::sleep(PATIENCE).await;
        assert!(waits.is_finished());
        // What came once is asked for at once by all.
        let _reader = pieces.turn(&blob, &(0..MIB)).await;
        let other = second(0);
        tokio::time::sleep(PATIENCE / 4).await;
        assert!(other.is_finished());
    }
}
