//! Chunks: the unit of compression, of digest, and of trust.
//!
//! [`verify`] and [`fetch`] are the only makers of a [`Verified`] buffer, so holding one proves that its bytes matched
//! the digest of the trusted chunk map.

mod arriving;
mod decode;
mod fetch;

use crate::source::SourceError;

pub use fetch::{fetch, fetch_from, stored_range};

/// How a chunk is stored in its blob (rafs-v6 algorithms: a chunk that does not shrink is stored raw).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Stored as it is.
    None,
    /// One raw LZ4 block: no frame, no size prefix.
    Lz4Block,
    /// One gzip member.
    Gzip,
    /// One zstd frame.
    Zstd,
}

/// The digest of a chunk's decoded bytes, without padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChunkDigest {
    /// BLAKE3, 32 bytes.
    Blake3([u8; 32]),
    /// sha256.
    Sha256([u8; 32]),
}

/// Where a chunk lies in its stored blob and what its bytes must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkSpec {
    /// First stored byte in the blob.
    pub stored_offset: u64,
    /// Stored bytes.
    pub stored_len: u32,
    /// Decoded bytes.
    pub len: u32,
    /// How the stored bytes are coded.
    pub codec: Codec,
    /// Digest of the decoded bytes.
    pub digest: ChunkDigest,
}

/// A buffer whose first [`len`](Self::len) bytes are a verified chunk and whose rest is zero.
///
/// Only [`verify`] and [`fetch`] make one.
pub struct Verified<B> {
    buffer: B,
    len: usize,
}

impl<B: AsRef<[u8]>> Verified<B> {
    /// The chunk's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer.as_ref()[..self.len]
    }

    /// The whole buffer: the chunk and its zero padding.
    pub fn padded(&self) -> &[u8] {
        self.buffer.as_ref()
    }
}

impl<B> Verified<B> {
    /// Bytes of the chunk, without padding.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the chunk has no byte; never so, since such a chunk is refused.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Gives the buffer back.
    pub fn into_inner(self) -> B {
        self.buffer
    }
}

impl<B> std::fmt::Debug for Verified<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verified").field("len", &self.len).finish_non_exhaustive()
    }
}

/// Why a chunk was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// The chunk map itself cannot be right.
    #[error("the chunk map is wrong: {0}")]
    Spec(String),
    /// The buffer cannot hold the chunk.
    #[error("a buffer of {buffer} bytes cannot hold a chunk of {len} bytes")]
    Buffer {
        /// Size of the buffer.
        buffer: usize,
        /// Decoded size of the chunk.
        len: u32,
    },
    /// The stored bytes cannot be decoded.
    #[error("{codec:?} decoding failed: {detail}")]
    Decode {
        /// The codec of the chunk.
        codec: Codec,
        /// What the decoder said.
        detail: String,
    },
    /// Decoded to another size than the chunk map states.
    #[error("decoded to {got} bytes, the chunk map says {expected}")]
    Size {
        /// Size that came out.
        got: u64,
        /// Size in the chunk map.
        expected: u32,
    },
    /// The bytes are not those of the image.
    #[error("digest mismatch: the bytes are {got}, the image says {expected}")]
    Digest {
        /// Digest of the bytes, hexadecimal.
        got: String,
        /// Digest in the chunk map, hexadecimal.
        expected: String,
    },
}

/// Why a fetch of chunks failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FetchError {
    /// The plan cannot be read as one range.
    #[error("the plan cannot be fetched: {0}")]
    Plan(String),
    /// The source failed; chunks handed over before remain good.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A chunk was refused. All other chunks of the plan were handed over.
    #[error("{place}: {error}")]
    Chunk {
        /// Which chunk of which blob, and who sent it.
        place: Box<ChunkPlace>,
        /// What was wrong.
        error: ChunkError,
    },
}

/// Where a chunk came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkPlace {
    /// Name of the source that sent it.
    pub source_name: String,
    /// The blob.
    pub blob: crate::Digest,
    /// Position in the plan.
    pub index: usize,
    /// The chunk.
    pub spec: ChunkSpec,
}

impl std::fmt::Display for ChunkPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { source_name, blob, spec, .. } = self;
        write!(
            f,
            "{source_name}: blob {blob}: chunk at stored bytes {}..{}",
            spec.stored_offset,
            spec.stored_end()
        )
    }
}

impl ChunkSpec {
    /// Refuses values that no builder makes, before memory is spent on them.
    pub fn check(&self) -> Result<(), ChunkError> {
        let problem = if self.len == 0 || self.stored_len == 0 {
            Some("it has no bytes".to_owned())
        } else if self.codec == Codec::None && self.len != self.stored_len {
            Some(format!("stored raw with {} bytes for a chunk of {}", self.stored_len, self.len))
        } else if u64::from(self.stored_len) > 2 * u64::from(self.len) + 4096 {
            Some(format!("{} stored bytes for a chunk of {}", self.stored_len, self.len))
        } else if self.stored_offset.checked_add(u64::from(self.stored_len)).is_none() {
            Some(format!("offset {} overflows", self.stored_offset))
        } else {
            None
        };
        problem.map_or(Ok(()), |text| Err(ChunkError::Spec(text)))
    }

    /// First stored byte after the chunk. Cannot overflow after [`check`](Self::check).
    pub(crate) fn stored_end(&self) -> u64 {
        self.stored_offset.saturating_add(u64::from(self.stored_len))
    }
}

/// The chunk's length, if a buffer of `available` bytes can hold it.
fn fits(spec: &ChunkSpec, available: usize) -> Result<usize, ChunkError> {
    spec.check()?;
    match usize::try_from(spec.len) {
        Ok(len) if len <= available => Ok(len),
        _ => Err(ChunkError::Buffer { buffer: available, len: spec.len }),
    }
}

/// Decodes `stored` into the front of `buffer`, checks the exact size and then the digest, and zeroes the
/// rest of the buffer. Never writes more than the chunk's size, whatever `stored` holds.
pub fn verify<B: AsMut<[u8]>>(
    spec: &ChunkSpec,
    stored: &[u8],
    mut buffer: B,
) -> Result<Verified<B>, ChunkError> {
    let len = fits(spec, buffer.as_mut().len())?;
    decode::decode(spec, stored, &mut buffer.as_mut()[..len])?;
    seal(spec, buffer, len)
}

/// Checks the digest of bytes that already lie decoded at the front of `buffer`.
fn seal<B: AsMut<[u8]>>(spec: &ChunkSpec, mut buffer: B, len: usize) -> Result<Verified<B>, ChunkError> {
    let chunk = &buffer.as_mut()[..len];
    let got = match spec.digest {
        ChunkDigest::Blake3(_) => *blake3::hash(chunk).as_bytes(),
        ChunkDigest::Sha256(_) => *crate::Digest::of(chunk).as_bytes(),
    };
    sealed(spec, buffer, len, got)
}

/// Compares the digest `got` of the first `len` bytes of `buffer`, which nobody has changed since: the only place where
/// a [`Verified`] is made, and its callers are trusted with `got`.
fn sealed<B: AsMut<[u8]>>(
    spec: &ChunkSpec,
    mut buffer: B,
    len: usize,
    got: [u8; 32],
) -> Result<Verified<B>, ChunkError> {
    let (ChunkDigest::Blake3(expected) | ChunkDigest::Sha256(expected)) = spec.digest;
    if expected != got {
        return Err(ChunkError::Digest { got: hex::encode(got), expected: hex::encode(expected) });
    }
    buffer.as_mut()[len..].fill(0);
    Ok(Verified { buffer, len })
}

#[cfg(test)]
mod tests;
