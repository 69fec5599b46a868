//! The audit log: which bytes of which files each image asked for.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use erofs_format::{FileKind, Image};
use serde::Serialize;

use super::{Clock, Owner};
use crate::blob::{BlobId, BlobSpec};
use crate::driver::Served;
use crate::mounts::Mounts;

/// Files named for one request; a large read may be of very many.
const MOST_FILES: usize = 16;
/// Images whose files are known at once.
const MOST_IMAGES: usize = 16;

/// One line.
#[derive(Serialize)]
struct Line<'a> {
    /// Seconds since the epoch, when the kernel asked.
    at: f64,
    mode: String,
    /// Every mounted image that has the blob: which of them read is not known.
    images: Vec<&'a str>,
    blob: String,
    offset: u64,
    length: u64,
    /// `hit`, `miss` or `failed`.
    result: String,
    waited_us: u64,
    /// Those of the first image that these bytes belong to, at most 16.
    files: Vec<&'a str>,
}

/// The log.
pub(super) struct Audit {
    file: File,
    path: PathBuf,
    /// By bootstrap.
    files: HashMap<String, Arc<Files>>,
}

/// Which file each byte of an image's blobs belongs to.
#[derive(Default)]
struct Files {
    /// From the first byte on the device to the byte after the last and the path's number.
    ranges: HashMap<BlobId, BTreeMap<u64, (u64, usize)>>,
    paths: Vec<String>,
}

impl Audit {
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        }
        let file = File::options().create(true).append(true).mode(0o600).open(path);
        let file = file.with_context(|| format!("cannot open the audit log {}", path.display()))?;
        Ok(Self { file, path: path.into(), files: HashMap::new() })
    }

    pub(super) async fn add(
        &mut self,
        clock: &Clock,
        mounts: &Arc<Mounts>,
        images: &[Owner],
        served: &Served,
    ) -> anyhow::Result<()> {
        let files = match images.first() {
            Some(owner) => self.files_of(mounts, &owner.bootstrap).await,
            None => Arc::default(),
        };
        let at = clock.time(served.since).duration_since(UNIX_EPOCH).unwrap_or_default();
        let waited = served.until.duration_since(served.since);
        let line = Line {
            at: at.as_secs_f64(),
            mode: served.mode.to_string(),
            images: images.iter().map(|owner| owner.image.as_str()).collect(),
            blob: served.blob.hex(),
            offset: served.range.start,
            length: served.range.end - served.range.start,
            result: format!("{:?}", served.result),
            waited_us: u64::try_from(waited.as_micros()).unwrap_or(u64::MAX),
            files: files.within(served.blob, served.range.clone()),
        };
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        self.file.write_all(&text).with_context(|| self.path.display().to_string())
    }

    async fn files_of(&mut self, mounts: &Arc<Mounts>, bootstrap: &str) -> Arc<Files> {
        if let Some(files) = self.files.get(bootstrap) {
            return Arc::clone(files);
        }
        let begun = SystemTime::now();
        let read = match mounts.content_of(bootstrap).await {
            Ok((bytes, specs)) => tokio::task::spawn_blocking(move || Files::read(&bytes, &specs)).await,
            Err(failure) => {
                tracing::warn!("the audit log cannot name files of bootstrap {bootstrap}: {failure}");
                Ok(Files::default())
            }
        };
        let files = Arc::new(read.unwrap_or_default());
        tracing::debug!(bootstrap, files = files.paths.len(), took = ?begun.elapsed(), "files for the audit log");
        if self.files.len() >= MOST_IMAGES {
            self.files.clear();
        }
        self.files.insert(bootstrap.to_owned(), Arc::clone(&files));
        files
    }
}

impl Files {
    /// What of an image cannot be read has no names here.
    fn read(bootstrap: &[u8], specs: &[BlobSpec]) -> Self {
        let mut files = Self::default();
        if let Err(error) = files.add(bootstrap, specs) {
            tracing::warn!("the audit log cannot name all files: {error}");
        }
        files
    }

    fn add(&mut self, bootstrap: &[u8], specs: &[BlobSpec]) -> Result<(), erofs_format::FormatError> {
        let image = Image::parse(bootstrap)?;
        let mut walk = image.walk()?;
        while let Some(visit) = walk.next() {
            let visit = visit?;
            if visit.inode.kind != FileKind::Regular || !visit.first {
                continue;
            }
            let number = self.paths.len();
            self.paths.push(String::from_utf8_lossy(walk.path()).into_owned());
            for chunk in visit.inode.chunks() {
                let chunk = chunk?;
                let Some(spec) = specs.get(chunk.blob) else { continue };
                let end = chunk.device_offset + u64::from(chunk.size);
                self.ranges.entry(spec.id).or_default().insert(chunk.device_offset, (end, number));
            }
        }
        Ok(())
    }

    fn within(&self, blob: BlobId, range: std::ops::Range<u64>) -> Vec<&str> {
        let Some(ranges) = self.ranges.get(&blob) else { return Vec::new() };
        let first = ranges.range(..=range.start).next_back().map_or(range.start, |(start, _)| *start);
        let mut numbers = Vec::new();
        for (end, number) in ranges.range(first..range.end).map(|(_, found)| *found) {
            if end > range.start && numbers.last() != Some(&number) {
                numbers.push(number);
            }
            if numbers.len() == MOST_FILES {
                break;
            }
        }
        numbers.into_iter().filter_map(|number| self.paths.get(number)).map(String::as_str).collect()
    }
}
