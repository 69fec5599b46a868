//! Requests that go on over several flights.
//!
//! A flight whose engine has more queued behind it asks its source for all of that at once. When its own bytes have
//! come it hands the body to the flight that starts where it ends, so a scan costs one request, however small the
//! flights are that it is cut into, and a flight that has not begun costs nothing to give up.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use skimmer_fetcher::Digest;
use skimmer_fetcher::chunk::ChunkSpec;
use skimmer_fetcher::source::{Body, Urgency};
use tokio::sync::oneshot;

use crate::arena::Slab;
use crate::fetch::Order;

/// Stored bytes that are rather read and thrown away than paid for with a request of their own.
const SKIP: u64 = 1 << 20;
/// How long a body waits for the flight that takes it over, if a read opened it: the reader may have gone elsewhere.
const IDLE: Duration = Duration::from_secs(2);
/// If nobody waits for it: as long as the other blobs of a prefetch take for their turns. What it was sent meanwhile
/// would be sent again.
const TURN: Duration = Duration::from_secs(15);
/// How long one waits that was asked for before the blob was known.
const AHEAD: Duration = Duration::from_secs(30);
/// Bodies that may wait at once; each holds a connection.
const MOST: usize = 32;

/// A body that is there, or will be when the flight that reads it has its bytes.
struct Entry {
    number: u64,
    blob: Digest,
    source: String,
    /// Where in the stored blob it will stand, and where it ends.
    position: u64,
    until: u64,
    /// How long it waits for the flight that takes it over.
    idle: Duration,
    body: oneshot::Receiver<Body>,
}

#[derive(Default)]
struct Table {
    entries: Vec<Entry>,
    next: u64,
}

impl Table {
    fn is_full(&self) -> bool {
        self.entries.len() >= MOST
    }

    fn add(&mut self, entry: Entry) -> u64 {
        let number = self.next;
        self.next += 1;
        if self.is_full() {
            self.entries.remove(0);
        }
        self.entries.push(Entry { number, ..entry });
        number
    }
}

/// A body from a blob's first byte that was asked for before anybody knew what is in the blob.
pub(crate) struct Ahead {
    pub(crate) blob: Digest,
    /// Name of the source.
    pub(crate) source: String,
    pub(crate) body: oneshot::Receiver<Body>,
}

/// The bodies of one driver that flights may take over.
#[derive(Clone, Default)]
pub(crate) struct Requests {
    table: Arc<Mutex<Table>>,
}

/// One flight's part in a request.
pub(crate) struct Share {
    /// The body of the flight before it; an error when that one ended otherwise.
    pub(crate) before: Option<oneshot::Receiver<Body>>,
    /// Where the rest of the body goes.
    pub(crate) after: Option<Rest>,
    /// What to ask the source for when there is no body to take over: up to this stored byte.
    pub(crate) until: u64,
}

impl Drop for Share {
    /// A flight that is given up before its turn passes the body on to the one behind it.
    fn drop(&mut self) {
        if let (Some(before), Some(after)) = (self.before.take(), self.after.take())
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move {
                if let Ok(body) = before.await {
                    after.give(body);
                }
            });
        }
    }
}

impl Share {
    /// The body of the flight before it, when that stands at or a little before this one's first byte.
    pub(crate) async fn take_over(&mut self, start: u64) -> Option<Body> {
        let body = self.before.as_mut()?.await;
        self.before = None;
        body.ok().filter(|body| body.position() <= start && start - body.position() <= 2 * SKIP)
    }

    /// A request of its own.
    pub(crate) fn alone(until: u64) -> Self {
        Self { before: None, after: None, until }
    }
}

/// Takes what is left of a body. When it is dropped, there is none.
pub(crate) struct Rest {
    number: u64,
    idle: Duration,
    requests: Requests,
    body: Option<oneshot::Sender<Body>>,
}

impl Rest {
    /// Hands the body to the next flight, or keeps it for a moment until that one comes.
    pub(crate) fn give(mut self, body: Body) {
        let Some(next) = self.body.take() else { return };
        if next.send(body).is_ok() && self.requests.has(self.number) {
            let (number, idle, requests) = (self.number, self.idle, self.requests.clone());
            tokio::spawn(async move {
                tokio::time::sleep(idle).await;
                requests.forget(number);
            });
        }
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        if self.body.take().is_some() {
            self.requests.forget(self.number);
        }
    }
}

impl Requests {
    /// Takes a body of a blob from its first byte to `until`, which nobody has read of yet, for the first flight.
    pub(crate) fn offer(&self, ahead: Ahead, until: u64) {
        let Ahead { blob, source, body } = ahead;
        let entry = Entry { number: 0, blob, source, position: 0, until, idle: IDLE, body };
        let number = self.table.lock().unwrap_or_else(PoisonError::into_inner).add(entry);
        let requests = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(AHEAD).await;
            requests.forget(number);
        });
    }

    /// Finds the flight before this one and makes a place for the one after it.
    pub(crate) fn join(&self, order: &Order) -> Share {
        let Some(range) = stored_range(&order.chunks) else { return Share::alone(order.until) };
        let (blob, source) = (order.blob.digest, order.source.name());
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |entry: &Entry| {
            entry.blob == blob
                && entry.source == source
                && entry.position <= range.start
                && range.start - entry.position <= SKIP
                && range.end <= entry.until
        };
        let found = table.entries.iter().enumerate().filter(|(_, entry)| fits(entry));
        let found = found.max_by_key(|(_, entry)| entry.position).map(|(at, _)| at);
        let before = found.map(|at| table.entries.remove(at));
        let (until, idle) = match &before {
            Some(entry) => (entry.until, entry.idle),
            // In turn, bodies that make room for each other would each be gone when their flight comes.
            None if order.urgency == Urgency::Ahead && table.is_full() => (range.end, IDLE),
            None => (order.until, if order.urgency == Urgency::Ahead { TURN } else { IDLE }),
        };
        let after = (until > range.end).then(|| {
            let (sender, body) = oneshot::channel();
            let (source, position) = (source.to_owned(), range.end);
            let number = table.add(Entry { number: 0, blob, source, position, until, idle, body });
            Rest { number, idle, requests: self.clone(), body: Some(sender) }
        });
        Share { before: before.map(|entry| entry.body), after, until }
    }

    fn has(&self, number: u64) -> bool {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.entries.iter().any(|entry| entry.number == number)
    }

    fn forget(&self, number: u64) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.entries.retain(|entry| entry.number != number);
    }
}

