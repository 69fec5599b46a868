//! What mounted images have claimed about a blob: its size and, for each chunk, its place and digest.
//!
//! A blob file is named by the blob's digest, but it is filled chunk by chunk, each checked against the digest in
//! *some image's* bootstrap. An image made to mislead could name a blob of another image and give other digests for
//! it; without this record, what it filled in would later be served to the other image. So the claims under which
//! a file was filled are kept, and a file is only ever reused by an image that agrees with all of them.
//!
//! Little-endian: magic `SKCHUNK\0`, u32 version, u32 count, blob id, u64 device size, u64 stored size, then 64 bytes
//! per chunk (u32 index, u32 length, u64 device offset, u64 stored offset, u32 stored length, u8 codec, u8 digest
//! algorithm, 2 zero, 32 digest), and the CRC-32C of all that.

use std::io::{self, Read};
use std::path::Path;

use skimmer_fetcher::chunk::{ChunkDigest, ChunkSpec, Codec};

use super::{StoreError, atomic};
use crate::blob::{BlobChunk, BlobId, BlobSpec};

const MAGIC: &[u8; 8] = b"SKCHUNK\0";
const VERSION: u32 = 1;
const HEADER: usize = 64;
const ENTRY: usize = 64;

/// Writes the claims of `spec` durably.
///
/// # Errors
/// [`StoreError::Io`].
pub fn save(path: &Path, spec: &BlobSpec) -> Result<(), StoreError> {
    atomic::write(path, &encode(spec))
}

/// Reads the claims of `blob`: `None` when there are none, or none that can be believed (which is logged).
///
/// # Errors
/// [`StoreError::Io`] when the system cannot read them: then nothing is known, not even that there are none.
pub fn load(path: &Path, blob: BlobId) -> Result<Option<BlobSpec>, StoreError> {
    let read = |error| StoreError::io("cannot read", path, error);
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(read(error)),
    };
    let mut bytes = Vec::new();
    let limit = u64::from(crate::blob::MAX_CHUNK_INDEX) * 64 + 4096;
    file.take(limit).read_to_end(&mut bytes).map_err(read)?;
    let spec = decode(&bytes, blob);
    if spec.is_none() {
        tracing::warn!(path = %path.display(), "the record of a blob's chunks is damaged: nothing of the blob counts as ready");
    }
    Ok(spec)
}

fn encode(spec: &BlobSpec) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + ENTRY * spec.chunks.len() + 4);
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend(u32::try_from(spec.chunks.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend(spec.id.bytes());
    out.extend(spec.device_bytes.to_le_bytes());
    out.extend(spec.stored_bytes.to_le_bytes());
    for chunk in spec.chunks.iter() {
        out.extend(chunk.index.to_le_bytes());
        out.extend(chunk.spec.len.to_le_bytes());
        out.extend(chunk.start.to_le_bytes());
        out.extend(chunk.spec.stored_offset.to_le_bytes());
        out.extend(chunk.spec.stored_len.to_le_bytes());
        let codec = match chunk.spec.codec {
            Codec::None => 0,
            Codec::Lz4Block => 1,
            Codec::Gzip => 2,
            Codec::Zstd => 3,
        };
        let (algorithm, digest) = match &chunk.spec.digest {
            ChunkDigest::Blake3(digest) => (0, digest),
            ChunkDigest::Sha256(digest) => (1, digest),
        };
        out.extend([codec, algorithm, 0, 0]);
        out.extend(digest);
    }
    out.extend(crc32c::crc32c(&out).to_le_bytes());
    out
}

fn decode(bytes: &[u8], blob: BlobId) -> Option<BlobSpec> {
    let (body, sum) = bytes.split_last_chunk::<4>()?;
    if crc32c::crc32c(body).to_le_bytes() != *sum {
        return None;
    }
    let (header, entries) = body.split_first_chunk::<HEADER>()?;
    let (entries, rest) = entries.as_chunks::<ENTRY>();
    let sound = header.starts_with(MAGIC)
        && u32_at(header, 8) == VERSION
        && usize::try_from(u32_at(header, 12)).ok()? == entries.len()
        && header[16..48] == *blob.bytes()
        && rest.is_empty();
    if !sound {
        return None;
    }
    let chunks = entries.iter().map(decode_entry).collect::<Option<Vec<_>>>()?;
    BlobSpec::from_chunks(blob, u64_at(header, 48), u64_at(header, 56), chunks).ok()
}

fn decode_entry(entry: &[u8; ENTRY]) -> Option<BlobChunk> {
    let codec = match entry[28] {
        0 => Codec::None,
        1 => Codec::Lz4Block,
        2 => Codec::Gzip,
        3 => Codec::Zstd,
        _ => return None,
    };
    let digest = *entry.last_chunk::<32>()?;
    let digest = match entry[29] {
        0 => ChunkDigest::Blake3(digest),
        1 => ChunkDigest::Sha256(digest),
        _ => return None,
    };
    let spec = ChunkSpec {
        stored_offset: u64_at(entry, 16),
        stored_len: u32_at(entry, 24),
        len: u32_at(entry, 4),
        codec,
        digest,
    };
    Some(BlobChunk { index: u32_at(entry, 0), start: u64_at(entry, 8), spec })
}

fn u32_at(bytes: &[u8; 64], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

fn u64_at(bytes: &[u8; 64], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> BlobSpec {
        let chunk = |index: u32, codec, digest| BlobChunk {
            index,
            start: u64::from(index) * 8192,
            spec: ChunkSpec {
                stored_offset: u64::from(index) * 100,
                stored_len: 99,
                len: 5000,
                codec,
                digest,
            },
        };
        let chunks = vec![
            chunk(0, Codec::Zstd, ChunkDigest::Sha256([1; 32])),
            chunk(3, Codec::None, ChunkDigest::Blake3([2; 32])),
            chunk(9, Codec::Gzip, ChunkDigest::Sha256([3; 32])),
        ];
        BlobSpec::from_chunks(BlobId::new([5; 32]), 1 << 20, 5000, chunks).unwrap()
    }

    #[test]
    fn claims_come_back_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.chunks");
        assert!(load(&path, spec().id).unwrap().is_none());
        save(&path, &spec()).unwrap();
        let back = load(&path, spec().id).unwrap().unwrap();
        assert_eq!(back.chunks, spec().chunks);
        assert_eq!((back.device_bytes, back.stored_bytes), (1 << 20, 5000));
        assert!(load(&path, BlobId::new([6; 32])).unwrap().is_none());
    }

    #[test]
    fn damaged_claims_are_none() {
        let good = encode(&spec());
        for place in 0..good.len() {
            let mut bad = good.clone();
            bad[place] ^= 1;
            assert!(decode(&bad, spec().id).is_none(), "byte {place}");
            assert!(decode(&good[..place], spec().id).is_none(), "length {place}");
        }
    }
}
