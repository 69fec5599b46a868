//! Compression info (CI) of a blob: one entry per chunk in device order, behind the chunk data; then a header of
//! one block. The bootstrap's chunk table says the same, so a reader needs the CI only to check a whole blob.

mod context;
mod header;
mod v1;
mod v2;

use alloc::vec::Vec;

pub use context::{BatchContext, CONTEXT_SIZE, MAX_BATCH, MAX_DICTIONARY, ZranContext};
pub use header::{CiHeader, HEADER_SIZE, MAGIC};
pub use v1::{CiV1, V1_SIZE};
pub use v2::{CiFlags, CiV2, V2_SIZE};

use crate::{
    blob_table::{BlobFeatures, Compressor},
    error::{Problem, Result, Thing},
    image::Blob,
    layout::{BLOCK, align_up},
};

/// One chunk, whichever form its entry has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CiEntry {
    /// Offset in the device, a multiple of 4096, below 2^44.
    pub uncompressed_offset: u64,
    /// Bytes of the chunk, 1 to 2^24.
    pub uncompressed_size: u32,
    /// Offset in the blob, below 2^40.
    pub compressed_offset: u64,
    /// Bytes stored; 1 to 2^24 in V1, 0 to 2^24 − 1 in V2.
    pub compressed_size: u32,
    /// What is special about the chunk. V1 only says whether it is compressed.
    pub flags: CiFlags,
    /// V2: the CRC-32C of the chunk, or context index << 32 | offset in the context's output. V1: 0.
    pub data: u64,
}

impl CiEntry {
    /// First byte of the device behind the chunk and its padding. Entries come from 44-bit fields: no overflow.
    fn padded_end(&self) -> u64 {
        (self.uncompressed_offset + u64::from(self.uncompressed_size)).next_multiple_of(BLOCK)
    }
}

/// The entries of a blob's compression info, and the contexts behind them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CiArray {
    /// Entries by CI index.
    pub entries: Vec<CiEntry>,
    /// Batches of small chunks.
    pub batches: Vec<BatchContext>,
    /// Restart points of a gzip stream.
    pub zran: Vec<ZranContext>,
}

impl CiArray {
    /// Decodes the uncompressed CI of `blob` and checks every entry and context against the blob.
    ///
    /// `header` must have passed [`CiHeader::check`] for the same blob. Allocates at most 5 times `bytes.len()`.
    pub fn decode(bytes: &[u8], header: &CiHeader, blob: &Blob) -> Result<Self> {
        let len = len_u64(bytes);
        if len != blob.ci_uncompressed_size {
            return Err(Thing::CiArray.error(
                "length",
                0,
                Problem::Mismatch { found: len, expected: blob.ci_uncompressed_size, with: "the blob table" },
            ));
        }
        let entries = decode_entries(bytes, blob)?;
        let (batches, zran) = context::decode(bytes, header, blob)?;
        let array = Self { entries, batches, zran };
        array.check(blob)?;
        Ok(array)
    }

    fn check(&self, blob: &Blob) -> Result<()> {
        let size = blob.features.ci_entry_size();
        let mut next = 0;
        let mut batch = context::BatchRun::default();
        for (i, entry) in self.entries.iter().enumerate() {
            let thing = Thing::CiEntry(i);
            let at = len_u64(&self.entries[..i]) * size;
            if entry.uncompressed_offset != next {
                return Err(thing.error(
                    "uncompressed_offset",
                    at,
                    Problem::Mismatch {
                        found: entry.uncompressed_offset,
                        expected: next,
                        with: "the end of the chunk before",
                    },
                ));
            }
            if entry.uncompressed_size == 0 || entry.uncompressed_size > blob.chunk_size {
                return Err(thing.value(
                    "uncompressed_size",
                    at,
                    entry.uncompressed_size,
                    "1 to the chunk size",
                ));
            }
            next = entry.padded_end();
            if next > blob.uncompressed_size {
                return Err(thing.error(
                    "uncompressed_offset",
                    at,
                    Problem::OutOfRange { end: next, limit: blob.uncompressed_size, of: "the device" },
                ));
            }
            self.check_stored(entry, blob)
                .and_then(|()| batch.push(entry, &self.batches, blob))
                .map_err(|(field, problem)| thing.error(field, at, problem))?;
        }
        Ok(())
    }

