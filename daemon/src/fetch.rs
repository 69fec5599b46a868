//! The network side of a flight: a tokio task fetches, decodes and verifies its chunks, and hands each one to the
//! driver as it is done.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use skimmer_engine::{Failure, FailureClass, FlightId};
use skimmer_fetcher::chunk::{self, ChunkError, ChunkSpec, FetchError, Verified};
use skimmer_fetcher::source::{BlobRef, ErrorClass, Source, SourceError, Urgency};
use tokio::runtime::Handle as Runtime;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::arena::{Arena, Slab};
use crate::blob::BlobChunk;
use crate::metrics::{FetchResult, Metrics, Stage};
use crate::requests::{Ahead, Requests, Share};
use crate::ring::Waker;

/// Fewer bytes than this say nothing about a source's bandwidth.
const MEASURABLE: u64 = 64 * 1024;

/// What a fetch task tells the driver.
pub(crate) enum Fetched {
    /// One chunk is verified. `position` counts in the object's chunk list.
    Chunk { flight: FlightId, position: u32, buffer: Verified<Slab> },
    /// Nothing more comes, and no buffer of the flight is in the task's hands any more. Once per started flight.
    Ended { flight: FlightId, outcome: Outcome },
}

/// How a fetch ended.
pub(crate) struct Outcome {
    pub(crate) result: Result<(), Failure>,
    /// The failure in words: source, blob, range, cause.
    pub(crate) message: Option<String>,
    /// Time to the first byte and bytes per second, when the fetch was good and large enough to tell.
    pub(crate) measured: Option<(Duration, u64)>,
    /// Whether it made a request of its own.
    pub(crate) opened: bool,
}

impl Outcome {
    fn failed(class: FailureClass, retry_after: Option<Duration>, message: String) -> Self {
        Self {
            result: Err(Failure { class, retry_after }),
            message: Some(message),
            measured: None,
            opened: true,
        }
    }
}

/// A planned fetch with its buffers.
pub(crate) struct Order {
    pub(crate) flight: FlightId,
    pub(crate) blob: BlobRef,
    pub(crate) source: Arc<dyn Source>,
    /// Who waits for it.
    pub(crate) urgency: Urgency,
    /// Whether it may share a request with the flights before and after it.
    pub(crate) shares: bool,
    /// End, in the stored blob, of what is meant to follow on the same request.
    pub(crate) until: u64,
    /// Each chunk: its position in the object's list, what it is, where it goes.
    pub(crate) chunks: Vec<(u32, ChunkSpec, Slab)>,
}

/// Cuts one contiguous slab, the place of the run `chunks` (positions `first..`), into a buffer per chunk. The space
/// between chunks is given back. `None` when the arena has no such range free now.
pub(crate) fn buffers(
    arena: &Arena,
    first: u32,
    chunks: &[BlobChunk],
) -> Option<Vec<(u32, ChunkSpec, Slab)>> {
    let start = chunks.first()?.start;
    let span = chunks.last()?.padded_end() - start;
    let mut rest = Some(arena.alloc(usize::try_from(span).ok()?)?);
    let mut at = start;
    let mut out = Vec::with_capacity(chunks.len());
    for (position, chunk) in (first..).zip(chunks) {
        if chunk.start > at {
            rest = Some(cut(&mut rest, chunk.start - at)?.1?);
        }
        let (buffer, after) = cut(&mut rest, chunk.padded_len())?;
        rest = after;
        at = chunk.padded_end();
        out.push((position, chunk.spec, buffer));
    }
    Some(out)
}

/// The first `len` bytes of the slab, and what is left of it.
fn cut(slab: &mut Option<Slab>, len: u64) -> Option<(Slab, Option<Slab>)> {
    let slab = slab.take()?;
    match slab.split_at(usize::try_from(len).ok()?) {
        Ok((first, rest)) => Some((first, Some(rest))),
        Err(all) => Some((all, None)),
    }
}

/// Starts and cancels fetch tasks.
pub(crate) struct Fetches {
    runtime: Runtime,
    queue: mpsc::Sender<Fetched>,
    waker: Waker,
    metrics: Metrics,
    running: HashMap<FlightId, AbortHandle>,
    requests: Requests,
}

impl Fetches {
    pub(crate) fn new(
        runtime: Runtime,
        queue: mpsc::Sender<Fetched>,
        waker: Waker,
        metrics: Metrics,
    ) -> Self {
        Self { runtime, queue, waker, metrics, running: HashMap::new(), requests: Requests::default() }
    }

