//! Blob table: one entry per blob. Only user space reads it.

use core::fmt;

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

/// Bytes of an entry.
pub const ENTRY_SIZE: u64 = 256;

/// How chunks are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compressor {
    /// Not at all.
    None,
    /// One raw LZ4 block per chunk.
    Lz4Block,
    /// One gzip member per chunk.
    Gzip,
    /// One zstd frame per chunk.
    Zstd,
}

impl Compressor {
    /// All compressors, in the order of their codes from 0.
    pub const ALL: [Self; 4] = [Self::None, Self::Lz4Block, Self::Gzip, Self::Zstd];

    /// The number on disk.
    pub const fn code(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Lz4Block => 1,
            Self::Gzip => 2,
            Self::Zstd => 3,
        }
    }

    /// The compressor of a number on disk.
    pub fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.code() == code)
    }
}

impl fmt::Display for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Lz4Block => "lz4_block",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        })
    }
}

/// Algorithm of the chunk digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DigestAlgo {
    /// BLAKE3.
    Blake3,
    /// SHA-256.
    Sha256,
}

impl DigestAlgo {
    /// All algorithms, in the order of their codes from 0.
    pub const ALL: [Self; 2] = [Self::Blake3, Self::Sha256];

    /// The number on disk.
    pub const fn code(self) -> u32 {
        match self {
            Self::Blake3 => 0,
            Self::Sha256 => 1,
        }
    }

    /// The algorithm of a number on disk.
    pub fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|d| d.code() == code)
    }
}

impl fmt::Display for DigestAlgo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blake3 => "blake3",
            Self::Sha256 => "sha256",
        })
    }
}

bitflags! {
    /// Features of a blob.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct BlobFeatures: u32 {
        /// Chunks start on block boundaries of the device.
        const ALIGNED = 0x1;
        /// The bootstrap is in the blob.
        const INLINED_FS_META = 0x2;
        /// The compression info has 24-byte entries.
        const CHUNK_INFO_V2 = 0x4;
        /// The blob is a gzip stream with restart points.
        const ZRAN = 0x8;
        /// Chunk data and compression info are in two blobs.
        const SEPARATE = 0x10;
        /// The blob has an array of chunk digests.
        const INLINED_CHUNK_DIGEST = 0x20;
        /// The blob is a tar file. Not supported here.
        const TARFS = 0x40;
        /// Small chunks are compressed together.
        const BATCH = 0x80;
        /// The blob is encrypted.
        const ENCRYPTED = 0x100;
        /// The blob was made as a chunk dictionary.
        const CHUNK_DICT_GENERATED = 0x200;
        /// The blob holds only files to prefetch.
        const SEPARATED_PREFETCH_FILES = 0x400;
        /// The data is not in the registry.
        const EXTERNAL = 0x800;
        /// Chunk indexes of the image's files may lie inside chunks, and a file's own chunk size may be below the
        /// image's. Skimmer's own: of the bits at which other loaders refuse an image.
        const FINE_INDEXES = 0x1000;
        /// Reserved bits that loaders accept and ignore.
        const RESERVED_COMPATIBLE = 0x0fff_0000;
        /// Sections are followed by tar headers.
        const HAS_TAR_HEADER = 0x1000_0000;
        /// The blob ends in a table of contents.
        const HAS_TOC = 0x2000_0000;
        /// The builder knows tar headers and tables of contents.
        const CAP_TAR_TOC = 0x4000_0000;
    }
}

impl BlobFeatures {
    /// Features of the plain form: chunk data, compression info, header, nothing else.
    pub const PLAIN: Self = Self::ALIGNED.union(Self::CAP_TAR_TOC);

    /// Bytes of one compression info entry.
    pub const fn ci_entry_size(self) -> u64 {
        if self.contains(Self::CHUNK_INFO_V2) { 24 } else { 16 }
    }
}

/// Name of a blob: the sha256 of its file, which is also its digest in a registry. Displays as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobId(pub [u8; 32]);

