//! What of an image is fetched before it is read: what its builder listed, what a caller names, and the rest of it.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use erofs_format::blob_table::BlobFeatures;
use erofs_format::{FileKind, FormatError, Image, Inode};
use skimmer_client::{PrefetchReport, PrefetchRequest};

use super::{Failure, Kind, Mounts};
use crate::blob::{BlobId, BlobSpec};

/// How often a caller who waits for a prefetch looks whether it is done.
const LOOK: Duration = Duration::from_millis(20);
/// How long it waits while nothing comes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Ranges of blobs' devices, in the order in which they are wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Early {
    /// Blob and device bytes; neighbours are joined.
    pub ranges: Vec<(BlobId, Range<u64>)>,
    /// Files they belong to.
    pub files: u64,
    /// Whether the image has a start blob: what its start reads is known, and is all that should be asked for.
    pub start: bool,
    /// Inodes seen: each counts once, however often it is listed.
    seen: HashSet<u64>,
}

impl Early {
    fn push(&mut self, blob: BlobId, range: Range<u64>) {
        match self.ranges.last_mut().filter(|(last, bytes)| *last == blob && bytes.end == range.start) {
            Some((_, bytes)) => bytes.end = range.end,
            None => self.ranges.push((blob, range)),
        }
    }

    /// What the image itself wants fetched early: blobs that hold only such data, whole and in their own order, then
    /// the files of its prefetch table. What of the table cannot be read is left out: it is a hint.
    pub fn listed(image: &Image<'_>, specs: &[BlobSpec]) -> Self {
        let mut early = Self::default();
        for (blob, spec) in image.blobs().iter().zip(specs) {
            if blob.features.contains(BlobFeatures::SEPARATED_PREFETCH_FILES) {
                early.push(spec.id, 0..spec.device_bytes);
                early.start = true;
            }
        }
        for nid in image.prefetch() {
            let added = image.inode(nid).and_then(|inode| early.add(image, specs, inode));
            if let Err(error) = added {
                tracing::debug!(nid, "left out of the prefetch: {error}");
            }
        }
        early
    }

