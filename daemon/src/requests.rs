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
use skimmer_fetcher::source::Body;
use tokio::sync::oneshot;

use crate::arena::Slab;
use crate::fetch::Order;

/// Stored bytes that are rather read and thrown away than paid for with a request of their own.
const SKIP: u64 = 1 << 20;
/// How long a body waits for the flight that takes it over.
const IDLE: Duration = Duration::from_secs(2);
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
    body: oneshot::Receiver<Body>,
}

#[derive(Default)]
struct Table {
    entries: Vec<Entry>,
    next: u64,
}

impl Table {
    fn add(&mut self, blob: Digest, source: String, range: Range<u64>, body: oneshot::Receiver<Body>) -> u64 {
        let number = self.next;
        self.next += 1;
        if self.entries.len() >= MOST {
            self.entries.remove(0);
        }
        let Range { start: position, end: until } = range;
        self.entries.push(Entry { number, blob, source, position, until, body });
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

/// Takes what is left of a body.
pub(crate) struct Rest {
    number: u64,
    requests: Requests,
    body: oneshot::Sender<Body>,
}

impl Rest {
    /// Hands the body to the next flight, or keeps it for a moment until that one comes.
    pub(crate) fn give(self, body: Body) {
        if self.body.send(body).is_ok() && self.requests.has(self.number) {
            let (requests, number) = (self.requests, self.number);
            tokio::spawn(async move {
                tokio::time::sleep(IDLE).await;
                requests.forget(number);
            });
        }
    }
}

impl Requests {
    /// Takes a body of a blob from its first byte to `until`, which nobody has read of yet, for the first flight.
    pub(crate) fn offer(&self, ahead: Ahead, until: u64) {
        let Ahead { blob, source, body } = ahead;
        let number =
            self.table.lock().unwrap_or_else(PoisonError::into_inner).add(blob, source, 0..until, body);
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
        let until = before.as_ref().map_or(order.until, |entry| entry.until);
        let after = (until > range.end).then(|| {
            let (sender, body) = oneshot::channel();
            let number = table.add(blob, source.to_owned(), range.end..until, body);
            Rest { number, requests: self.clone(), body: sender }
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
