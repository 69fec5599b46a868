//! Sizes, limits and the order of the parts of a bootstrap.
//!
//! Parts in order: 1024 zero bytes, superblock, extended superblock, device slots, blob table, prefetch table,
//! metadata area, chunk table; the last four start on block boundaries (the prefetch table directly behind the blob table).

/// EROFS block size in bytes. RAFS also knows 512 (tarfs), which is not supported.
pub const BLOCK_SIZE: u32 = 4096;
/// log2 of [`BLOCK_SIZE`].
pub const BLOCK_BITS: u8 = 12;
/// [`BLOCK_SIZE`] for offset arithmetic.
pub const BLOCK: u64 = 4096;

/// File offset of the superblock.
pub const SUPERBLOCK_OFFSET: u64 = 1024;
/// File offset of the extended superblock.
pub const EXT_SUPERBLOCK_OFFSET: u64 = 1152;
/// File offset of the first device slot.
pub const DEVICE_SLOTS_OFFSET: u64 = 1408;
/// Spare bytes at the start of the metadata area, so that the root's nid is not 0.
pub const META_SPARE: u64 = 4096;

/// Most blobs of an image: the device id of a chunk index has 8 bits, 0 is the bootstrap, the mask must stay 0xff.
pub const MAX_BLOBS: usize = 254;
/// Most chunks of a blob: the CI index has 24 bits.
pub const MAX_CHUNKS: u32 = (1 << 24) - 1;
/// Smallest chunk size in bytes.
pub const MIN_CHUNK_SIZE: u32 = 4096;
/// Largest chunk size in bytes: sizes in the CI array have 24 bits.
pub const MAX_CHUNK_SIZE: u32 = 16 << 20;
/// Default chunk size in bytes.
pub const DEFAULT_CHUNK_SIZE: u32 = 1 << 20;
/// Largest device (uncompressed blob) in bytes: block numbers have 32 bits.
pub const MAX_DEVICE_SIZE: u64 = 1 << 44;
/// Largest blob file in bytes: compressed offsets have 40 bits.
pub const MAX_BLOB_SIZE: u64 = 1 << 40;
/// Longest file name in bytes.
pub const MAX_NAME: usize = 255;
/// Longest symlink target in bytes that the kernel can follow.
pub const MAX_SYMLINK: u64 = 4095;
/// Deepest directory that a walk follows.
pub const MAX_DEPTH: usize = 4096;
/// Alignment of devices in the flat block address space, in bytes.
pub const DEVICE_MAP_ALIGN: u64 = 512 << 10;

/// `value` rounded up to a multiple of `align` (a power of two), or `None` when that leaves 64 bits.
pub const fn align_up(value: u64, align: u64) -> Option<u64> {
    match value.checked_add(align - 1) {
        Some(sum) => Some(sum & !(align - 1)),
        None => None,
    }
}

/// File offset of the blob table of an image with `blobs` blobs (at most [`MAX_BLOBS`]).
pub const fn blob_table_offset(blobs: u64) -> u64 {
    (DEVICE_SLOTS_OFFSET + 128 * blobs + BLOCK - 1) & !(BLOCK - 1)
}

/// Number of chunks of a file of `size` bytes. `chunk_size` is not 0.
pub const fn chunk_count(size: u64, chunk_size: u32) -> u64 {
    size.div_ceil(chunk_size as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_and_counts() {
        assert_eq!(align_up(0, 8), Some(0));
        assert_eq!(align_up(1, 4096), Some(4096));
        assert_eq!(align_up(u64::MAX, 8), None);
        assert_eq!(blob_table_offset(0), 4096);
        assert_eq!(blob_table_offset(21), 4096);
        assert_eq!(blob_table_offset(22), 8192);
        assert_eq!(chunk_count(0, 4096), 0);
        assert_eq!(chunk_count(4096, 4096), 1);
        assert_eq!(chunk_count(4097, 4096), 2);
        assert_eq!(chunk_count(u64::MAX, MAX_CHUNK_SIZE), 1 << 40);
    }
}
