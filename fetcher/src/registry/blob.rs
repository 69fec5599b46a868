//! Reading blobs.

use std::ops::Range;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream;
use reqwest::header::{CONTENT_LENGTH, HeaderValue, RANGE};
use reqwest::{Method, StatusCode};

use super::Registry;
use super::auth::Access;
use super::dragonfly::PREFETCH;
use super::pieces::{self, Turn};
use super::range::{Accepted, judge};
use crate::http::{self, Use};
use crate::source::{BlobRef, Body, ErrorClass, Source, SourceError, Urgency, check_range};

/// Replies shorter than asked that one read puts together, before the server counts as bad.
const MAX_SHORT: u32 = 8;

/// One accepted reply.
struct Reply {
    response: reqwest::Response,
    /// End of what this reply may give, never past the range.
    end: u64,
    /// The reply goes on past the range, and is to be closed there.
    whole: bool,
}

/// A read in progress: where it is, and the reply that is being read.
struct Progress {
    registry: Registry,
    blob: BlobRef,
    at: u64,
    end: u64,
    reply: Option<Reply>,
    shorts: u32,
    turn: Option<Turn>,
}

impl Registry {
    async fn request(&self, blob: &BlobRef, range: &Range<u64>) -> Result<Reply, SourceError> {
        // A copy of the whole is the better source of its front, too.
        if self.ignores_ranges() && (range.start > 0 || self.inner.spools.has(&blob.digest)) {
            let detail = "the server ignored ranges a short while ago";
            return Err(self.error(ErrorClass::NoRanges, detail));
        }
        let url = self.blob_url(&blob.digest)?;
        let mut call = self.call(Method::GET, url, Access::Pull, Use::Blobs);
        call.blob = Some(blob.digest);
        let header = HeaderValue::try_from(format!("bytes={}-{}", range.start, range.end - 1));
        call.headers
            .insert(RANGE, header.map_err(|error| self.error(ErrorClass::BadRange, error.to_string()))?);
        if self.inner.prefetches && self.inner.pieces.as_ref().is_some_and(|pieces| pieces.is_hot(blob)) {
            call.headers.insert(PREFETCH, HeaderValue::from_static("true"));
        }
        let response = self.send(&call).await?;
        match judge(response.status(), response.headers(), range, blob.size) {
            Ok(Accepted::Part { end }) => Ok(Reply { response, end, whole: false }),
            Ok(Accepted::Whole) => Ok(Reply { response, end: range.end, whole: true }),
            Err((class, detail)) => {
                if class == ErrorClass::NoRanges {
                    self.mark_no_ranges();
                }
                // A success status has a body that must not be read; any other may explain itself.
                let success = response.status().is_success();
                Err(if success { self.error(class, detail) } else { self.unexpected("blob", response).await })
            }
        }
    }
}

impl Progress {
    fn body(self, range: Range<u64>) -> Body {
        let (name, blob) = (self.registry.inner.name.clone(), self.blob);
        let pieces = stream::try_unfold(self, |mut progress| async move {
            Ok(progress.next().await?.map(|piece| (piece, progress)))
        });
        // The limits on waiting are kept here, since a read may span several requests.
        Body::new(name, &blob, range, None, pieces.boxed())
    }

    fn error(&self, class: ErrorClass, detail: impl Into<Box<str>>) -> SourceError {
        self.registry.error(class, detail).reading(&self.blob, self.at..self.end)
    }

    /// The next piece of the range, or `None` at its end.
    async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        let idle = self.registry.inner.clients.options().timeouts.idle;
        loop {
            let Some(reply) = &mut self.reply else {
                if self.at == self.end {
                    return Ok(None);
                }
                let rest = self.at..self.end;
                let reply = self.registry.request(&self.blob, &rest).await;
                self.reply = Some(reply.map_err(|error| error.reading(&self.blob, rest))?);
                continue;
            };
            if self.at == self.end && reply.whole {
                // Dropping the reply closes the connection; the rest of the blob is not drained.
                self.reply = None;
                return Ok(None);
            }
            let limit = reply.end;
            let whole = reply.whole;
            let piece = match tokio::time::timeout(idle, reply.response.chunk()).await {
                Ok(Ok(piece)) => piece,
                // Everything asked for has come.
                Ok(Err(_)) | Err(_) if self.at == self.end => None,
                Ok(Err(error)) => {
                    let url = reply.response.url().clone();
                    let error = http::transport_error(&self.registry.inner.name, &url, &error);
                    return Err(
                        self.error(ErrorClass::Transient, format!("at byte {}: {}", self.at, error.detail))
                    );
                }
                Err(_) => {
                    let detail = format!("no byte came for {} ms at byte {}", idle.as_millis(), self.at);
                    return Err(self.error(ErrorClass::Transient, detail));
                }
            };
            match piece {
                Some(mut piece) => {
                    let left = usize::try_from(limit - self.at).unwrap_or(usize::MAX);
                    if piece.len() > left {
                        if !whole {
                            return Err(
                                self.error(ErrorClass::BadReply, "the body is longer than its Content-Range")
                            );
                        }
                        piece.truncate(left);
                    }
                    let length = u64::try_from(piece.len()).expect("usize fits in 64 bits");
                    self.at += length;
                    if let Some(turn) = &mut self.turn {
                        turn.begun();
                    }
                    self.registry.inner.received.fetch_add(length, Ordering::Relaxed);
                    if !piece.is_empty() {
                        return Ok(Some(piece));
                    }
                }
                None if self.at < limit => {
                    let detail =
                        format!("the body ended at byte {}, {} bytes early", self.at, limit - self.at);
                    return Err(self.error(ErrorClass::Transient, detail));
                }
                None => {
                    self.reply = None;
                    if self.at < self.end {
                        self.shorts += 1;
                        if self.shorts > MAX_SHORT {
                            return Err(
                                self.error(ErrorClass::BadReply, "the server keeps sending less than asked")
                            );
                        }
                    }
                }
            }
        }
    }
}

