//! Device slots and blob table, checked against each other.

use alloc::{collections::BTreeSet, vec::Vec};

use super::head::Head;
use crate::{
    blob_table::{self, BlobEntry, BlobFeatures, BlobId, Compressor, DigestAlgo},
    bytes,
    compression_info::HEADER_SIZE,
    device::{self, DeviceSlot},
    error::{Problem, Result, Thing},
    layout::{BLOCK, DEVICE_SLOTS_OFFSET, MAX_BLOB_SIZE, MAX_CHUNKS, MAX_DEVICE_SIZE},
};

/// A blob of an image: its device slot and its blob table entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blob {
    /// Digest and name of the blob.
    pub id: BlobId,
    /// Position in the blob table; the device id is one more.
    pub index: usize,
    /// Chunk size of the image in bytes.
    pub chunk_size: u32,
    /// Number of chunks in the blob, whether this image uses them or not.
    pub chunk_count: u32,
    /// How chunks are compressed.
    pub compressor: Compressor,
    /// How chunk digests are made.
    pub digest: DigestAlgo,
    /// What is special about the blob.
    pub features: BlobFeatures,
    /// Bytes of the blob file (zran: of the original layer).
    pub compressed_size: u64,
    /// Bytes of the device, a multiple of 4096.
    pub uncompressed_size: u64,
    /// Length of the device in blocks.
    pub blocks: u32,
    /// First block in the flat address space; 0 when not mapped there.
    pub mapped_blkaddr: u32,
    /// Bytes of the table of contents with its tar header; 0 if none or unknown.
    pub toc_size: u32,
    /// How the compression info is compressed.
    pub ci_compressor: Compressor,
    /// Offset of the compression info.
    pub ci_offset: u64,
    /// Bytes of the compression info as stored.
    pub ci_compressed_size: u64,
    /// Bytes of the compression info.
    pub ci_uncompressed_size: u64,
}

impl Blob {
    /// Bytes of the chunk area at the start of the blob.
    pub fn data_size(&self) -> u64 {
        if self.features.contains(BlobFeatures::SEPARATE) {
            self.compressed_size
        } else if self.chunk_count == 0 {
            0
        } else if self.features.contains(BlobFeatures::HAS_TAR_HEADER) {
            self.ci_offset.saturating_sub(crate::toc::TAR_HEADER_SIZE)
        } else {
            self.ci_offset
        }
    }

    /// Why the chunk table alone does not tell how to fetch this blob's chunks, if so.
    pub fn unsupported(&self) -> Option<&'static str> {
        let reasons = [
            (
                BlobFeatures::ZRAN,
                "is a gzip layer with restart points (zran), which is not supported; convert it",
            ),
            (BlobFeatures::BATCH, "has batched chunks, which are not supported; convert without batches"),
            (BlobFeatures::ENCRYPTED, "is encrypted, which is not supported"),
            (BlobFeatures::EXTERNAL, "has its data outside the registry, which is not supported"),
            (BlobFeatures::SEPARATE, "has data and compression info in two blobs, which is not supported"),
        ];
        reasons.into_iter().find_map(|(feature, why)| self.features.contains(feature).then_some(why))
    }
}

pub(super) fn parse(file: &[u8], head: &Head<'_>) -> Result<Vec<Blob>> {
    let mut blobs = Vec::with_capacity(head.slots.len());
    let mut ids = BTreeSet::new();
    let mut mapped: Vec<(u64, u64, usize)> = Vec::new();
    let file_blocks = bytes::len(file) / BLOCK;
    let mut slot_at = DEVICE_SLOTS_OFFSET;
    let mut entry_at = head.blob_table_offset;
    for (index, (slot, entry)) in head.slots.iter().zip(head.blob_table).enumerate() {
        let thing = Thing::DeviceSlot(index);
        let id =
            parse_slot(slot).map_err(|(field, at, problem)| thing.error(field, slot_at + at, problem))?;
        if !ids.insert(id) {
            return Err(thing.error("tag", slot_at, Problem::Duplicate));
        }
        let start = u64::from(slot.mapped_blkaddr.get());
        let end = start + u64::from(slot.blocks.get());
        if end > 1 << 32 {
            let problem = Problem::OutOfRange { end, limit: 1 << 32, of: "the block address space" };
            return Err(thing.error("mapped_blkaddr", slot_at + 68, problem));
        }
        if start != 0 {
            if start < file_blocks {
                let problem = Problem::Overlap { with: "the bootstrap's own blocks" };
                return Err(thing.error("mapped_blkaddr", slot_at + 68, problem));
            }
            mapped.push((start, end, index));
        }
        let blob = parse_entry(entry, slot, id, index, head.extended.chunk_size.get())
            .map_err(|(field, at, problem)| Thing::BlobEntry(index).error(field, entry_at + at, problem))?;
        blobs.push(blob);
        slot_at += device::SLOT_SIZE;
        entry_at += blob_table::ENTRY_SIZE;
    }
    mapped.sort_unstable();
    for pair in mapped.windows(2) {
        if let [(_, end, _), (start, _, index)] = pair
            && start < end
        {
            let problem = Problem::Overlap { with: "another device" };
            return Err(Thing::DeviceSlot(*index).error("mapped_blkaddr", DEVICE_SLOTS_OFFSET, problem));
        }
    }
    Ok(blobs)
}