/// From the first to the last stored byte of a flight's chunks, in whatever order they are.
fn stored_range(chunks: &[(u32, ChunkSpec, Slab)]) -> Option<Range<u64>> {
    let ends = chunks.iter().map(|(_, spec, _)| {
        (spec.stored_offset, spec.stored_offset.saturating_add(u64::from(spec.stored_len)))
    });
    ends.reduce(|(start, end), (other, last)| (start.min(other), end.max(last)))
        .map(|(start, end)| start..end)
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;
    use skimmer_engine::FlightId;
    use skimmer_fetcher::chunk::{ChunkDigest, Codec};
    use skimmer_fetcher::layout::Layout;
    use skimmer_fetcher::source::BlobRef;

    use super::*;
    use crate::arena::Arena;

    const STEP: u32 = 4096;

    /// Flights of one chunk each, of blobs of many.
    struct Flights {
        arena: Arena,
        source: Arc<Layout>,
        _dir: tempfile::TempDir,
    }

    impl Flights {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let source = Arc::new(Layout::create(dir.path().join("layout")).unwrap());
            Self { arena: Arena::unregistered(1 << 20).unwrap(), source, _dir: dir }
        }

        fn blob(number: u8) -> BlobRef {
            BlobRef { digest: Digest::of(&[number]), size: 1 << 20 }
        }

        /// The flight of the chunk `at` of the blob `number`; more is meant to follow.
        fn order(&self, number: u8, at: u32, urgency: Urgency) -> Order {
            let stored_offset = u64::from(at * STEP);
            let digest = ChunkDigest::Blake3([0; 32]);
            let spec = ChunkSpec { stored_offset, stored_len: STEP, len: STEP, codec: Codec::None, digest };
            let slab = self.arena.alloc(4096).unwrap();
            Order {
                flight: FlightId(0),
                blob: Self::blob(number),
                source: Arc::clone(&self.source) as _,
                urgency,
                shares: true,
                until: 1 << 20,
                chunks: vec![(at, spec, slab)],
            }
        }

        /// What is left of a reply when the first flight has its bytes.
        fn rest(&self, number: u8) -> Body {
            let range = u64::from(STEP)..1 << 20;
            let name = skimmer_fetcher::Source::name(&*self.source);
            Body::new(name, &Self::blob(number), range, None, futures_util::stream::empty().boxed())
        }
    }

    #[tokio::test]
    async fn in_turn_no_blob_makes_room_for_another() {
        let (flights, requests) = (Flights::new(), Requests::default());
        let most = u8::try_from(MOST).unwrap();
        let first: Vec<_> =
            (0..2 * most).map(|number| requests.join(&flights.order(number, 0, Urgency::Ahead))).collect();
        for (number, share) in first.iter().enumerate() {
            let keeps = number < MOST;
            assert_eq!(share.after.is_some(), keeps, "{number}");
            assert_eq!(share.until, if keeps { 1 << 20 } else { u64::from(STEP) }, "{number}");
        }
        let next: Vec<_> =
            (0..2 * most).map(|number| requests.join(&flights.order(number, 1, Urgency::Ahead))).collect();
        for (number, share) in next.iter().enumerate() {
            assert_eq!(share.before.is_some(), number < MOST, "{number}");
        }
        // Somebody waits for this one.
        let share = requests.join(&flights.order(99, 0, Urgency::Demand));
        assert!(share.after.is_some() && share.until == 1 << 20);
        // What was given up takes no place.
        drop((first, next, share));
        tokio::task::yield_now().await;
        assert!(requests.join(&flights.order(99, 0, Urgency::Ahead)).after.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_of_a_prefetch_waits_longer_than_one_of_a_read() {
        let (flights, requests) = (Flights::new(), Requests::default());
        for (number, urgency, wait, is_there) in [
            (0, Urgency::Demand, IDLE / 2, true),
            (1, Urgency::Demand, IDLE * 2, false),
            (2, Urgency::Ahead, IDLE * 2, true),
            (3, Urgency::Ahead, TURN * 2, false),
        ] {
            let mut share = requests.join(&flights.order(number, 0, urgency));
            share.after.take().unwrap().give(flights.rest(number));
            tokio::time::sleep(wait).await;
            let mut next = requests.join(&flights.order(number, 1, Urgency::Ahead));
            let body = next.take_over(STEP.into()).await;
            assert_eq!(body.is_some(), is_there, "{number}");
        }
    }
}