    /// The data of a file, or of all files below a directory.
    fn add(&mut self, image: &Image<'_>, specs: &[BlobSpec], inode: Inode<'_>) -> Result<(), FormatError> {
        // The image was checked when it was opened: directories form a tree.
        let mut todo = vec![inode];
        while let Some(inode) = todo.pop() {
            if !self.seen.insert(inode.nid) {
                continue;
            }
            match inode.kind {
                FileKind::Regular => {
                    self.files += 1;
                    for chunk in inode.chunks() {
                        let chunk = chunk?;
                        let Some(spec) = specs.get(chunk.blob) else { continue };
                        let end = chunk.device_offset + u64::from(chunk.size);
                        self.push(spec.id, chunk.device_offset..end.next_multiple_of(crate::blob::BLOCK));
                    }
                }
                FileKind::Directory => {
                    let first = todo.len();
                    for entry in inode.entries() {
                        let entry = entry?;
                        if !entry.is_dot() {
                            todo.push(image.inode(entry.nid)?);
                        }
                    }
                    todo[first..].reverse();
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The data of these paths, or of the whole image when there is none.
    fn named(image: &Image<'_>, specs: &[BlobSpec], paths: &[&Path]) -> Result<Self, Failure> {
        let damaged = |error: FormatError| Failure::new(Kind::BadImage, error.to_string());
        let mut early = Self::default();
        if paths.is_empty() {
            early.add(image, specs, image.root().map_err(damaged)?).map_err(damaged)?;
            // In the blobs' own order, whole: that takes the fewest requests.
            early.ranges = specs.iter().map(|spec| (spec.id, 0..spec.device_bytes)).collect();
            return Ok(early);
        }
        for path in paths {
            let found = image.lookup(path.as_os_str().as_bytes()).map_err(damaged)?;
            let inode = found.ok_or_else(|| {
                Failure::new(Kind::NotFound, format!("{} is not in the image", path.display()))
                    .remedy("name paths from the image's root; symlinks are not followed")
            })?;
            early.add(image, specs, inode).map_err(damaged)?;
        }
        Ok(early)
    }
}

impl Mounts {
    /// Orders what an image lists to be fetched early. Blobs that no file is open of yet are passed over.
    pub(super) async fn prefetch_listed(&self, early: &Early) -> Result<(), Failure> {
        if self.config.prefetch.listed {
            for (blob, range) in &early.ranges {
                self.driver.prefetch(*blob, range.clone(), false).await?;
            }
        }
        Ok(())
    }

    /// Fetches the rest of an image in the background, after a delay, if that is configured.
    pub(super) fn fill_later(self: &Arc<Self>, specs: &[BlobSpec]) {
        let config = &self.config.fill;
        if !config.enable {
            return;
        }
        let (mounts, delay) = (Arc::clone(self), Duration::from_secs(config.delay_s));
        let blobs: Vec<(BlobId, u64)> = specs.iter().map(|spec| (spec.id, spec.device_bytes)).collect();
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            for (blob, bytes) in blobs {
                // A blob that is gone meanwhile needs nothing any more.
                if let Err(error) = mounts.driver.prefetch(blob, 0..bytes, true).await {
                    tracing::debug!(%blob, "not filled: {error}");
                }
            }
        });
    }

    /// Fetches named files of a mounted image, or all of it, ahead of need.
    ///
    /// # Errors
    /// [`Failure`]: nothing of ours is mounted there, a path is not in the image, the data path has stopped.
    pub async fn prefetch(&self, request: &PrefetchRequest) -> Result<PrefetchReport, Failure> {
        let target = request.target.canonicalize().unwrap_or_else(|_| request.target.clone());
        let (bootstrap, specs) = {
            let state = self.state.lock().await;
            let found = state
                .attachments
                .iter()
                .find(|attachment| attachment.record.mounts.iter().any(|mount| mount.target == target));
            let attachment = found.ok_or_else(|| Failure::not_mounted(&request.target))?;
            (attachment.record.bootstrap.clone(), attachment.specs.clone())
        };
        let bootstrap = self.store.load_bootstrap(&bootstrap)?;
        let paths = request.paths.clone();
        let early = tokio::task::spawn_blocking(move || {
            let image = Image::parse(&bootstrap).map_err(|e| Failure::new(Kind::BadImage, e.to_string()))?;
            Early::named(&image, &specs, &paths.iter().map(AsRef::as_ref).collect::<Vec<_>>())
        })
        .await??;
        for (blob, range) in &early.ranges {
            self.driver.prefetch(*blob, range.clone(), request.background).await?;
        }
        let mut by_blob: HashMap<BlobId, Vec<Range<u64>>> = HashMap::new();
        for (blob, range) in early.ranges {
            by_blob.entry(blob).or_default().push(range);
        }
        let mut progress = (u64::MAX, Instant::now());
        loop {
            let mut report = PrefetchReport { files: early.files, ..PrefetchReport::default() };
            for (blob, ranges) in &by_blob {
                let (bytes, missing) = self.driver.missing(*blob, ranges.clone()).await?;
                report.bytes += bytes;
                report.missing_bytes += missing;
            }
            if !request.wait || report.missing_bytes == 0 {
                return Ok(report);
            }
            if report.missing_bytes < progress.0 {
                progress = (report.missing_bytes, Instant::now());
            } else if progress.1.elapsed() > PATIENCE {
                let (missing, seconds) = (report.missing_bytes, PATIENCE.as_secs());
                let message = format!("{missing} bytes are still to come, and none came in {seconds} s");
                return Err(Failure::new(Kind::Source, message)
                    .remedy("`skimmer status` shows the faults of the image's blobs"));
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}