    /// Keeps a body for the first flight of its blob.
    pub(crate) fn offer(&self, ahead: Ahead, until: u64) {
        self.metrics.source_requests.inc();
        let _runtime = self.runtime.enter();
        self.requests.offer(ahead, until);
    }

    /// Starts a fetch; its end comes as [`Fetched::Ended`], whatever happens.
    pub(crate) fn start(&mut self, order: Order) {
        let flight = order.flight;
        // In the engine's order, so that each flight finds the one before it.
        let share = if order.shares { self.requests.join(&order) } else { Share::alone(order.until) };
        let task = fetch(order, share, self.queue.clone(), self.waker.clone(), self.metrics.clone());
        let fetch = self.runtime.spawn(task);
        self.running.insert(flight, fetch.abort_handle());
        let (queue, waker, metrics) = (self.queue.clone(), self.waker.clone(), self.metrics.clone());
        self.runtime.spawn(async move {
            let outcome = match fetch.await {
                Ok(outcome) => outcome,
                Err(error) if error.is_cancelled() => {
                    metrics.fetch(FetchResult::cancelled);
                    Outcome::failed(FailureClass::Transient, None, "the fetch was cancelled".to_owned())
                }
                Err(error) => {
                    metrics.fetch(FetchResult::failed);
                    let message = format!("the fetch task ended in a panic: {error}");
                    tracing::error!(flight = flight.0, "{message}");
                    Outcome::failed(FailureClass::Fatal, None, message)
                }
            };
            // An error means that the driver is gone, and with it everyone who waits.
            let _ = queue.send(Fetched::Ended { flight, outcome }).await;
            waker.wake();
        });
    }

    /// Ends a fetch early; [`Fetched::Ended`] still comes.
    pub(crate) fn cancel(&mut self, flight: FlightId) {
        if let Some(task) = self.running.remove(&flight) {
            task.abort();
        }
    }

    /// To be called when [`Fetched::Ended`] came.
    pub(crate) fn ended(&mut self, flight: FlightId) {
        self.running.remove(&flight);
    }

    pub(crate) fn cancel_all(&mut self) {
        for (_, task) in self.running.drain() {
            task.abort();
        }
    }
}

async fn fetch(
    order: Order,
    mut share: Share,
    queue: mpsc::Sender<Fetched>,
    waker: Waker,
    metrics: Metrics,
) -> Outcome {
    let Order { flight, blob, source, urgency, mut chunks, .. } = order;
    // The chunk list is in device order; a source is read in stored order.
    chunks.sort_by_key(|(_, spec, _)| spec.stored_offset);
    let stored = stored_bytes(&chunks);
    let positions: Vec<u32> = chunks.iter().map(|(position, ..)| *position).collect();
    let plan: Vec<_> = chunks.into_iter().map(|(_, spec, buffer)| (spec, buffer)).collect();
    let start = Instant::now();
    let mut first_chunk = None;
    let mut opened = None;
    let result = async {
        let Some(range) = chunk::stored_range(&plan) else { return Ok(()) };
        let body = match share.take_over(range.start).await {
            Some(body) => body,
            None => {
                metrics.source_requests.inc();
                let range = range.start..range.end.max(share.until.min(blob.size));
                let body = source.read(&blob, range, urgency).await?;
                opened = Some(Instant::now());
                body
            }
        };
        metrics.fetched_bytes.inc_by(stored);
        let on_chunk = |at: usize, buffer: Verified<Slab>| {
            first_chunk.get_or_insert_with(Instant::now);
            metrics.verified_bytes.inc_by(u64::try_from(buffer.len()).unwrap_or(u64::MAX));
            let message = Fetched::Chunk { flight, position: positions[at], buffer };
            // There is a place in the queue for each block of buffer memory, so it is full only when the driver is
            // gone.
            if queue.try_send(message).is_ok() {
                waker.wake();
            }
        };
        let hand_over = |body| {
            if let Some(after) = share.after.take() {
                after.give(body);
            }
        };
        chunk::fetch_from(source.name(), &blob, (body, urgency), plan, on_chunk, hand_over).await
    }
    .await;
    let end = Instant::now();
    let first_chunk = first_chunk.unwrap_or(end);
    metrics.stage(Stage::fetch, first_chunk - start);
    metrics.stage(Stage::verify, end - first_chunk);
    metrics.fetch(if result.is_ok() { FetchResult::ok } else { FetchResult::failed });
    match result {
        Ok(()) => {
            let measured = opened.filter(|_| stored >= MEASURABLE).and_then(|opened| {
                let nanos = (end - opened).as_nanos().max(1);
                let bandwidth = u128::from(stored).checked_mul(1_000_000_000)? / nanos;
                Some((opened - start, u64::try_from(bandwidth).ok()?))
            });
            Outcome { result: Ok(()), message: None, measured, opened: opened.is_some() }
        }
        Err(error) => {
            let (class, retry_after) = classify(&error);
            Outcome::failed(class, retry_after, error.to_string())
        }
    }
}

