//! From a blob to what the kernel reads: the uncompressed device, and the flat file of bootstrap and devices.

use std::io::{Read, Seek, SeekFrom, Write};

use erofs_format::{Blob, ChunkInfo, Compressor, DigestAlgo, Image};
use skimmer_fetcher::chunk::{ChunkDigest, ChunkSpec, Codec, verify};

use crate::MkfsError;
use crate::pack::usize_from;

/// How to fetch and check one chunk of a blob.
pub fn chunk_spec(blob: &Blob, chunk: &ChunkInfo) -> ChunkSpec {
    ChunkSpec {
        stored_offset: chunk.compressed_offset,
        stored_len: chunk.compressed_size,
        len: chunk.uncompressed_size,
        codec: match (chunk.compressed, blob.compressor) {
            (false, _) | (true, Compressor::None) => Codec::None,
            (true, Compressor::Lz4Block) => Codec::Lz4Block,
            (true, Compressor::Gzip) => Codec::Gzip,
            (true, Compressor::Zstd) => Codec::Zstd,
        },
        digest: match blob.digest {
            DigestAlgo::Blake3 => ChunkDigest::Blake3(chunk.digest),
            DigestAlgo::Sha256 => ChunkDigest::Sha256(chunk.digest),
        },
    }
}

/// What [`expand_blob`] read and wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expanded {
    /// Chunks checked.
    pub chunks: u64,
    /// Bytes of them in the blob.
    pub stored_bytes: u64,
    /// Bytes of them uncompressed, without padding.
    pub bytes: u64,
}

/// Writes the device form of a blob: every chunk that the bootstrap refers to at its device offset, verified; all else
/// stays as it is in `device`, which should be empty and get its full length (slot blocks times 4096) from the caller.
/// One chunk is in memory at a time.
pub fn expand_blob(
    image: &Image<'_>,
    index: usize,
    stored: &mut (impl Read + Seek),
    device: &mut (impl Write + Seek),
) -> Result<Expanded, MkfsError> {
    let name = image.blobs().get(index).map_or_else(|| format!("number {index}"), |blob| blob.id.to_string());
    let error = |reason: String| MkfsError::Device { blob: name.clone(), reason };
    let blob = image.blobs().get(index).ok_or_else(|| error("the image has no such blob".to_owned()))?;
    if let Some(why) = blob.unsupported() {
        return Err(error(format!("it {why}")));
    }
    let chunks = image.chunk_map(index).map_err(|e| error(e.to_string()))?;
    let mut done = Expanded::default();
    let mut buffer = Vec::new();
    for chunk in &chunks {
        let spec = chunk_spec(blob, chunk);
        let at = |what: &str, e: &dyn std::fmt::Display| {
            error(format!(
                "chunk {} ({} bytes at offset {} of the blob): {what}: {e}",
                chunk.index, chunk.compressed_size, chunk.compressed_offset
            ))
        };
        spec.check().map_err(|e| at("cannot be right", &e))?;
        buffer.resize(usize_from(spec.stored_len), 0);
        stored.seek(SeekFrom::Start(spec.stored_offset)).map_err(|e| at("cannot be read", &e))?;
        stored.read_exact(&mut buffer).map_err(|e| at("cannot be read", &e))?;
        let verified = verify(&spec, &buffer, vec![0; usize_from(spec.len)])
            .map_err(|e| at("is not what the image says", &e))?;
        device.seek(SeekFrom::Start(chunk.uncompressed_offset)).map_err(|e| at("cannot be written", &e))?;
        device.write_all(verified.bytes()).map_err(|e| at("cannot be written", &e))?;
        done.chunks += 1;
        done.stored_bytes += u64::from(spec.stored_len);
        done.bytes += u64::from(spec.len);
    }
    Ok(done)
}

/// Writes bootstrap and devices as one file that mounts without `device=` options: each device at the block address
/// that its slot gives. `open` opens the stored form of a blob, by position.
pub fn flatten<R: Read + Seek>(
    image: &Image<'_>,
    mut open: impl FnMut(usize) -> Result<R, MkfsError>,
    out: &mut (impl Write + Seek),
) -> Result<(), MkfsError> {
    let fail = |e: std::io::Error| MkfsError::io("write", "the flat image", e);
    out.write_all(image.bytes()).map_err(fail)?;
    for (index, blob) in image.blobs().iter().enumerate() {
        let base = u64::from(blob.mapped_blkaddr) * erofs_format::layout::BLOCK;
        if base == 0 {
            return Err(MkfsError::Device {
                blob: blob.id.to_string(),
                reason: "its device slot has no address in the flat form".to_owned(),
            });
        }
        let mut shifted = Shifted { inner: &mut *out, base };
        expand_blob(image, index, &mut open(index)?, &mut shifted)?;
        // The length must cover the whole device, padding included.
        let end = base + blob.uncompressed_size;
        let len = out.seek(SeekFrom::End(0)).map_err(fail)?;
        if len < end {
            out.seek(SeekFrom::Start(end - 1)).map_err(fail)?;
            out.write_all(&[0]).map_err(fail)?;
        }
    }
    out.flush().map_err(fail)
}

/// A file seen from an offset on.
struct Shifted<'o, W> {
    inner: &'o mut W,
    base: u64,
}

impl<W: Write> Write for Shifted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

impl<W: Seek> Seek for Shifted<'_, W> {
    fn seek(&mut self, position: SeekFrom) -> std::io::Result<u64> {
        let target = match position {
            SeekFrom::Start(offset) => {
                let offset = offset.checked_add(self.base);
                SeekFrom::Start(offset.ok_or_else(|| std::io::Error::other("an offset above 2^64"))?)
            }
            other => other,
        };
        let at = self.inner.seek(target)?;
        at.checked_sub(self.base).ok_or_else(|| std::io::Error::other("an offset in front of the device"))
    }
}