impl BlobId {
    /// Parses 64 lowercase hex digits, as a slot's tag holds them.
    pub fn from_hex(hex: &[u8]) -> Option<Self> {
        let mut id = [0; 32];
        let (pairs, rest) = hex.as_chunks::<2>();
        if pairs.len() != id.len() || !rest.is_empty() {
            return None;
        }
        for (byte, [high, low]) in id.iter_mut().zip(pairs) {
            *byte = nibble(*high)? << 4 | nibble(*low)?;
        }
        Some(Self(id))
    }

    /// The 64 hex digits.
    pub fn to_hex(self) -> [u8; 64] {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut hex = [0; 64];
        for (pair, byte) in hex.as_chunks_mut::<2>().0.iter_mut().zip(self.0) {
            *pair = [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]];
        }
        hex
    }
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A blob table entry as on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BlobEntry {
    /// The tag of the device slot.
    pub blob_id: [u8; 64],

    /// Position of this entry.
    pub blob_index: le::U32,
    /// Chunk size of the image in bytes.
    pub chunk_size: le::U32,
    /// Number of chunks.
    pub chunk_count: le::U32,
    /// [`Compressor`].
    pub compression_algo: le::U32,
    /// [`DigestAlgo`].
    pub digest_algo: le::U32,
    /// [`BlobFeatures`].
    pub features: le::U32,

    /// Bytes of the blob file (zran: of the original layer).
    pub compressed_size: le::U64,
    /// Bytes of the device.
    pub uncompressed_size: le::U64,
    /// Bytes of the table of contents with its tar header; 0 if none or unknown.
    pub blob_toc_size: le::U32,
    /// [`Compressor`] of the compression info.
    pub ci_compressor: le::U32,

    /// Offset of the compression info in the blob.
    pub ci_offset: le::U64,
    /// Bytes of the compression info as stored.
    pub ci_compressed_size: le::U64,
    /// Bytes of the compression info.
    pub ci_uncompressed_size: le::U64,

    /// sha256 of the table of contents with its tar header; 0 if not given.
    pub blob_toc_digest: [u8; 32],
    /// zran: sha256 of the separate blob. Encrypted: the key.
    pub blob_meta_digest: [u8; 32],
    /// zran: bytes of the separate blob. Encrypted: first half of the initial vector.
    pub blob_meta_size: le::U64,
    /// Encrypted: second half of the initial vector.
    pub cipher_iv: [u8; 8],
    /// 0 none, 1 AES-128-XTS.
    pub cipher_algo: le::U32,
    /// Written 0, not checked.
    pub reserved: [u8; 36],
}

assert_layout!(BlobEntry, 256, {
    blob_id: 0, blob_index: 64, chunk_size: 68, chunk_count: 72, compression_algo: 76, digest_algo: 80, features: 84,
    compressed_size: 88, uncompressed_size: 96, blob_toc_size: 104, ci_compressor: 108, ci_offset: 112,
    ci_compressed_size: 120, ci_uncompressed_size: 128, blob_toc_digest: 136, blob_meta_digest: 168,
    blob_meta_size: 200, cipher_iv: 208, cipher_algo: 216, reserved: 220,
});

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    #[test]
    fn codes_round_trip() {
        for compressor in Compressor::ALL {
            assert_eq!(Compressor::from_code(compressor.code()), Some(compressor));
        }
        for digest in DigestAlgo::ALL {
            assert_eq!(DigestAlgo::from_code(digest.code()), Some(digest));
        }
        assert_eq!(Compressor::from_code(4), None);
        assert_eq!(DigestAlgo::from_code(2), None);
        assert_eq!(BlobFeatures::PLAIN.bits(), 0x4000_0001);
    }

    #[test]
    fn blob_ids() {
        let hex = b"930efd9e67a24468b9736255654e46a64b2e638fa3e04cf3b0211a9620c97107";
        let id = BlobId::from_hex(hex).unwrap();
        assert_eq!(&id.to_hex(), hex);
        assert_eq!(id.to_string().as_bytes(), hex);
        assert_eq!(BlobId::from_hex(&hex[1..]), None);
        assert_eq!(BlobId::from_hex(&[b'x'; 64]), None);
        assert_eq!(BlobId::from_hex(&[b'A'; 64]), None);
        assert_eq!(BlobId::from_hex(&[b'/'; 64]), None);
    }
}