fn stored_bytes(chunks: &[(u32, ChunkSpec, Slab)]) -> u64 {
    let range = |spec: &ChunkSpec| -> Range<u64> {
        spec.stored_offset..spec.stored_offset.saturating_add(u64::from(spec.stored_len))
    };
    match (chunks.first(), chunks.last()) {
        (Some((_, first, _)), Some((_, last, _))) => range(last).end.saturating_sub(range(first).start),
        _ => 0,
    }
}

/// What a failure means for the planning of retries.
fn classify(error: &FetchError) -> (FailureClass, Option<Duration>) {
    match error {
        FetchError::Source(SourceError { class, retry_after, .. }) => {
            let class = match class {
                ErrorClass::Transient | ErrorClass::Io => FailureClass::Transient,
                ErrorClass::Denied
                | ErrorClass::Certificate
                | ErrorClass::Unsupported
                | ErrorClass::NoRanges => FailureClass::Denied,
                ErrorClass::NotFound | ErrorClass::BadRange => FailureClass::NotFound,
                ErrorClass::BadReply | ErrorClass::Corrupt => FailureClass::Corrupt,
                // A class of a later version: assume that it may pass.
                _ => FailureClass::Transient,
            };
            (class, *retry_after)
        }
        FetchError::Chunk { error, .. } => match error {
            // The image itself is wrong, no source can help.
            ChunkError::Spec(_) | ChunkError::Buffer { .. } => (FailureClass::Fatal, None),
            _ => (FailureClass::Corrupt, None),
        },
        FetchError::Plan(_) => (FailureClass::Fatal, None),
    }
}

#[cfg(test)]
mod tests {
    use skimmer_fetcher::chunk::{ChunkDigest, Codec};

    use super::*;

    fn chunk(index: u32, start: u64, len: u32) -> BlobChunk {
        let digest = ChunkDigest::Blake3([0; 32]);
        let spec = ChunkSpec { stored_offset: start, stored_len: len, len, codec: Codec::None, digest };
        BlobChunk { index, start, spec }
    }

    #[test]
    fn buffers_lie_as_their_chunks_do() {
        let arena = Arena::unregistered(16 * 4096).unwrap();
        let chunks = [chunk(0, 4096, 5000), chunk(1, 12288, 4096), chunk(4, 24576, 1)];
        let cut = buffers(&arena, 7, &chunks).unwrap();
        let base = cut[0].2.as_ref().as_ptr().addr();
        let seen: Vec<_> =
            cut.iter().map(|(at, _, slab)| (*at, slab.as_ref().as_ptr().addr() - base, slab.len())).collect();
        assert_eq!(seen, [(7, 0, 8192), (8, 8192, 4096), (9, 20480, 4096)]);
        // The two blocks between the second and the third chunk are free again.
        assert_eq!(arena.in_use(), 4 * 4096);
        assert!(buffers(&arena, 0, &[chunk(0, 0, 13 * 4096)]).is_none());
        drop(cut);
        assert!(buffers(&arena, 0, &[chunk(0, 0, 16 * 4096)]).is_some());
        assert_eq!(arena.in_use(), 0);
    }

    #[test]
    fn failures_are_told_apart() {
        let source = |class| FetchError::Source(SourceError::new(class, "s", "d"));
        assert_eq!(classify(&source(ErrorClass::Transient)).0, FailureClass::Transient);
        assert_eq!(classify(&source(ErrorClass::Denied)).0, FailureClass::Denied);
        assert_eq!(classify(&source(ErrorClass::NotFound)).0, FailureClass::NotFound);
        assert_eq!(classify(&source(ErrorClass::BadReply)).0, FailureClass::Corrupt);
        assert_eq!(classify(&FetchError::Plan("p".to_owned())).0, FailureClass::Fatal);
        let wait = Some(Duration::from_secs(3));
        let busy = SourceError::new(ErrorClass::Transient, "s", "d").retry_after(wait);
        assert_eq!(classify(&FetchError::Source(busy)).1, wait);
    }
}
