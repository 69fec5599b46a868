//! Files on this machine as sources of blob bytes.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};

use crate::layout::{Layout, LayoutError};
use crate::source::{BlobRef, Body, ErrorClass, Source, SourceError, Urgency, check_range};

/// Bytes read from a file at one time.
const PIECE: u64 = 512 * 1024;

/// Reads `range` of a blob whose first byte lies at `base` of `file`.
pub(crate) fn file_body(source: &str, file: File, base: u64, blob: &BlobRef, range: Range<u64>) -> Body {
    let (file, name, end) = (Arc::new(file), source.to_owned(), range.end);
    let pieces = stream::try_unfold(range.start, move |start| {
        let (file, name) = (Arc::clone(&file), name.clone());
        async move {
            if start >= end {
                return Ok(None);
            }
            let length = (end - start).min(PIECE);
            let read = off_thread(move || {
                let mut bytes = vec![0; usize::try_from(length).map_err(std::io::Error::other)?];
                let offset =
                    base.checked_add(start).ok_or_else(|| std::io::Error::other("offset overflows"))?;
                file.read_exact_at(&mut bytes, offset)?;
                Ok::<_, std::io::Error>(Bytes::from(bytes))
            });
            let failed = |error: std::io::Error| {
                SourceError::new(ErrorClass::Io, name, format!("read at byte {start}: {error}"))
            };
            let bytes = read.await.map_err(failed)?;
            Ok(Some((bytes, start + length)))
        }
    });
    let pieces: BoxStream<'static, Result<Bytes, SourceError>> = pieces.boxed();
    Body::new(source, blob, range, None, pieces)
}

/// Runs file work off the async threads.
pub(crate) async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only at the end of the runtime, which ends this task too.
            Err(_) => std::future::pending().await,
        },
    }
}

impl Layout {
    pub(crate) fn source_error(&self, error: &LayoutError) -> SourceError {
        let class = match error {
            LayoutError::MissingBlob { .. } | LayoutError::NoImage { .. } => ErrorClass::NotFound,
            LayoutError::BadBlob { .. } => ErrorClass::Corrupt,
            LayoutError::Io { .. } => ErrorClass::Io,
            LayoutError::NotALayout { .. } | LayoutError::Document { .. } => ErrorClass::BadReply,
        };
        SourceError::new(class, self.label(), error.to_string())
    }
}

#[async_trait::async_trait]
impl Source for Layout {
    fn name(&self) -> &str {
        self.label()
    }

    async fn read(&self, blob: &BlobRef, range: Range<u64>, _: Urgency) -> Result<Body, SourceError> {
        check_range(self.label(), blob, &range)?;
        let (layout, wanted) = (self.clone(), *blob);
        let file = off_thread(move || layout.open_blob(&wanted).map_err(|error| layout.source_error(&error)))
            .await
            .map_err(|error| error.reading(blob, range.clone()))?;
        Ok(file_body(self.label(), file, 0, blob, range))
    }

    async fn has(&self, blob: &BlobRef) -> Result<bool, SourceError> {
        let (layout, wanted) = (self.clone(), *blob);
        off_thread(move || layout.has_blob(&wanted).map_err(|error| layout.source_error(&error))).await
    }
}
