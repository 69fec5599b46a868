//! What every supplier of blob bytes offers, and how it fails.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tokio::sync::{Semaphore, mpsc};

use crate::digest::Digest;

/// A blob as a trusted document (manifest or bootstrap) names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlobRef {
    /// sha256 of the whole blob as it is stored.
    pub digest: Digest,
    /// Stored size in bytes.
    pub size: u64,
}

impl fmt::Display for BlobRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes)", self.digest, self.size)
    }
}

/// Who waits for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Urgency {
    /// A read, now.
    Demand,
    /// Nobody yet: read-ahead, prefetch, background completion.
    Ahead,
}

/// Anything that yields blob bytes.
///
/// The bytes are *not* verified here: only [`crate::chunk`] and the whole-blob readers do that.
#[async_trait::async_trait]
pub trait Source: Send + Sync {
    /// A name for logs and errors; holds no secret.
    fn name(&self) -> &str;

    /// Reads `range` (bytes of the stored blob). The body ends exactly at the end of the range, or with an
    /// error. An empty range, or one that leaves the blob, is an error of class [`ErrorClass::BadRange`].
    async fn read(&self, blob: &BlobRef, range: Range<u64>, urgency: Urgency) -> Result<Body, SourceError>;

    /// As [`read`](Self::read), from a copy of the whole blob that is downloaded once: for a source whose server
    /// ignores ranges.
    async fn read_whole(&self, blob: &BlobRef, range: Range<u64>) -> Result<Body, SourceError> {
        let detail = "it cannot give a whole blob";
        Err(SourceError::new(ErrorClass::Unsupported, self.name(), detail).reading(blob, range))
    }

    /// How many hosts it can turn to, one after the other, when bytes turn out wrong.
    fn width(&self) -> u32 {
        1
    }

    /// Stored bytes of the blob that it moves at once, whatever is asked of them; `None` where just what is asked moves.
    fn piece(&self, _: &BlobRef) -> Option<u64> {
        None
    }

    /// Whether the source holds the blob with the size that `blob` states.
    async fn has(&self, blob: &BlobRef) -> Result<bool, SourceError>;
}

/// What a failure means for the one who plans retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorClass {
    /// May pass: connection, time-out, truncated body, 408, 425, 429, 5xx. The same request may be repeated.
    Transient,
    /// 401 after the credentials were tried, or 403. Not for retry at this source.
    Denied,
    /// The source does not have the blob or manifest.
    NotFound,
    /// The source answered against the protocol; its bytes must not be used.
    BadReply,
    /// The range is empty or outside the blob, or the server says 416: our mistake or a wrong blob size.
    BadRange,
    /// The server ignores ranges.
    NoRanges,
    /// The certificate of the server was refused.
    Certificate,
    /// The request cannot be made this way: plain HTTP where it is not allowed, an unknown form.
    Unsupported,
    /// The local file system failed.
    Io,
    /// Content does not match its digest.
    Corrupt,
}

/// A failed read: what, where, and whether it may pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceError {
    /// What the failure means for retries.
    pub class: ErrorClass,
    /// How long the server asked us to stay away (`Retry-After`, clamped to ten minutes).
    pub retry_after: Option<Duration>,
    /// The source's name.
    pub source: Box<str>,
    /// What was read, when it was a blob.
    pub reading: Option<Box<Reading>>,
    /// What went wrong. Holds no credential, token or query string.
    pub detail: Box<str>,
}

/// What a failed read was to give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The blob.
    pub blob: Digest,
    /// Bytes of the stored blob.
    pub range: Range<u64>,
}

impl SourceError {
    /// An error of `class` at the source named `source`.
    pub fn new(class: ErrorClass, source: impl Into<Box<str>>, detail: impl Into<Box<str>>) -> Self {
        Self { class, retry_after: None, source: source.into(), reading: None, detail: detail.into() }
    }

    /// Adds what was being read.
    #[must_use]
    pub fn reading(mut self, blob: &BlobRef, range: Range<u64>) -> Self {
        self.reading = Some(Box::new(Reading { blob: blob.digest, range }));
        self
    }

    /// Adds the time the server asked for.
    #[must_use]
    pub fn retry_after(mut self, after: Option<Duration>) -> Self {
        self.retry_after = after;
        self
    }

    /// Whether the same request to the same source may succeed later.
    pub fn may_pass(&self) -> bool {
        self.class == ErrorClass::Transient
    }
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.source)?;
        if let Some(reading) = &self.reading {
            let Reading { blob, range } = &**reading;
            write!(f, "blob {blob} bytes {}..{}: ", range.start, range.end)?;
        }
        write!(f, "{}", self.detail)?;
        if let Some(after) = self.retry_after {
            write!(f, " (the server asks to wait {} s)", after.as_secs())?;
        }
        Ok(())
    }
}

