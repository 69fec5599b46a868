//! Whole blobs of a server that ignores ranges: downloaded once into an unnamed file, and read from there while they
//! still arrive. What is read is verified like anything else that a source gives.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Registry;
use crate::digest::Digest;
use crate::local::off_thread;
use crate::retry::Backoff;
use crate::source::{BlobRef, Body, ErrorClass, SourceError};

/// Attempts at the download; each one starts from the front.
const ATTEMPTS: usize = 3;
/// How long a copy is kept after it was last read.
const KEPT: Duration = Duration::from_secs(60);
/// Largest piece that is read from the copy at once.
const PIECE: u64 = 256 * 1024;

/// How far a download has come.
#[derive(Clone, Debug, Default)]
struct Progress {
    have: u64,
    failed: Option<SourceError>,
}

struct Spool {
    file: Arc<File>,
    progress: watch::Receiver<Progress>,
    used: Mutex<Instant>,
}

/// The copies of one repository's blobs.
#[derive(Clone, Default)]
pub(super) struct Spools {
    all: Arc<Mutex<HashMap<Digest, Arc<Spool>>>>,
}

impl Spools {
    /// Whether there is a copy.
    pub(super) fn has(&self, blob: &Digest) -> bool {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).contains_key(blob)
    }

    /// Reads a range of a copy, which is begun when there is none.
    pub(super) async fn read(
        &self,
        registry: &Registry,
        blob: &BlobRef,
        range: Range<u64>,
    ) -> Result<Body, SourceError> {
        let spool = self.get(registry, blob)?;
        let name = registry.inner.name.clone();
        let (blob, end) = (*blob, range.end);
        let start = (spool, range.start, name.clone());
        let pieces = stream::try_unfold(start, move |(spool, at, name)| async move {
            if at == end {
                return Ok(None);
            }
            let piece = spool.piece(at, end, &name).await?;
            let next = at + u64::try_from(piece.len()).expect("usize fits in 64 bits");
            Ok(Some((piece, (spool, next, name))))
        });
        Ok(Body::new(name, &blob, range, None, pieces.boxed()))
    }

    fn get(&self, registry: &Registry, blob: &BlobRef) -> Result<Arc<Spool>, SourceError> {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(spool) = all.get(&blob.digest) {
            *spool.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
            return Ok(Arc::clone(spool));
        }
        let dir = registry.inner.spool_dir.as_deref().map_or_else(std::env::temp_dir, Path::to_owned);
        let file = tempfile::tempfile_in(&dir).map_err(|error| {
            let detail = format!("a copy of the whole blob cannot be kept in {}: {error}", dir.display());
            SourceError::new(ErrorClass::Io, registry.inner.name.as_str(), detail)
        })?;
        let file = Arc::new(file);
        let (tell, progress) = watch::channel(Progress::default());
        let used = Mutex::new(Instant::now());
        let spool = Arc::new(Spool { file: Arc::clone(&file), progress, used });
        let made = Arc::clone(&spool);
        all.insert(blob.digest, Arc::clone(&spool));
        tracing::info!(
            "{}: the server ignores ranges; the whole blob {} is downloaded",
            registry.inner.name,
            blob.digest
        );
        let (registry, blob, spools) = (registry.clone(), *blob, self.clone());
        tokio::spawn(async move {
            let failed = download(&registry, &blob, &file, &tell).await.err();
            let mut keep = failed.is_none();
            tell.send_modify(|progress| progress.failed = failed);
            while keep {
                let used = *spool.used.lock().unwrap_or_else(PoisonError::into_inner);
                tokio::time::sleep_until(used + KEPT).await;
                keep = spool.used.lock().unwrap_or_else(PoisonError::into_inner).elapsed() < KEPT;
            }
            spools.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&blob.digest);
        });
        Ok(made)
    }
}

async fn download(
    registry: &Registry,
    blob: &BlobRef,
    file: &Arc<File>,
    tell: &watch::Sender<Progress>,
) -> Result<(), SourceError> {
    let mut backoff = Backoff::new(ATTEMPTS);
    loop {
        match once(registry, blob, file, tell).await {
            Ok(()) => return Ok(()),
            Err(error) => backoff.wait(error).await?,
        }
    }
}

async fn once(
    registry: &Registry,
    blob: &BlobRef,
    file: &Arc<File>,
    tell: &watch::Sender<Progress>,
) -> Result<(), SourceError> {
    let mut body = registry.whole(blob).await?;
    let mut at = 0;
    while let Some(piece) = body.next().await {
        let piece = piece?;
        let length = u64::try_from(piece.len()).expect("usize fits in 64 bits");
        let file = Arc::clone(file);
        off_thread(move || file.write_all_at(&piece, at)).await.map_err(|error| {
            let detail = format!("writing the copy of the whole blob: {error}");
            SourceError::new(ErrorClass::Io, registry.inner.name.as_str(), detail)
        })?;
        at += length;
        // A second attempt writes over what is there, and those who read it do not notice.
        tell.send_modify(|progress| progress.have = progress.have.max(at));
    }
    Ok(())
}

impl Spool {
    /// The next bytes, as soon as some are there.
    async fn piece(&self, at: u64, end: u64, name: &str) -> Result<Bytes, SourceError> {
        let mut progress = self.progress.clone();
        let gone =
            || SourceError::new(ErrorClass::Transient, name, "the download of the whole blob was given up");
        let reached = progress.wait_for(|progress| progress.have > at || progress.failed.is_some()).await;
        let Progress { have, failed } = reached.map_err(|_| gone())?.clone();
        *self.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        if have <= at {
            return Err(failed.unwrap_or_else(gone));
        }
        let count = (have.min(end) - at).min(PIECE);
        let file = Arc::clone(&self.file);
        let read = off_thread(move || {
            let mut bytes = vec![0; usize::try_from(count).unwrap_or(0)];
            file.read_exact_at(&mut bytes, at).map(|()| bytes)
        });
        let bytes = read.await.map_err(|error| {
            SourceError::new(ErrorClass::Io, name, format!("reading the copy of the whole blob: {error}"))
        })?;
        Ok(bytes.into())
    }
}
