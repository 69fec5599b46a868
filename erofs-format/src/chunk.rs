//! Chunk header (in `i_u`) and chunk indexes of a regular file (kernel: `struct erofs_inode_chunk_info`,
//! `struct erofs_inode_chunk_index`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

use crate::layout::{BLOCK_BITS, MAX_BLOBS, MAX_CHUNKS, align_up};

/// Bytes of a chunk index.
pub const INDEX_SIZE: u64 = 8;
/// Start block that means a hole to the kernel. RAFS never writes it.
pub const HOLE: u32 = u32::MAX;

const FORMAT_INDEXES: u32 = 0x20;
const FORMAT_BLKBITS_MASK: u32 = 0x1f;

/// The `i_u` of a chunk-based inode: how many blocks the kernel takes for one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// log2 of the blocks of one chunk as the kernel sees it, 0 to 31.
    pub block_bits: u8,
}

impl ChunkHeader {
    /// Header for a chunk size in bytes: a power of two, at least one block.
    pub const fn for_chunk_size(chunk_size: u64) -> Option<Self> {
        if !chunk_size.is_power_of_two() {
            return None;
        }
        match chunk_size.ilog2().checked_sub(BLOCK_BITS as u32) {
            // At most 31, so the low byte holds all of it.
            Some(bits) if bits <= FORMAT_BLKBITS_MASK => Some(Self { block_bits: bits.to_le_bytes()[0] }),
            _ => None,
        }
    }

    /// The value of `i_u`.
    pub const fn encode(self) -> u32 {
        FORMAT_INDEXES | self.block_bits as u32 & FORMAT_BLKBITS_MASK
    }

    /// The meaning of `i_u`; `None` for the block-array form, the 48-bit form, and unknown bits.
    pub const fn decode(value: u32) -> Option<Self> {
        if value & !FORMAT_BLKBITS_MASK != FORMAT_INDEXES {
            return None;
        }
        Some(Self { block_bits: (value & FORMAT_BLKBITS_MASK).to_le_bytes()[0] })
    }

    /// Bytes of one chunk as the kernel sees it.
    pub const fn chunk_size(self) -> u64 {
        1 << (BLOCK_BITS as u32 + self.block_bits as u32)
    }
}

/// File offset of the chunk indexes of an inode whose inode and xattrs end at `head_end`.
pub const fn indexes_offset(head_end: u64) -> Option<u64> {
    align_up(head_end, INDEX_SIZE)
}

/// A chunk index as on disk. The kernel reads the device id and the start block, user space also the CI index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ChunkIndex {
    /// Bits 0 to 15 of the CI index.
    pub ci_low: le::U16,
    /// Bits 0 to 7: device id; bits 8 to 15: bits 16 to 23 of the CI index.
    pub device: le::U16,
    /// Offset of the chunk in its device, in blocks.
    pub start_block: le::U32,
}

assert_layout!(ChunkIndex, 8, { ci_low: 0, device: 2, start_block: 4 });

impl ChunkIndex {
    /// Index of the chunk `ci_index` of blob `blob`; `None` when a number is above its limit.
    pub fn new(blob: usize, ci_index: u32, start_block: u32) -> Option<Self> {
        if blob >= MAX_BLOBS || ci_index > MAX_CHUNKS {
            return None;
        }
        let device = u8::try_from(blob + 1).ok()?;
        let [b0, b1, b2, _] = ci_index.to_le_bytes();
        Some(Self {
            ci_low: le::U16::from_bytes([b0, b1]),
            device: le::U16::from_bytes([device, b2]),
            start_block: le::U32::new(start_block),
        })
    }

    /// Device id: 0 is the bootstrap (not allowed), else blob index + 1.
    pub const fn device_id(self) -> u8 {
        self.device.to_bytes()[0]
    }

    /// Position of the chunk in the blob's compression info.
    pub const fn ci_index(self) -> u32 {
        let [b0, b1] = self.ci_low.to_bytes();
        u32::from_le_bytes([b0, b1, self.device.to_bytes()[1], 0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers() {
        assert_eq!(ChunkHeader::for_chunk_size(1 << 20).map(ChunkHeader::encode), Some(0x28));
        assert_eq!(ChunkHeader::for_chunk_size(1 << 43).map(ChunkHeader::encode), Some(0x3f));
        for size in [0, 2048, 4097, 1 << 44, u64::MAX] {
            assert_eq!(ChunkHeader::for_chunk_size(size), None);
        }
        for bits in 0..32 {
            let header = ChunkHeader { block_bits: bits };
            assert_eq!(ChunkHeader::decode(header.encode()), Some(header));
            assert_eq!(ChunkHeader::for_chunk_size(header.chunk_size()), Some(header));
        }
        for value in [0, 0x08, 0x60, 0x48, 0x1_0028, u32::MAX] {
            assert_eq!(ChunkHeader::decode(value), None);
        }
    }

    #[test]
    fn literal_indexes() {
        assert_eq!(ChunkIndex::new(0, 1, 1).unwrap().as_bytes(), [1, 0, 1, 0, 1, 0, 0, 0]);
        let index = ChunkIndex::new(253, 0xabcdef, 0x1234_5678).unwrap();
        assert_eq!(index.as_bytes(), [0xef, 0xcd, 0xfe, 0xab, 0x78, 0x56, 0x34, 0x12]);
        assert_eq!((index.device_id(), index.ci_index()), (254, 0xabcdef));
        assert_eq!(ChunkIndex::new(254, 0, 0), None);
        assert_eq!(ChunkIndex::new(0, 1 << 24, 0), None);
    }
}