/// Field, its offset in the structure, and what is wrong.
type Fault = (&'static str, u64, Problem);

fn parse_slot(slot: &DeviceSlot) -> Result<BlobId, Fault> {
    if slot.tag == [b'x'; 64] {
        let text = "is the placeholder of a single layer's bootstrap; use the merged bootstrap";
        return Err(("tag", 0, Problem::Text(text)));
    }
    let id =
        BlobId::from_hex(&slot.tag).ok_or(("tag", 0, Problem::Text("is not 64 lowercase hex digits")))?;
    if slot.blocks.get() == 0 {
        return Err(("blocks", 64, Problem::Value { found: 0, expected: "at least 1" }));
    }
    if let Some(byte) = slot.reserved.iter().find(|byte| **byte != 0) {
        return Err((
            "reserved",
            72,
            Problem::Value { found: u64::from(*byte), expected: "0 in every byte" },
        ));
    }
    Ok(id)
}

fn parse_entry(
    entry: &BlobEntry,
    slot: &DeviceSlot,
    id: BlobId,
    index: usize,
    chunk_size: u32,
) -> Result<Blob, Fault> {
    let value = |field, at, found: u64, expected| Err((field, at, Problem::Value { found, expected }));
    if entry.blob_id != slot.tag {
        return Err(("blob_id", 0, Problem::Text("is not the tag of the device slot")));
    }
    let found = u64::from(entry.blob_index.get());
    if usize::try_from(found) != Ok(index) {
        return value("blob_index", 64, found, "its own position");
    }
    if entry.chunk_size.get() != chunk_size {
        let (found, expected) = (u64::from(entry.chunk_size.get()), u64::from(chunk_size));
        return Err((
            "chunk_size",
            68,
            Problem::Mismatch { found, expected, with: "the extended superblock" },
        ));
    }
    let chunk_count = entry.chunk_count.get();
    if chunk_count > MAX_CHUNKS {
        return value("chunk_count", 72, chunk_count.into(), "at most 2^24 - 1");
    }
    let Some(compressor) = Compressor::from_code(entry.compression_algo.get()) else {
        return value("compression_algo", 76, entry.compression_algo.get().into(), "0 to 3");
    };
    let Some(digest) = DigestAlgo::from_code(entry.digest_algo.get()) else {
        return value("digest_algo", 80, entry.digest_algo.get().into(), "0 or 1");
    };
    let Some(features) = BlobFeatures::from_bits(entry.features.get()) else {
        return value("features", 84, entry.features.get().into(), "known bits");
    };
    if features.contains(BlobFeatures::TARFS) || !features.contains(BlobFeatures::ALIGNED) {
        let expected = "with 0x1 (aligned chunks) and without 0x40 (tarfs)";
        return value("features", 84, features.bits().into(), expected);
    }
    let needs_v2 = BlobFeatures::ZRAN | BlobFeatures::BATCH | BlobFeatures::ENCRYPTED;
    if features.intersects(needs_v2) && !features.contains(BlobFeatures::CHUNK_INFO_V2) {
        return value("features", 84, features.bits().into(), "with 0x4 (24-byte chunk info)");
    }
    let Some(ci_compressor) = Compressor::from_code(entry.ci_compressor.get()) else {
        return value("ci_compressor", 108, entry.ci_compressor.get().into(), "0 to 3");
    };
    if entry.cipher_algo.get() > 1 {
        return value("cipher_algo", 216, entry.cipher_algo.get().into(), "0 or 1");
    }
    let blob = Blob {
        id,
        index,
        chunk_size,
        chunk_count,
        compressor,
        digest,
        features,
        compressed_size: entry.compressed_size.get(),
        uncompressed_size: entry.uncompressed_size.get(),
        blocks: slot.blocks.get(),
        mapped_blkaddr: slot.mapped_blkaddr.get(),
        toc_size: entry.blob_toc_size.get(),
        ci_compressor,
        ci_offset: entry.ci_offset.get(),
        ci_compressed_size: entry.ci_compressed_size.get(),
        ci_uncompressed_size: entry.ci_uncompressed_size.get(),
    };
    check_sizes(&blob, needs_v2)?;
    Ok(blob)
}

fn check_sizes(blob: &Blob, contexts: BlobFeatures) -> Result<(), Fault> {
    let value = |field, at, found: u64, expected| Err((field, at, Problem::Value { found, expected }));
    if blob.compressed_size > MAX_BLOB_SIZE {
        return value("compressed_size", 88, blob.compressed_size, "at most 2^40");
    }
    if blob.uncompressed_size > MAX_DEVICE_SIZE {
        return value("uncompressed_size", 96, blob.uncompressed_size, "at most 2^44");
    }
    let device = u64::from(blob.blocks) * BLOCK;
    if blob.uncompressed_size != device {
        let problem =
            Problem::Mismatch { found: blob.uncompressed_size, expected: device, with: "the device slot" };
        return Err(("uncompressed_size", 96, problem));
    }
    // 2^24 entries of 24 bytes: no overflow.
    let entries = u64::from(blob.chunk_count) * blob.features.ci_entry_size();
    let found = blob.ci_uncompressed_size;
    if found != entries && !(blob.features.intersects(contexts) && found > entries) {
        let problem = Problem::Mismatch { found, expected: entries, with: "the number of chunks" };
        return Err(("ci_uncompressed_size", 128, problem));
    }
    if blob.ci_compressed_size > blob.ci_uncompressed_size {
        return value("ci_compressed_size", 120, blob.ci_compressed_size, "at most the uncompressed size");
    }
    let end =
        blob.ci_offset.checked_add(blob.ci_compressed_size).and_then(|end| end.checked_add(HEADER_SIZE));
    let Some(end) = end else {
        return Err(("ci_offset", 112, Problem::Overflow));
    };
    if !blob.features.contains(BlobFeatures::SEPARATE) && blob.chunk_count > 0 && end > blob.compressed_size {
        let problem = Problem::OutOfRange { end, limit: blob.compressed_size, of: "the blob" };
        return Err(("ci_offset", 112, problem));
    }
    Ok(())
}
