//! The proof that a mount asks before it serves.
//!
//! A mark that did not take shows nothing but zeros. So before a fanotify mount is shown, one chunk of each watched
//! blob that is not cached yet and not all zeros is read through it and compared with its digest.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use erofs_format::{FileKind, FormatError, Image};
use rustix::fs::{Advice, Mode, OFlags, ResolveFlags};
use skimmer_fetcher::chunk::{ChunkSpec, Codec, verify};

use super::kernel::Detached;
use crate::blob::{BlobChunk, BlobId, BlobSpec, ReadyBits};

/// A chunk this small is taken without looking for a smaller one, bytes.
const SMALL: u32 = 16 << 10;

/// One read that proves one blob's watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// The blob.
    pub blob: BlobId,
    /// A regular file, relative to the mount's root.
    pub path: PathBuf,
    /// Where in it the chunk begins.
    pub offset: u64,
    /// Where on the blob's device it begins.
    device_offset: u64,
    /// The chunk, as it must come out of the mount.
    chunk: ChunkSpec,
}

/// Chooses a probe for each blob that is watched: (blob, its spec, what of it is ready). A blob all of whose missing
/// chunks are zeros needs none: what a lost mark shows is right for it.
///
/// # Errors
/// When the image breaks a rule.
pub fn choose(image: &Image<'_>, watched: &[(&BlobSpec, &ReadyBits)]) -> Result<Vec<Probe>, FormatError> {
    let chunks: HashMap<(usize, u32), (&BlobChunk, BlobId)> = image
        .blobs()
        .iter()
        .enumerate()
        .filter_map(|(slot, blob)| {
            Some((slot, watched.iter().find(|(spec, _)| spec.id.bytes() == &blob.id.0)?))
        })
        .flat_map(|(slot, (spec, ready))| {
            let missing = spec.chunks.iter().filter(|chunk| !ready.contains(chunk.index));
            missing.map(move |chunk| ((slot, chunk.index), (chunk, spec.id)))
        })
        .collect();
    let mut best: HashMap<BlobId, Probe> = HashMap::new();
    let done = |best: &HashMap<BlobId, Probe>| {
        best.len() == watched.len() && best.values().all(|probe| probe.chunk.len <= SMALL)
    };
    let mut walk = image.walk()?;
    while let Some(visit) = walk.next() {
        let inode = visit?.inode;
        if inode.kind != FileKind::Regular {
            continue;
        }
        for part in inode.chunks() {
            let part = part?;
            let Some((chunk, blob)) = chunks.get(&(part.blob, part.index)) else { continue };
            // Only a part that is the whole chunk has the chunk's digest.
            let smaller = best.get(blob).is_none_or(|found| chunk.spec.len < found.chunk.len);
            if part.size != chunk.spec.len
                || part.device_offset != chunk.start
                || !smaller
                || is_zeros(&chunk.spec)
            {
                continue;
            }
            let path = walk.path();
            let path = PathBuf::from(OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(path)));
            let chunk = as_read(&chunk.spec);
            let (offset, device_offset) = (part.file_offset, part.device_offset);
            best.insert(*blob, Probe { blob: *blob, path, offset, device_offset, chunk });
        }
        if done(&best) {
            break;
        }
    }
    let mut probes: Vec<Probe> = best.into_values().collect();
    probes.sort_by_key(|probe| probe.blob);
    Ok(probes)
}

/// Reads the probe's chunk through the mount and compares it. Blocks until the data path has answered; call it from
/// no thread that the data path needs.
///
/// # Errors
/// What was wrong, in words.
pub fn read(mount: &Arc<Detached>, probe: &Probe) -> Result<(), String> {
    let failed = |what: &str, why: String| {
        format!("{what} {} of blob {} through the new mount: {why}", probe.path.display(), probe.blob)
    };
    let file = rustix::fs::openat2(
        mount.root(),
        &probe.path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    )
    .map_err(|errno| failed("opening", errno.to_string()))?;
    // No readahead: the proof should cost one chunk.
    let _ = rustix::fs::fadvise(&file, 0, None, Advice::Random);
    let length = usize::try_from(probe.chunk.len).map_err(|error| failed("reading", error.to_string()))?;
    let mut bytes = vec![0; length];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        let at = probe.offset + u64::try_from(filled).unwrap_or(u64::MAX);
        match rustix::io::retry_on_intr(|| rustix::io::pread(&file, &mut *rest, at)) {
            Ok(0) => {
                return Err(failed("reading", format!("the file ended after {filled} of {length} bytes")));
            }
            Ok(count) => filled += count,
            Err(errno) => return Err(failed("reading", errno.to_string())),
        }
    }
    if bytes.iter().all(|byte| *byte == 0) {
        return Err(failed("reading", "zeros came back: the kernel did not ask for the data".into()));
    }
    verify(&probe.chunk, &bytes, vec![0; length])
        .map(drop)
        .map_err(|error| failed("reading", error.to_string()))
}

/// The path of a probe, for messages.
impl Probe {
    /// The file, relative to the mount's root.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it reads of the blob's device.
    pub fn device(&self) -> Range<u64> {
        self.device_offset..self.device_offset + u64::from(self.chunk.len)
    }
}

/// The chunk as bytes that are decoded already.
fn as_read(spec: &ChunkSpec) -> ChunkSpec {
    ChunkSpec { stored_offset: 0, stored_len: spec.len, codec: Codec::None, ..*spec }
}

fn is_zeros(spec: &ChunkSpec) -> bool {
    usize::try_from(spec.len).is_ok_and(|length| {
        let zeros = vec![0; length];
        verify(&as_read(spec), &zeros, vec![0; length]).is_ok()
    })
}