#[async_trait::async_trait]
impl Source for Registry {
    fn name(&self) -> &str {
        &self.inner.name
    }

    async fn read(&self, blob: &BlobRef, range: Range<u64>, _: Urgency) -> Result<Body, SourceError> {
        check_range(&self.inner.name, blob, &range)?;
        let turn = match &self.inner.pieces {
            Some(pieces) => Some(pieces.turn(blob, &range).await),
            None => None,
        };
        let reply = self.request(blob, &range).await.map_err(|error| error.reading(blob, range.clone()))?;
        let progress = Progress {
            registry: self.clone(),
            blob: *blob,
            at: range.start,
            end: range.end,
            reply: Some(reply),
            shorts: 0,
            turn,
        };
        Ok(progress.body(range))
    }

    async fn read_whole(&self, blob: &BlobRef, range: Range<u64>) -> Result<Body, SourceError> {
        check_range(&self.inner.name, blob, &range)?;
        self.inner.spools.read(self, blob, range).await
    }

    fn piece(&self, blob: &BlobRef) -> Option<u64> {
        self.inner.pieces.as_ref().map(|_| pieces::length(blob))
    }

    async fn has(&self, blob: &BlobRef) -> Result<bool, SourceError> {
        self.has_blob(blob, Access::Pull).await
    }
}

impl Registry {
    /// A small file beside the blobs of a folder on a web server.
    pub(crate) async fn file(&self, name: &str, cap: u64) -> Result<Vec<u8>, SourceError> {
        let what = format!("file `{name}`");
        let call = self.call(Method::GET, self.url(name)?, Access::Pull, Use::Documents);
        let response = self.send(&call).await?;
        if response.status() != StatusCode::OK {
            return Err(self.unexpected(&what, response).await);
        }
        self.document(&what, response, cap).await
    }

    /// The whole blob, from its first byte.
    pub(super) async fn whole(&self, blob: &BlobRef) -> Result<Body, SourceError> {
        let url = self.blob_url(&blob.digest)?;
        let mut call = self.call(Method::GET, url, Access::Pull, Use::Blobs);
        call.blob = Some(blob.digest);
        let response = self.send(&call).await?;
        if response.status() != StatusCode::OK {
            return Err(self.unexpected("blob", response).await);
        }
        if let Err((class, detail)) = judge(response.status(), response.headers(), &(0..blob.size), blob.size)
        {
            return Err(self.error(class, detail));
        }
        let progress = Progress {
            registry: self.clone(),
            blob: *blob,
            at: 0,
            end: blob.size,
            reply: Some(Reply { response, end: blob.size, whole: true }),
            shorts: 0,
            turn: None,
        };
        Ok(progress.body(0..blob.size))
    }

    pub(super) async fn has_blob(&self, blob: &BlobRef, access: Access) -> Result<bool, SourceError> {
        let url = self.blob_url(&blob.digest)?;
        let response = self.send(&self.call(Method::HEAD, url, access, Use::Blobs)).await?;
        match response.status() {
            StatusCode::OK => {
                let length = response.headers().get(CONTENT_LENGTH);
                let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
                match length {
                    Some(length) if length != blob.size => {
                        let detail = format!("it has {length} bytes here, its descriptor says {}", blob.size);
                        let error = self.error(ErrorClass::BadReply, detail);
                        Err(error.reading(blob, 0..blob.size))
                    }
                    _ => Ok(true),
                }
            }
            StatusCode::NOT_FOUND => Ok(false),
            _ => Err(self.unexpected("blob", response).await),
        }
    }
}
