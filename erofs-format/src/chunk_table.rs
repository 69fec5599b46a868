//! Chunk table: one entry per distinct chunk of a blob. Only user space reads it; the daemon fetches by it.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

/// Bytes of an entry.
pub const ENTRY_SIZE: u64 = 80;

bitflags! {
    /// Flags of a chunk table entry.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct ChunkFlags: u32 {
        /// Stored compressed.
        const COMPRESSED = 0x1;
        /// Not stored. Builders never write it.
        const HOLE = 0x2;
        /// Stored encrypted.
        const ENCRYPTED = 0x4;
        /// Stored in a batch with others.
        const BATCH = 0x8;
        /// `crc32` is valid.
        const HAS_CRC32 = 0x10;
    }
}

/// A chunk table entry as on disk. The writer sorts by (digest, blob).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ChunkEntry {
    /// Digest of the uncompressed chunk without padding, by the blob's algorithm.
    pub digest: [u8; 32],

    /// Position of the blob in the blob table.
    pub blob_index: le::U32,
    /// [`ChunkFlags`].
    pub flags: le::U32,
    /// Bytes stored in the blob.
    pub compressed_size: le::U32,
    /// Bytes of the chunk.
    pub uncompressed_size: le::U32,

    /// Offset in the blob.
    pub compressed_offset: le::U64,
    /// Offset in the device.
    pub uncompressed_offset: le::U64,

    /// Offset in one of the files that use the chunk.
    pub file_offset: le::U64,
    /// Position in the blob's compression info.
    pub index: le::U32,
    /// CRC-32C of the uncompressed chunk, if the flag says so.
    pub crc32: le::U32,
}

assert_layout!(ChunkEntry, 80, {
    digest: 0, blob_index: 32, flags: 36, compressed_size: 40, uncompressed_size: 44, compressed_offset: 48,
    uncompressed_offset: 56, file_offset: 64, index: 72, crc32: 76,
});
