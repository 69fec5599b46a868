//! Cache files of the fscache mode: in place before the mount, trusted only as far as the record goes.
//!
//! The kernel takes every extent of a cache file as present. While the machine stays up that is right: the data path
//! writes verified bytes only. After a power cut a file may hold extents that nobody vouches for, so everything
//! that is not recorded is punched out before the device is bound again.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use skimmer_cachefiles::layout::Layout;
use skimmer_cachefiles::names::Volume;

use super::{Store, StoreError, atomic, claims};
use crate::blob::{BLOCK, BlobId, BlobSpec, ReadyBits};
use crate::frontend::Mode;
use crate::mounts::DOMAIN;

/// Bytes compared or written at once.
const PIECE: usize = 1 << 20;

impl Store {
    /// Makes the cache file of a cookie, or finds it fit, and opens it.
    ///
    /// # Errors
    /// [`StoreError::Io`] with what the layout says.
    pub fn precreate_cache_file(&self, cookie: &str, size: u64) -> Result<File, StoreError> {
        let dir = self.fscache_dir();
        let failed = |error: &dyn std::fmt::Display| {
            StoreError::io("cannot make a cache file in", &dir, io::Error::other(error.to_string()))
        };
        let layout = Layout::open(&dir).map_err(|error| failed(&error))?;
        let volume = Volume::erofs(DOMAIN).map_err(|error| failed(&error))?;
        let file = layout.ensure_file(&volume, cookie.as_bytes(), size).map_err(|error| failed(&error))?;
        Ok(File::from(file.fd))
    }

    /// Makes the cache file of a bootstrap hold the whole bootstrap, durably. The bootstrap is never lazy.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn prefill_bootstrap(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let file = self.precreate_cache_file(name, u64::try_from(bytes.len()).unwrap_or(u64::MAX))?;
        let path = self.cache_path(name)?;
        let fill = || -> io::Result<()> {
            let mut buffer = vec![0; PIECE];
            for (number, piece) in (0_u64..).zip(bytes.chunks(PIECE)) {
                let at = number * u64::try_from(PIECE).unwrap_or(u64::MAX);
                // The same bytes are not written again: a mount of it may be alive. What is hole and zero by right is
                // written all the same, or the kernel would ask for it.
                let present = is_data(&file, at, piece.len())?
                    && file.read_exact_at(&mut buffer[..piece.len()], at).is_ok()
                    && buffer[..piece.len()] == *piece;
                if !present {
                    file.write_all_at(piece, at)?;
                }
            }
            file.sync_all()
        };
        fill().map_err(|error| StoreError::io("cannot fill the bootstrap's cache file", &path, error))
    }

    /// Removes the cache file of a cookie that nothing uses.
    pub(super) fn remove_cache_file(&self, cookie: &str) -> Result<(), StoreError> {
        let path = self.cache_path(cookie)?;
        match std::fs::remove_file(&path) {
            Ok(()) => atomic::sync_parent(&path),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Ok(())
            }
            Err(error) => Err(StoreError::io("cannot remove", &path, error)),
        }
    }

    /// Where the kernel looks for a cookie.
    pub(super) fn cache_path(&self, cookie: &str) -> Result<PathBuf, StoreError> {
        let dir = self.fscache_dir();
        let bad = |error: skimmer_cachefiles::names::NameError| {
            StoreError::io("no cache file name in", &dir, io::Error::other(error.to_string()))
        };
        let volume = Volume::erofs(DOMAIN).map_err(bad)?;
        Ok(dir.join(volume.object(cookie.as_bytes()).map_err(bad)?.path()))
    }

    /// After a power cut: punches out of every blob's cache file what is not on record. Call it before the device is
    /// bound. Bootstraps are compared with their content at each mount, so they need nothing here.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn trim_cache_files(&self) -> Result<(), StoreError> {
        let dir = self.root.join("blobs");
        let list = |error| StoreError::io("cannot list", &dir, error);
        for entry in std::fs::read_dir(&dir).map_err(list)? {
            let name = entry.map_err(list)?.file_name();
            let blob = name.to_str().and_then(|name| name.strip_suffix(".chunks"));
            if let Some(blob) = blob.and_then(|hex| hex.parse::<BlobId>().ok()) {
                self.trim(blob)?;
            }
        }
        Ok(())
    }

    fn trim(&self, blob: BlobId) -> Result<(), StoreError> {
        let path = self.cache_path(&blob.hex())?;
        let file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(StoreError::io("cannot open", &path, error)),
        };
        let Some(claims) = claims::load(&self.claims_path(blob), blob)? else {
            drop(file);
            return self.remove_cache_file(&blob.hex());
        };
        let data = file.try_clone().map_err(|error| StoreError::io("cannot open", &path, error))?;
        let ready = self.ready_of(Mode::Fscache, blob, data)?;
        punch_unrecorded(&file, &claims, &ready).map_err(|error| StoreError::io("cannot trim", &path, error))
    }
}