impl std::error::Error for SourceError {}

/// Refuses ranges that are empty or leave the blob.
pub(crate) fn check_range(source: &str, blob: &BlobRef, range: &Range<u64>) -> Result<(), SourceError> {
    if range.start >= range.end || range.end > blob.size {
        let detail = format!("the range is empty or leaves the blob of {} bytes", blob.size);
        return Err(SourceError::new(ErrorClass::BadRange, source, detail).reading(blob, range.clone()));
    }
    Ok(())
}

/// The bytes of one range as they arrive.
///
/// Ends with `None` exactly at the end of the range; a source that stops early, sends too much or stalls
/// gives an error instead.
pub struct Body {
    pieces: BoxStream<'static, Result<Bytes, SourceError>>,
    source: String,
    blob: BlobRef,
    range: Range<u64>,
    next: u64,
    idle: Option<Duration>,
    ended: bool,
    blame: Option<Blame>,
}

/// Tells a source that these stored bytes of a body were wrong; gives the name of the host that sent them.
pub(crate) type Blame = Arc<dyn Fn(Range<u64>) -> String + Send + Sync>;

impl Body {
    /// Wraps the pieces of `range`. `idle` is the longest wait for a piece.
    pub fn new(
        source: impl Into<String>,
        blob: &BlobRef,
        range: Range<u64>,
        idle: Option<Duration>,
        pieces: BoxStream<'static, Result<Bytes, SourceError>>,
    ) -> Self {
        Self {
            pieces,
            source: source.into(),
            blob: *blob,
            next: range.start,
            range,
            idle,
            ended: false,
            blame: None,
        }
    }

    /// Has the source told when bytes of this body turn out wrong.
    #[must_use]
    pub(crate) fn with_blame(mut self, blame: Blame) -> Self {
        self.blame = Some(blame);
        self
    }

    /// Whom to tell of wrong bytes.
    pub(crate) fn blame(&self) -> Option<Blame> {
        self.blame.clone()
    }

