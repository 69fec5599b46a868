//! Letting go of ranges: the end of a blob that nothing mounted needs.
//!
//! The map forgets chunks, durably, before their bytes go: the rule of this folder, backwards. And nobody may have the
//! file open, which a file that is removed whole need not care for: a mount that is not known of any more goes on with
//! what was there, but would see holes as zeros.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use rustix::fs::{FallocateFlags, fallocate};
use skimmer_keeper::lease::WriteLease;

use super::held::UNIT;
use super::{Store, StoreError, atomic, claims, ready};
use crate::blob::{BLOCK, BlobChunk, BlobId, BlobSpec, ReadyBits};
use crate::frontend::Mode;

impl Store {
    /// Lets go of chunks of a blob that nothing mounted needs, the last on the device first, until about `bytes` of disk
    /// space came back. Says how many did: none when somebody has the files open, or it is not known what they hold.
    ///
    /// # Errors
    /// [`StoreError::Io`], also from a file system without holes or leases.
    pub fn evict_ranges(&self, blob: BlobId, bytes: u64) -> Result<u64, StoreError> {
        let Some(claims) = claims::load(&self.claims_path(blob), blob)? else { return Ok(0) };
        let mut freed = 0;
        for mode in [Mode::Fanotify, Mode::Fscache] {
            if freed < bytes {
                freed += self.cut(mode, &claims, bytes - freed)?;
            }
        }
        Ok(freed)
    }

    fn cut(&self, mode: Mode, claims: &BlobSpec, bytes: u64) -> Result<u64, StoreError> {
        let (path, map) = (self.data_path(mode, claims.id)?, self.map_path(mode, claims.id));
        let failed = |error: io::Error| StoreError::io("cannot evict ranges of", &path, error);
        let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&path);
        let file = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            other => other.map_err(failed)?,
        };
        let Some(_alone) = WriteLease::take(file.as_fd()).map_err(failed)? else { return Ok(0) };
        let before = file.metadata().map_err(failed)?;
        let identity = ready::Identity { blob: claims.id, size: before.len(), inode: before.ino() };
        let mut ready = ready::load(&map, &identity).map_err(failed)?.bits;
        let tail = tail(claims, &ready, bytes);
        let length = before.len().next_multiple_of(BLOCK);
        let Some(start) = tail.first().map(|chunk| chunk.start).filter(|start| *start < length) else {
            return Ok(0);
        };
        tail.iter().for_each(|chunk| ready.remove(chunk.index));
        atomic::write(&map, &ready::encode(&identity, &ready))?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&file, flags, start, length - start).map_err(|errno| failed(errno.into()))?;
        let after = file.metadata().map_err(failed)?;
        Ok(before.blocks().saturating_sub(after.blocks()).saturating_mul(UNIT))
    }
}

