//! Reading the cache again: whether what counts as ready still is what was verified.

use std::fs::{File, OpenOptions};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, SeekFrom};
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
        let path = self.data_path(mode, blob)?;
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

impl Store {
    /// Reads a bootstrap; `None` when it cannot be read or is not what its name says. Memory's copy is compared when there
    /// is one: a mounted image is read by way of the same pages, and must not be given the disk's instead.
    #[must_use]
    pub fn scrub_bootstrap(&self, name: &str) -> Option<Vec<u8>> {
        self.load_bootstrap(name).ok()
    }

    /// Writes a bootstrap over its file, which may be mounted, durably.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn mend_bootstrap(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.bootstrap_path(name);
        let mend = || {
            let file = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(&path)?;
            file.set_len(u64::try_from(bytes.len()).unwrap_or(u64::MAX))?;
            file.write_all_at(bytes, 0)?;
            file.sync_all()
        };
        mend().map_err(|error| StoreError::io("cannot write", &path, error))
    }

    /// Compares what the kernel has of a bootstrap in its cache file, if there is one, with the right bytes; says
    /// whether it differed. With `mend` it does no longer.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn scrub_cached_bootstrap(&self, name: &str, right: &[u8], mend: bool) -> Result<bool, StoreError> {
        let path = self.cache_path(name)?;
        let scrub = || -> std::io::Result<bool> {
            let opened = OpenOptions::new().read(true).write(mend).custom_flags(libc::O_NOFOLLOW).open(&path);
            let file = match opened {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
                other => other?,
            };
            let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
            let (mut start, mut differed) = (0, false);
            for block in right.chunks(BLOCK) {
                // A hole is what the kernel will ask for.
                let has_data = match rustix::fs::seek(&file, SeekFrom::Data(start)) {
                    Ok(data) => data < start + BLOCK_BYTES,
                    Err(rustix::io::Errno::NXIO) => break,
                    Err(error) => return Err(error.into()),
                };
                let mut found = vec![0; block.len()];
                if has_data && (file.read_exact_at(&mut found, start).is_err() || found != block) {
                    differed = true;
                    if mend {
                        file.write_all_at(block, start)?;
                    }
                }
                start += BLOCK_BYTES;
            }
            if differed && mend {
                file.sync_data()?;
            }
            Ok(differed)
        };
        scrub().map_err(|error| StoreError::io("cannot scrub", &path, error))
    }
}

/// Bytes of bootstraps that are compared, and written, at once.
const BLOCK: usize = 4096;
const BLOCK_BYTES: u64 = 4096;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_copy_of_a_bootstrap_is_compared_where_it_has_data() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let right: Vec<u8> = (0..5 * BLOCK + 100).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let name = store.put_bootstrap(&right).unwrap();
        assert!(!store.scrub_cached_bootstrap(&name, &right, true).unwrap(), "there is none");
        let size = u64::try_from(6 * BLOCK).unwrap();
        let file = store.precreate_cache_file(&name, size).unwrap();
        let differs = |mend| store.scrub_cached_bootstrap(&name, &right, mend).unwrap();
        assert!(!differs(true), "it is empty");
        // Blocks 1 and 5, of which the last is part of one; the others are holes.
        file.write_all_at(&right[BLOCK..2 * BLOCK], BLOCK_BYTES).unwrap();
        file.write_all_at(&right[5 * BLOCK..], 5 * BLOCK_BYTES).unwrap();
        file.sync_all().unwrap();
        let allocated = file.metadata().unwrap().blocks();
        assert!(!differs(true));
        for at in [BLOCK + 7, 5 * BLOCK + 99] {
            file.write_all_at(b"!", u64::try_from(at).unwrap()).unwrap();
            assert!(differs(false) && differs(true) && !differs(true), "byte {at}");
        }
        let mut found = vec![0; BLOCK];
        file.read_exact_at(&mut found, BLOCK_BYTES).unwrap();
        assert!(found == right[BLOCK..2 * BLOCK]);
        assert_eq!(file.metadata().unwrap().blocks(), allocated, "holes stay");
    }
}