    /// The source's name.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// Where in the stored blob the next piece begins.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// Reads ahead of its reader as far as `room` has permits, one a byte: a body that nobody reads yet loses no time.
    #[must_use]
    pub fn ahead(mut self, room: Arc<Semaphore>, most: u32) -> Self {
        let mut pieces = std::mem::replace(&mut self.pieces, futures_util::stream::empty().boxed());
        // Bounded by the permits.
        let (sender, queue) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(piece) = pieces.next().await {
                let bytes = piece.as_ref().map_or(0, Bytes::len);
                let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(most);
                // Nobody closes the semaphore.
                let permit = Arc::clone(&room).acquire_many_owned(bytes).await;
                if sender.send((piece, permit)).is_err() {
                    return;
                }
            }
        });
        self.pieces = futures_util::stream::unfold(queue, async |mut queue| {
            let (piece, permit) = queue.recv().await?;
            drop(permit);
            Some((piece, queue))
        })
        .boxed();
        self
    }

    /// Puts the end of the last piece back: it comes again with [`Body::next`].
    pub(crate) fn unread(&mut self, rest: Bytes) {
        if !rest.is_empty() {
            self.next -= u64::try_from(rest.len()).unwrap_or(0);
            let pieces = std::mem::replace(&mut self.pieces, futures_util::stream::empty().boxed());
            self.pieces = futures_util::stream::iter([Ok(rest)]).chain(pieces).boxed();
            self.ended = false;
        }
    }

    /// Bytes of the range that have not come yet.
    pub fn remaining(&self) -> u64 {
        self.range.end - self.next
    }

    /// The next piece, never empty. After an error or the end it returns `None`.
    pub async fn next(&mut self) -> Option<Result<Bytes, SourceError>> {
        if self.ended {
            return None;
        }
        loop {
            let piece = match self.idle {
                None => self.pieces.next().await,
                Some(idle) => match tokio::time::timeout(idle, self.pieces.next()).await {
                    Ok(piece) => piece,
                    Err(_) => return Some(self.fail_stalled(idle)),
                },
            };
            match piece {
                Some(Ok(bytes)) if bytes.is_empty() => {}
                Some(Ok(bytes)) => {
                    let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
                    if length > self.remaining() {
                        let detail = "the source sent more bytes than the range holds";
                        return Some(self.fail(ErrorClass::BadReply, detail.into()));
                    }
                    self.next += length;
                    return Some(Ok(bytes));
                }
                Some(Err(error)) => {
                    self.ended = true;
                    let (blob, range) = (self.blob, self.range.clone());
                    return Some(Err(if error.reading.is_none() {
                        error.reading(&blob, range)
                    } else {
                        error
                    }));
                }
                None if self.remaining() > 0 => {
                    let detail =
                        format!("the body ended at byte {}, {} bytes early", self.next, self.remaining());
                    return Some(self.fail(ErrorClass::Transient, detail));
                }
                None => {
                    self.ended = true;
                    return None;
                }
            }
        }
    }

    fn fail_stalled(&mut self, idle: Duration) -> Result<Bytes, SourceError> {
        let detail = format!("no byte came for {} ms at byte {}", idle.as_millis(), self.next);
        self.fail(ErrorClass::Transient, detail)
    }

    fn fail(&mut self, class: ErrorClass, detail: String) -> Result<Bytes, SourceError> {
        self.ended = true;
        Err(SourceError::new(class, self.source.as_str(), detail).reading(&self.blob, self.range.clone()))
    }

    /// Collects the whole body. The caller has bounded the range.
    pub async fn collect(mut self) -> Result<Vec<u8>, SourceError> {
        let mut all = Vec::with_capacity(usize::try_from(self.remaining()).unwrap_or(0).min(1 << 20));
        while let Some(piece) = self.next().await {
            all.extend_from_slice(&piece?);
        }
        Ok(all)
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body")
            .field("source", &self.source)
            .field("blob", &self.blob)
            .field("range", &self.range)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    fn body(pieces: Vec<Result<Bytes, SourceError>>, range: Range<u64>) -> Body {
        let blob = BlobRef { digest: Digest::of(b""), size: 100 };
        Body::new("test", &blob, range, Some(Duration::from_millis(20)), stream::iter(pieces).boxed())
    }

    fn bytes(count: usize) -> Result<Bytes, SourceError> {
        Ok(Bytes::from(vec![7; count]))
    }

    #[tokio::test]
    async fn exact_body_ends_once() {
        let mut exact = body(vec![bytes(3), bytes(0), bytes(2)], 10..15);
        assert_eq!(exact.next().await.unwrap().unwrap().len(), 3);
        assert_eq!(exact.remaining(), 2);
        assert_eq!(exact.next().await.unwrap().unwrap().len(), 2);
        assert!(exact.next().await.is_none());
        assert!(exact.next().await.is_none());
    }

    #[tokio::test]
    async fn short_long_and_stalled_bodies_fail() {
        let short = body(vec![bytes(3)], 10..15).collect().await.unwrap_err();
        assert_eq!(short.class, ErrorClass::Transient);
        assert_eq!(short.reading.unwrap().range, 10..15);
        let long = body(vec![bytes(3), bytes(3)], 10..15).collect().await.unwrap_err();
        assert_eq!(long.class, ErrorClass::BadReply);
        let blob = BlobRef { digest: Digest::of(b""), size: 100 };
        let pending = Body::new(
            "test",
            &blob,
            0..5,
            Some(Duration::from_millis(20)),
            stream::iter(vec![bytes(1)]).chain(stream::pending()).boxed(),
        );
        let stalled = pending.collect().await.unwrap_err();
        assert_eq!(stalled.class, ErrorClass::Transient);
        assert!(stalled.detail.contains("at byte 1"), "{stalled}");
    }

    #[tokio::test]
    async fn a_body_reads_ahead_of_its_reader_as_far_as_there_is_room() {
        let taken = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = Arc::clone(&taken);
        let pieces = stream::iter((0..10_u8).map(move |number| {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Ok(Bytes::from(vec![number; 10]))
        }));
        let blob = BlobRef { digest: Digest::of(b""), size: 100 };
        let room = Arc::new(Semaphore::new(35));
        let mut body = Body::new("test", &blob, 0..100, None, pieces.boxed()).ahead(Arc::clone(&room), 35);
        while room.available_permits() > 5 {
            tokio::task::yield_now().await;
        }
        tokio::task::yield_now().await;
        // Three are kept, one waits for room.
        assert_eq!(taken.load(std::sync::atomic::Ordering::Relaxed), 4);
        for number in 0..10 {
            assert_eq!(body.next().await.unwrap().unwrap(), vec![number; 10]);
        }
        assert!(body.next().await.is_none());
        drop(body);
        assert_eq!(room.available_permits(), 35);
    }
}
