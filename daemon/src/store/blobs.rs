//! Sparse blob files, and opening their records.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::journal::Tracked;
use super::{Store, StoreError, atomic, claims, ready};
use crate::blob::{BlobId, BlobSpec, ReadyBits};
use crate::frontend::Mode;

/// What [`Store::claim`] found.
#[derive(Debug)]
pub enum Claim {
    /// The image agrees with everything the blob's files were filled under.
    Agrees,
    /// It does not: what the files hold must not be used for it.
    Conflicts(String),
}

impl Store {
    /// Compares `spec` with the claims on record and, when they agree, adds its own.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn claim(&self, spec: &BlobSpec) -> Result<Claim, StoreError> {
        let path = self.claims_path(spec.id);
        let Some(old) = claims::load(&path, spec.id)? else {
            // Without claims what the files hold means nothing.
            self.forget_contents(spec.id)?;
            claims::save(&path, spec)?;
            return Ok(Claim::Agrees);
        };
        match old.merged(spec) {
            Ok(merged) => {
                if merged.chunks.len() != old.chunks.len() {
                    claims::save(&path, &merged)?;
                }
                Ok(Claim::Agrees)
            }
            Err(error) => Ok(Claim::Conflicts(error.to_string())),
        }
    }

    /// Makes whatever the blob's files hold count as nothing; no mount may use them. The claims go last.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn reset_blob(&self, blob: BlobId) -> Result<(), StoreError> {
        self.forget_contents(blob)?;
        atomic::remove(&self.claims_path(blob))
    }

    fn forget_contents(&self, blob: BlobId) -> Result<(), StoreError> {
        for mode in [Mode::Fanotify, Mode::Fscache] {
            atomic::remove(&self.map_path(mode, blob))?;
        }
        atomic::remove(&self.blob_path(blob))?;
        self.remove_cache_file(&blob.hex())
    }

    /// Where the ready map of a blob's file lies.
    pub fn map_path(&self, mode: Mode, blob: BlobId) -> PathBuf {
        let suffix = match mode {
            Mode::Fanotify => "ready",
            Mode::Fscache => "cached",
        };
        self.root.join("blobs").join(format!("{blob}.{suffix}"))
    }

    /// Opens the blob's sparse file for reading and writing, made with its right length when it is not there.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when it has another length: nothing may change the length of a file that may be marked.
    pub fn open_blob(&self, blob: BlobId, size: u64) -> Result<File, StoreError> {
        let path = self.blob_path(blob);
        if !path.exists() {
            // The map must not outlive the file it speaks of.
            atomic::remove(&self.map_path(Mode::Fanotify, blob))?;
            atomic::create(&path, |file| file.set_len(size))?;
        }
        let open = |error| StoreError::io("cannot open the blob file", &path, error);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(open)?;
        let metadata = file.metadata().map_err(open)?;
        if !metadata.is_file() || metadata.len() != size {
            return Err(StoreError::corrupt(
                &path,
                format!(
                    "is not a file of {size} bytes (found {}); remove it while nothing is mounted",
                    metadata.len()
                ),
            ));
        }
        Ok(file)
    }

    /// Opens the record of a blob file. `data` is any descriptor of the file; it is kept for syncing.
    /// A damaged map counts as empty and is made anew. A chunk that the map names counts only when a claim says where it
    /// lies and no part of it is a hole of the file: a copy or a repair of the file system may have lost blocks.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the map can neither be read nor made.
    pub fn open_record(&self, mode: Mode, blob: BlobId, data: File) -> Result<Tracked<File>, StoreError> {
        let path = self.map_path(mode, blob);
        let metadata =
            data.metadata().map_err(|error| StoreError::io("cannot stat the file of", &path, error))?;
        let identity = ready::Identity { blob, size: metadata.len(), inode: metadata.ino() };
        let loaded = ready::load(&path, &identity)
            .map_err(|error| StoreError::io("cannot read the ready map", &path, error))?;
        if let Some(damage) = &loaded.damage {
            tracing::warn!(path = %path.display(), "ready map: {damage}; those chunks will be fetched again");
        }
        if !loaded.usable {
            atomic::write(&path, &ready::header(&identity))?;
        }
        let map = open_map(&path)?;
        let present = self.present(blob, &data, &loaded.bits)?;
        let lost = loaded.bits.count() - present.count();
        if lost > 0 {
            tracing::warn!(
                path = %path.display(),
                "ready map: {lost} chunks that it names are not in the file; they will be fetched again"
            );
        }
        Ok(Tracked::new(blob, data, map, present))
    }

    /// Those of the recorded chunks that are data in the file, all of them; what is not written back yet is data too.
    fn present(&self, blob: BlobId, data: &File, recorded: &ReadyBits) -> Result<ReadyBits, StoreError> {
        if recorded.count() == 0 {
            return Ok(ReadyBits::new());
        }
        let Some(claims) = claims::load(&self.claims_path(blob), blob)? else { return Ok(ReadyBits::new()) };
        let mut present = ReadyBits::new();
        // Chunks are in the order of their place, so one pass over the file's extents does.
        let mut extent = 0..0;
        for chunk in claims.chunks.iter().filter(|chunk| recorded.contains(chunk.index)) {
            if chunk.start >= extent.end {
                extent = next_extent(data, chunk.start).map_err(|error| {
                    StoreError::io("cannot tell data from holes in", &self.blob_path(blob), error)
                })?;
            }
            if extent.start <= chunk.start && chunk.padded_end() <= extent.end {
                present.insert(chunk.index);
            }
        }
        Ok(present)
    }

    /// The chunks that a file's record calls ready.
    ///
    /// # Errors
    /// As [`Self::open_record`].
    pub fn ready_of(&self, mode: Mode, blob: BlobId, data: File) -> Result<ReadyBits, StoreError> {
        Ok(self.open_record(mode, blob, data)?.recorded)
    }
}

/// The first extent of data that ends after `at`, from `at` on; an empty one far out when there is none.
fn next_extent(file: &File, at: u64) -> Result<Range<u64>, Errno> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(start) => Ok(start..seek(file, SeekFrom::Hole(start))?),
        Err(Errno::NXIO) => Ok(u64::MAX..u64::MAX),
        Err(errno) => Err(errno),
    }
}

fn open_map(path: &Path) -> Result<File, StoreError> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .map_err(|error| StoreError::io("cannot open the ready map", path, error))
}
