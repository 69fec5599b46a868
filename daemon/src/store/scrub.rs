//! Reading the cache again: whether what counts as ready still is what was verified.

use std::fs::{File, OpenOptions};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::Advice;
use skimmer_fetcher::chunk::{ChunkSpec, Codec, verify};

use super::{Store, StoreError, claims, ready};
use crate::blob::{BlobChunk, BlobId, BlobSpec};
use crate::frontend::Mode;

/// What one file came to.
#[derive(Debug)]
pub struct Scrubbed {
    /// What is known of the blob.
    pub spec: BlobSpec,
    /// The file that was read.
    pub path: PathBuf,
    /// Chunks that cannot be read or are not what they should be.
    pub bad: Vec<BlobChunk>,
}

impl Store {
    /// Reads every ready chunk of the blob's file of a mode from the disk and compares it with its digest; `None` when
    /// there is no such file. `each` hears of every chunk's bytes and says whether to go on.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn scrub(
        &self,
        mode: Mode,
        blob: BlobId,
        mut each: impl FnMut(u64) -> bool,
    ) -> Result<Option<Scrubbed>, StoreError> {
        let path = match mode {
            Mode::Fanotify => self.blob_path(blob),
            Mode::Fscache => self.cache_path(&blob.hex())?,
        };
        let failed = |error| StoreError::io("cannot read", &path, error);
        let file = match OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let Some(spec) = claims::load(&self.claims_path(blob), blob)? else { return Ok(None) };
        let metadata = file.metadata().map_err(failed)?;
        let identity = ready::Identity { blob, size: metadata.len(), inode: metadata.ino() };
        let recorded = ready::load(&self.map_path(mode, blob), &identity).map_err(failed)?.bits;
        let mut bad = Vec::new();
        for chunk in spec.chunks.iter().filter(|chunk| recorded.contains(chunk.index)) {
            if !is_right(&file, chunk) {
                bad.push(chunk.clone());
            }
            if !each(u64::from(chunk.spec.len)) {
                break;
            }
        }
        Ok(Some(Scrubbed { spec, path, bad }))
    }
}

/// Writes a verified chunk, padded to whole blocks, over what its file holds there, durably.
///
/// # Errors
/// The system's.
pub fn rewrite(path: &Path, start: u64, padded: &[u8]) -> std::io::Result<()> {
    let file = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    file.write_all_at(padded, start)?;
    file.sync_data()
}

fn is_right(file: &File, chunk: &BlobChunk) -> bool {
    // What the disk has is asked for, not what memory has. What is mapped or dirty stays, and is right or found later.
    let _ = rustix::fs::fadvise(file, chunk.start, NonZeroU64::new(chunk.padded_len()), Advice::DontNeed);
    let Ok(length) = usize::try_from(chunk.spec.len) else { return false };
    let mut bytes = vec![0; length];
    let spec = ChunkSpec { stored_offset: 0, stored_len: chunk.spec.len, codec: Codec::None, ..chunk.spec };
    file.read_exact_at(&mut bytes, chunk.start).is_ok() && verify(&spec, &bytes, vec![0; length]).is_ok()
}