    fn check_stored(&self, entry: &CiEntry, blob: &Blob) -> Result<(), (&'static str, Problem)> {
        let flags = entry.flags;
        let not_in =
            |flag: CiFlags, feature: BlobFeatures| flags.contains(flag) && !blob.features.contains(feature);
        if not_in(CiFlags::BATCH, BlobFeatures::BATCH)
            || not_in(CiFlags::ZRAN, BlobFeatures::ZRAN)
            || not_in(CiFlags::ENCRYPTED, BlobFeatures::ENCRYPTED)
        {
            return Err((
                "flags",
                Problem::Value { found: u64::from(flags.bits()), expected: "within the blob's features" },
            ));
        }
        let end = entry.compressed_offset + u64::from(entry.compressed_size);
        if end > blob.data_size() {
            return Err((
                "compressed_offset",
                Problem::OutOfRange { end, limit: blob.data_size(), of: "the chunk data" },
            ));
        }
        if flags.contains(CiFlags::HAS_CRC32) && entry.data & 0xffff_ffff == 0 {
            return Err(("crc32", Problem::Value { found: 0, expected: "not 0 when its flag is set" }));
        }
        if flags.intersects(CiFlags::BATCH | CiFlags::ZRAN) {
            return context::check_reference(entry, &self.batches, &self.zran);
        }
        if entry.compressed_size == 0 {
            return Err(("compressed_size", Problem::Value { found: 0, expected: "not 0" }));
        }
        let same = entry.compressed_size == entry.uncompressed_size;
        if !flags.intersects(CiFlags::COMPRESSED | CiFlags::ENCRYPTED) && !same {
            return Err((
                "compressed_size",
                Problem::Mismatch {
                    found: u64::from(entry.compressed_size),
                    expected: u64::from(entry.uncompressed_size),
                    with: "the uncompressed size of an uncompressed chunk",
                },
            ));
        }
        if flags.contains(CiFlags::COMPRESSED) && blob.compressor == Compressor::None {
            return Err((
                "flags",
                Problem::Value {
                    found: u64::from(flags.bits()),
                    expected: "uncompressed, as the blob's compressor is none",
                },
            ));
        }
        Ok(())
    }
}

fn decode_entries(bytes: &[u8], blob: &Blob) -> Result<Vec<CiEntry>> {
    let size = blob.features.ci_entry_size();
    let end = u64::from(blob.chunk_count) * size;
    let Some(raw) = usize::try_from(end).ok().and_then(|end| bytes.get(..end)) else {
        let have = len_u64(bytes);
        return Err(Thing::CiArray.error("entries", 0, Problem::Truncated { need: end, have }));
    };
    if blob.features.contains(BlobFeatures::CHUNK_INFO_V2) {
        raw.as_chunks::<24>()
            .0
            .iter()
            .enumerate()
            .map(|(i, raw)| {
                CiV2::from_bytes(*raw).decode().ok_or_else(|| {
                    Thing::CiEntry(i).value("flags", entry_offset(i, 24) + 7, raw[7], "known flags")
                })
            })
            .collect()
    } else {
        raw.as_chunks::<16>()
            .0
            .iter()
            .enumerate()
            .map(|(i, raw)| {
                CiV1::from_bytes(*raw)
                    .decode()
                    .ok_or_else(|| Thing::CiEntry(i).value("reserved", entry_offset(i, 16), raw[0], "0"))
            })
            .collect()
    }
}

fn entry_offset(index: usize, size: u64) -> u64 {
    u64::try_from(index).map_or(u64::MAX, |i| i.saturating_mul(size))
}

fn len_u64<T>(slice: &[T]) -> u64 {
    crate::bytes::len(slice)
}

/// Device offset of a chunk that follows one at `offset` of `size` bytes; `None` when it leaves 64 bits.
pub const fn next_device_offset(offset: u64, size: u32) -> Option<u64> {
    match offset.checked_add(size as u64) {
        Some(end) => align_up(end, BLOCK),
        None => None,
    }
}
