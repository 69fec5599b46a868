//! RAFS extended superblock, at file offset 1152. Only user space reads it.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

use crate::blob_table::{Compressor, DigestAlgo};

bitflags! {
    /// Flags of the extended superblock.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct ExtFlags: u64 {
        /// Chunks are not compressed.
        const COMPRESSION_NONE = 0x1;
        /// Chunks are LZ4 blocks.
        const COMPRESSION_LZ4_BLOCK = 0x2;
        /// Digests are BLAKE3.
        const DIGEST_BLAKE3 = 0x4;
        /// Digests are SHA-256.
        const DIGEST_SHA256 = 0x8;
        /// Owners are those of the inodes.
        const EXPLICIT_UID_GID = 0x10;
        /// Some inode may have xattrs.
        const HAS_XATTR = 0x20;
        /// Chunks are gzip members.
        const COMPRESSION_GZIP = 0x40;
        /// Chunks are zstd frames.
        const COMPRESSION_ZSTD = 0x80;
        /// Every blob carries its chunk digests.
        const INLINED_CHUNK_DIGEST = 0x100;
        /// The devices are tar files. Not supported here.
        const TARFS = 0x200;
        /// Chunks are not encrypted.
        const ENCRYPTION_NONE = 0x100_0000;
        /// Chunks are encrypted with AES-128-XTS.
        const ENCRYPTION_AES_128_XTS = 0x200_0000;
        /// Six reserved bits that loaders accept and ignore.
        const RESERVED_COMPATIBLE = 0xfc00_0000;
    }
}

impl ExtFlags {
    const COMPRESSORS: Self = Self::COMPRESSION_NONE
        .union(Self::COMPRESSION_LZ4_BLOCK)
        .union(Self::COMPRESSION_GZIP)
        .union(Self::COMPRESSION_ZSTD);
    const DIGESTS: Self = Self::DIGEST_BLAKE3.union(Self::DIGEST_SHA256);

    /// The flag of a compressor.
    pub const fn of_compressor(compressor: Compressor) -> Self {
        match compressor {
            Compressor::None => Self::COMPRESSION_NONE,
            Compressor::Lz4Block => Self::COMPRESSION_LZ4_BLOCK,
            Compressor::Gzip => Self::COMPRESSION_GZIP,
            Compressor::Zstd => Self::COMPRESSION_ZSTD,
        }
    }

    /// The flag of a digest algorithm.
    pub const fn of_digest(digest: DigestAlgo) -> Self {
        match digest {
            DigestAlgo::Blake3 => Self::DIGEST_BLAKE3,
            DigestAlgo::Sha256 => Self::DIGEST_SHA256,
        }
    }

    /// The compressor, if exactly one flag names it. Chunks are decoded by the blob's compressor, never by this one.
    pub fn compressor(self) -> Option<Compressor> {
        Compressor::ALL.into_iter().find(|c| self & Self::COMPRESSORS == Self::of_compressor(*c))
    }

    /// The digest algorithm, if exactly one flag names it.
    pub fn digest(self) -> Option<DigestAlgo> {
        DigestAlgo::ALL.into_iter().find(|d| self & Self::DIGESTS == Self::of_digest(*d))
    }
}

/// The extended superblock as on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExtSuperBlock {
    /// [`ExtFlags`].
    pub flags: le::U64,
    /// File offset of the blob table, block-aligned.
    pub blob_table_offset: le::U64,

    /// Bytes of the blob table.
    pub blob_table_size: le::U32,
    /// Chunk size in bytes, the same for the whole image.
    pub chunk_size: le::U32,
    /// File offset of the chunk table, block-aligned.
    pub chunk_table_offset: le::U64,

    /// Bytes of the chunk table.
    pub chunk_table_size: le::U64,
    /// File offset of the prefetch table; 0 when there is none.
    pub prefetch_table_offset: le::U64,

    /// Bytes of the prefetch table.
    pub prefetch_table_size: le::U32,
    /// 0.
    pub padding: le::U32,

    /// Written 0, not checked.
    pub reserved: [u8; 200],
}

assert_layout!(ExtSuperBlock, 256, {
    flags: 0, blob_table_offset: 8, blob_table_size: 16, chunk_size: 20, chunk_table_offset: 24,
    chunk_table_size: 32, prefetch_table_offset: 40, prefetch_table_size: 48, padding: 52, reserved: 56,
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_one_algorithm_each() {
        for compressor in Compressor::ALL {
            for digest in DigestAlgo::ALL {
                let flags = ExtFlags::of_compressor(compressor) | ExtFlags::of_digest(digest);
                assert_eq!((flags.compressor(), flags.digest()), (Some(compressor), Some(digest)));
            }
        }
        assert_eq!((ExtFlags::COMPRESSION_NONE | ExtFlags::COMPRESSION_ZSTD).compressor(), None);
        assert_eq!(ExtFlags::empty().compressor(), None);
        assert_eq!(ExtFlags::all().digest(), None);
    }

    #[test]
    fn typical_flags() {
        let flags = ExtFlags::from_bits(0x0100_0094).unwrap();
        assert_eq!(flags.compressor(), Some(Compressor::Zstd));
        assert_eq!(flags.digest(), Some(DigestAlgo::Blake3));
        assert!(flags.contains(ExtFlags::EXPLICIT_UID_GID | ExtFlags::ENCRYPTION_NONE));
    }
}