/// The chunks of the device's end of which those that are ready take `bytes`; all of them when there are fewer.
fn tail<'a>(claims: &'a BlobSpec, ready: &ReadyBits, bytes: u64) -> &'a [BlobChunk] {
    let mut rest = bytes;
    let first = claims.chunks.iter().rposition(|chunk| {
        if ready.contains(chunk.index) {
            rest = rest.saturating_sub(chunk.padded_len());
        }
        rest == 0
    });
    &claims.chunks[first.unwrap_or(0)..]
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use skimmer_fetcher::chunk::{ChunkDigest, ChunkSpec, Codec};

    use super::*;

    const BLOB: BlobId = BlobId::new([9; 32]);
    const LEN: u32 = 256 << 10;
    const CHUNKS: u32 = 40;

    fn content(index: u32) -> Vec<u8> {
        vec![u8::try_from(index + 1).unwrap(); usize::try_from(LEN).unwrap()]
    }

    /// A store with a blob of which all chunks but every seventh are ready in a mode.
    fn filled(mode: Mode) -> (tempfile::TempDir, Store, BlobSpec) {
        let dir = skimmer_test_support::scratch_dir();
        let store = Store::open(dir.path()).unwrap();
        let chunk = |index: u32| BlobChunk {
            index,
            start: u64::from(index) * u64::from(LEN),
            spec: ChunkSpec {
                stored_offset: 0,
                stored_len: 1,
                len: LEN,
                codec: Codec::None,
                digest: ChunkDigest::Sha256(*skimmer_fetcher::Digest::of(&content(index)).as_bytes()),
            },
        };
        let size = u64::from(LEN) * u64::from(CHUNKS);
        let spec = BlobSpec::from_chunks(BLOB, size, 1, (0..CHUNKS).map(chunk).collect()).unwrap();
        store.claim(&spec).unwrap();
        let file = match mode {
            Mode::Fanotify => store.open_blob(BLOB, size).unwrap(),
            Mode::Fscache => store.precreate_cache_file(&BLOB.hex(), size).unwrap(),
        };
        let metadata = file.metadata().unwrap();
        let identity = ready::Identity { blob: BLOB, size: metadata.len(), inode: metadata.ino() };
        let ready: ReadyBits = (0..CHUNKS).filter(|index| index % 7 != 0).collect();
        for index in ready.iter() {
            file.write_all_at(&content(index), u64::from(index) * u64::from(LEN)).unwrap();
        }
        file.sync_all().unwrap();
        std::fs::write(store.map_path(mode, BLOB), ready::encode(&identity, &ready)).unwrap();
        (dir, store, spec)
    }

    fn ready_of(store: &Store, mode: Mode) -> Vec<u32> {
        let file = File::open(store.data_path(mode, BLOB).unwrap()).unwrap();
        store.ready_of(mode, BLOB, file).unwrap().iter().collect()
    }

    #[test]
    fn the_end_goes_and_the_rest_stays_right() {
        for mode in [Mode::Fanotify, Mode::Fscache] {
            let (_dir, store, _) = filled(mode);
            let before = store.held().unwrap()[0].bytes;
            // Ten ready chunks: with 35 that is not, the last eleven.
            let freed = store.evict_ranges(BLOB, 10 * u64::from(LEN)).unwrap();
            assert!(freed >= 10 * u64::from(LEN), "{mode:?}: {freed}");
            assert!(store.held().unwrap()[0].bytes <= before - freed, "{mode:?}");
            let left: Vec<u32> = (0..29).filter(|index| index % 7 != 0).collect();
            assert_eq!(ready_of(&store, mode), left, "{mode:?}");
            let found = store.scrub(mode, BLOB, |_| true).unwrap().unwrap();
            assert!(found.bad.is_empty(), "{mode:?}: {:?}", found.bad);
            // The rest, and then there is nothing more to be had.
            assert!(store.evict_ranges(BLOB, u64::MAX).unwrap() > 0, "{mode:?}");
            assert_eq!(ready_of(&store, mode), [0; 0], "{mode:?}");
            assert_eq!(store.evict_ranges(BLOB, u64::MAX).unwrap(), 0, "{mode:?}");
        }
    }

    #[test]
    fn what_is_written_afterwards_counts_again() {
        let (_dir, store, spec) = filled(Mode::Fanotify);
        store.evict_ranges(BLOB, u64::from(LEN)).unwrap();
        let file = store.open_blob(BLOB, spec.device_bytes).unwrap();
        file.write_all_at(&content(39), spec.chunks[39].start).unwrap();
        let data = file.try_clone().unwrap();
        let mut tracked = store.open_record(Mode::Fanotify, BLOB, data).unwrap();
        assert!(!tracked.recorded.contains(39));
        tracked.wrote(&[39]);
        assert_eq!(tracked.commit(&mut crate::store::journal::SystemDisk).unwrap(), [39]);
        assert!(ready_of(&store, Mode::Fanotify).contains(&39));
    }

    #[test]
    fn who_has_it_open_keeps_all_of_it() {
        for mode in [Mode::Fanotify, Mode::Fscache] {
            let (_dir, store, spec) = filled(mode);
            let path = store.data_path(mode, BLOB).unwrap();
            for write in [false, true] {
                let open = OpenOptions::new().read(true).write(write).open(&path).unwrap();
                assert_eq!(store.evict_ranges(BLOB, 10 * u64::from(LEN)).unwrap(), 0, "{mode:?}");
                let mut found = content(0);
                open.read_exact_at(&mut found, spec.chunks[39].start).unwrap();
                assert!(found == content(39), "{mode:?}");
            }
            assert!(ready_of(&store, mode).contains(&39), "{mode:?}");
            assert!(store.evict_ranges(BLOB, 10 * u64::from(LEN)).unwrap() > 0, "{mode:?}");
        }
    }
}
