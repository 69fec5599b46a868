//! The block behind the compression info that describes it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

use super::{CONTEXT_SIZE, MAX_DICTIONARY};
use crate::{
    blob_table::{BlobEntry, BlobFeatures},
    error::{Problem, Result, Thing},
    image::Blob,
};

/// Bytes of the header.
pub const HEADER_SIZE: u64 = 4096;
/// First and last four bytes of the header.
pub const MAGIC: u32 = 0xB10B_B10B;

/// The header as on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CiHeader {
    /// [`MAGIC`].
    pub magic: le::U32,
    /// [`BlobFeatures`].
    pub features: le::U32,
    /// [`Compressor`](crate::Compressor) of the CI.
    pub ci_compressor: le::U32,
    /// Number of chunks.
    pub entries: le::U32,

    /// Offset of the CI in the blob.
    pub ci_offset: le::U64,
    /// Bytes of the CI as stored.
    pub ci_compressed_size: le::U64,

    /// Bytes of the CI.
    pub ci_uncompressed_size: le::U64,
    /// Offset of the contexts in the uncompressed CI.
    pub context_offset: le::U64,

    /// Bytes of the contexts, zran dictionaries included.
    pub context_size: le::U64,
    /// Number of contexts.
    pub context_count: le::U32,

    /// 0.
    pub reserved: [u8; 4032],
    /// [`MAGIC`].
    pub magic2: le::U32,
}

assert_layout!(CiHeader, 4096, {
    magic: 0, features: 4, ci_compressor: 8, entries: 12, ci_offset: 16, ci_compressed_size: 24,
    ci_uncompressed_size: 32, context_offset: 40, context_size: 48, context_count: 56, reserved: 60, magic2: 4092,
});

impl CiHeader {
    /// The header of a blob in the plain form, as its blob table entry describes it.
    pub fn for_entry(entry: &BlobEntry) -> Self {
        Self {
            magic: le::U32::new(MAGIC),
            features: entry.features,
            ci_compressor: entry.ci_compressor,
            entries: entry.chunk_count,
            ci_offset: entry.ci_offset,
            ci_compressed_size: entry.ci_compressed_size,
            ci_uncompressed_size: entry.ci_uncompressed_size,
            context_offset: le::U64::ZERO,
            context_size: le::U64::ZERO,
            context_count: le::U32::ZERO,
            reserved: [0; 4032],
            magic2: le::U32::new(MAGIC),
        }
    }

    /// Checks a header from a blob against the bootstrap's entry of that blob. Do it before the CI is decompressed:
    /// it also bounds the CI's size.
    pub fn check(&self, blob: &Blob) -> Result<()> {
        let thing = Thing::CiHeader;
        for (field, offset, found) in [("magic", 0, self.magic), ("magic2", 4092, self.magic2)] {
            if found.get() != MAGIC {
                return Err(thing.value(field, offset, found.get(), "0xb10bb10b"));
            }
        }
        for (field, offset, found, expected) in [
            ("ci_compressor", 8, u64::from(self.ci_compressor.get()), u64::from(blob.ci_compressor.code())),
            ("entries", 12, u64::from(self.entries.get()), u64::from(blob.chunk_count)),
            ("ci_offset", 16, self.ci_offset.get(), blob.ci_offset),
            ("ci_compressed_size", 24, self.ci_compressed_size.get(), blob.ci_compressed_size),
            ("ci_uncompressed_size", 32, self.ci_uncompressed_size.get(), blob.ci_uncompressed_size),
        ] {
            if found != expected {
                let problem = Problem::Mismatch { found, expected, with: "the blob table" };
                return Err(thing.error(field, offset, problem));
            }
        }
        // A merge clears INLINED_FS_META in the bootstrap only; the other features that shape the CI must agree.
        let shape = BlobFeatures::CHUNK_INFO_V2
            | BlobFeatures::ZRAN
            | BlobFeatures::SEPARATE
            | BlobFeatures::BATCH
            | BlobFeatures::ENCRYPTED;
        let (found, expected) = (self.features.get() & shape.bits(), (blob.features & shape).bits());
        if found != expected {
            let problem = Problem::Mismatch {
                found: u64::from(found),
                expected: u64::from(expected),
                with: "the blob table",
            };
            return Err(thing.error("features", 4, problem));
        }
        self.check_contexts(blob)
    }

    fn check_contexts(&self, blob: &Blob) -> Result<()> {
        let thing = Thing::CiHeader;
        let count = u64::from(self.context_count.get());
        let size = self.context_size.get();
        let entries = u64::from(blob.chunk_count) * blob.features.ci_entry_size();
        let has_contexts = blob.features.intersects(BlobFeatures::BATCH | BlobFeatures::ZRAN);
        if !has_contexts && count != 0 {
            return Err(thing.value("context_count", 56, count, "0 without batches and zran"));
        }
        if count > u64::from(blob.chunk_count) {
            return Err(thing.value("context_count", 56, count, "at most the number of chunks"));
        }
        // Counts are 24 bits and sizes constant: no overflow.
        let table = count * CONTEXT_SIZE;
        let dictionaries =
            if blob.features.contains(BlobFeatures::ZRAN) { count * u64::from(MAX_DICTIONARY) } else { 0 };
        if size < table || size > table + dictionaries {
            return Err(thing.value(
                "context_size",
                48,
                size,
                "the size of the contexts and their dictionaries",
            ));
        }
        if has_contexts && count > 0 {
            let offset = self.context_offset.get();
            if offset < entries {
                return Err(thing.value("context_offset", 40, offset, "behind the entries"));
            }
            match offset.checked_add(size) {
                Some(end) if end <= blob.ci_uncompressed_size => {}
                Some(end) => {
                    return Err(thing.error(
                        "context_offset",
                        40,
                        Problem::OutOfRange {
                            end,
                            limit: blob.ci_uncompressed_size,
                            of: "the compression info",
                        },
                    ));
                }
                None => return Err(thing.error("context_offset", 40, Problem::Overflow)),
            }
        }
        let limit = entries + table + dictionaries;
        if blob.ci_uncompressed_size > limit {
            return Err(thing.value(
                "ci_uncompressed_size",
                32,
                blob.ci_uncompressed_size,
                "no more than its entries and contexts need",
            ));
        }
        Ok(())
    }
}