/// Punches every block that no recorded chunk covers.
fn punch_unrecorded(file: &File, claims: &BlobSpec, ready: &ReadyBits) -> io::Result<()> {
    let length = file.metadata()?.len().next_multiple_of(BLOCK);
    let mut at = 0;
    let recorded = claims.chunks.iter().filter(|chunk| ready.contains(chunk.index));
    for (start, end) in recorded.map(|chunk| (chunk.start, chunk.padded_end())).chain([(length, length)]) {
        if start > at {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file, flags, at, start - at)?;
        }
        at = at.max(end);
    }
    file.sync_all()
}

/// Whether a range lies in data, not in a hole, all of it.
fn is_data(file: &File, at: u64, length: usize) -> io::Result<bool> {
    let end = at.saturating_add(u64::try_from(length).unwrap_or(u64::MAX));
    match seek(file, SeekFrom::Hole(at)) {
        Ok(hole) => Ok(hole >= end),
        Err(Errno::NXIO) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::BlobChunk;
    use skimmer_fetcher::chunk::{ChunkDigest, ChunkSpec, Codec};

    #[test]
    fn only_recorded_blocks_survive_a_trim() {
        let dir = tempfile::tempdir().unwrap();
        let file =
            File::options().read(true).write(true).create_new(true).open(dir.path().join("x")).unwrap();
        file.write_all_at(&[7; 10 * 4096], 0).unwrap();
        let chunk = |index: u32, start: u64, len: u32| BlobChunk {
            index,
            start,
            spec: ChunkSpec {
                stored_offset: 0,
                stored_len: len,
                len,
                codec: Codec::None,
                digest: ChunkDigest::Sha256([0; 32]),
            },
        };
        let chunks =
            vec![chunk(0, 0, 100), chunk(1, 4096, 8192), chunk(2, 16384, 5000), chunk(3, 28672, 4096)];
        let spec = BlobSpec::from_chunks(BlobId::new([1; 32]), 10 * 4096, 1 << 20, chunks).unwrap();
        punch_unrecorded(&file, &spec, &[1, 3].into_iter().collect()).unwrap();
        let mut bytes = vec![0; 10 * 4096];
        file.read_exact_at(&mut bytes, 0).unwrap();
        for (block, content) in bytes.chunks(4096).enumerate() {
            let kept = [1, 2, 7].contains(&block);
            assert!(content.iter().all(|byte| *byte == if kept { 7 } else { 0 }), "block {block}");
        }
    }

    #[test]
    fn a_bootstrap_is_filled_whole_and_again_after_damage() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| u8::try_from(i % 253).unwrap()).collect();
        let name = crate::store::bootstraps::name(&bytes);
        for damage in [None, Some(0), Some(2_000_000)] {
            if let Some(at) = damage {
                let file = File::options().write(true).open(store.cache_path(&name).unwrap()).unwrap();
                file.write_all_at(&[255; 16], at).unwrap();
            }
            store.prefill_bootstrap(&name, &bytes).unwrap();
            let content = std::fs::read(store.cache_path(&name).unwrap()).unwrap();
            assert_eq!(content[..bytes.len()], bytes);
            assert_eq!(content.len() % 4096, 0);
        }
    }
}
