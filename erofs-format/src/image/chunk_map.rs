//! The chunk table, seen blob by blob: what the daemon fetches by.

use alloc::vec::Vec;

use super::{Blob, Image};
use crate::{
    blob_table::{BlobId, Compressor},
    chunk_table::{self, ChunkEntry, ChunkFlags},
    compression_info::next_device_offset,
    error::{Problem, Result, Thing},
    extended::ExtSuperBlock,
    layout::BLOCK,
};

/// A chunk of a blob, all its numbers checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkInfo {
    /// Position in the blob's compression info.
    pub index: u32,
    /// Digest of the uncompressed chunk without padding, by the blob's algorithm.
    pub digest: [u8; 32],
    /// Offset in the device, a multiple of 4096.
    pub uncompressed_offset: u64,
    /// Bytes of the chunk, 1 to the chunk size.
    pub uncompressed_size: u32,
    /// Offset in the blob.
    pub compressed_offset: u64,
    /// Bytes stored, 1 to the chunk size.
    pub compressed_size: u32,
    /// Whether the stored bytes must be decompressed.
    pub compressed: bool,
    /// CRC-32C of the uncompressed chunk, if the builder wrote it.
    pub crc32: Option<u32>,
}

/// Sorts the positions of the chunk table by blob and CI index; checks the blob index of each entry.
pub(super) fn order(table: &[ChunkEntry], ext: &ExtSuperBlock, blobs: usize) -> Result<Vec<u32>> {
    let base = ext.chunk_table_offset.get();
    let mut order = Vec::with_capacity(table.len());
    for (i, entry) in table.iter().enumerate() {
        if usize::try_from(entry.blob_index.get()).is_ok_and(|blob| blob < blobs) {
            order.push(u32::try_from(i).map_err(|_| {
                Thing::ExtSuperBlock.value(
                    "chunk_table_size",
                    1184,
                    ext.chunk_table_size.get(),
                    "below 2^32 entries",
                )
            })?);
        } else {
            let at = entry_offset(base, i) + 32;
            let found = entry.blob_index.get();
            return Err(Thing::ChunkEntry(i).value("blob_index", at, found, "below the number of blobs"));
        }
    }
    // Position as the last key, so that equal keys have one order.
    order.sort_unstable_by_key(|i| key(table, *i).map(|(blob, index)| (blob, index, *i)));
    Ok(order)
}

fn key(table: &[ChunkEntry], position: u32) -> Option<(u32, u32)> {
    let entry = table.get(usize::try_from(position).ok()?)?;
    Some((entry.blob_index.get(), entry.index.get()))
}

fn entry_offset(base: u64, position: usize) -> u64 {
    // The table lies in the file, so its offsets do not overflow.
    base.saturating_add(
        u64::try_from(position).map_or(u64::MAX, |i| i.saturating_mul(chunk_table::ENTRY_SIZE)),
    )
}

impl<'a> Image<'a> {
    /// Every chunk of a blob that this image refers to, sorted by device offset (and so by CI index and blob offset).
    ///
    /// Checked: chunks are aligned, do not overlap, in device and blob, lie in the device and in the blob's chunk
    /// area, and no CI index occurs twice. An error when there is no such blob, or when the chunk table does not tell
    /// how its chunks are stored ([`Blob::unsupported`]).
    pub fn chunk_map(&self, blob: usize) -> Result<Vec<ChunkInfo>> {
        let Some(found) = self.blobs.get(blob) else {
            let expected = "below the number of blobs";
            return Err(Thing::BlobEntry(blob).value("index", 0, crate::bytes::index(blob), expected));
        };
        if let Some(why) = found.unsupported() {
            return Err(self.blob_error(blob, Problem::Unsupported(why)));
        }
        let mut last = None;
        self.chunk_positions(blob)
            .map(|position| {
                let info = self.chunk_info(found, position, last.as_ref())?;
                last = Some(info);
                Ok(info)
            })
            .collect()
    }

    /// The chunk table entry of a chunk, by blob and CI index.
    pub fn chunk(&self, blob: usize, index: u32) -> Option<&'a ChunkEntry> {
        let key_of = |position: &u32| key(self.chunk_table, *position);
        let wanted = Some((u32::try_from(blob).ok()?, index));
        let at = self.chunk_order.binary_search_by_key(&wanted, key_of).ok()?;
        self.chunk_table.get(usize::try_from(*self.chunk_order.get(at)?).ok()?)
    }

    /// The blob with this digest, if the image has it.
    pub fn blob_by_id(&self, id: &BlobId) -> Option<&Blob> {
        self.blobs.iter().find(|blob| blob.id == *id)
    }

    /// Checks device coordinates of all chunks of a blob, and blob coordinates where the table has them.
    pub(super) fn check_chunks(&self, blob: &Blob) -> Result<u64> {
        let mut last = None;
        let mut count = 0;
        for position in self.chunk_positions(blob.index) {
            last = Some(self.chunk_info(blob, position, last.as_ref())?);
            count += 1;
        }
        Ok(count)
    }

    fn chunk_positions(&self, blob: usize) -> impl Iterator<Item = usize> + '_ {
        let blob = u32::try_from(blob).unwrap_or(u32::MAX);
        let blob_of = |position: &u32| key(self.chunk_table, *position).map(|(blob, _)| blob);
        let start = self.chunk_order.partition_point(|position| blob_of(position) < Some(blob));
        let end = self.chunk_order.partition_point(|position| blob_of(position) <= Some(blob));
        self.chunk_order
            .get(start..end)
            .unwrap_or_default()
            .iter()
            .filter_map(|position| usize::try_from(*position).ok())
    }

    fn blob_error(&self, blob: usize, problem: Problem) -> crate::FormatError {
        let base = self.extended.blob_table_offset.get();
        let at = base + crate::bytes::index(blob).saturating_mul(crate::blob_table::ENTRY_SIZE) + 84;
        Thing::BlobEntry(blob).error("features", at, problem)
    }

    /// Checks one entry against its blob and the entry with the next lower CI index.
    fn chunk_info(&self, blob: &Blob, position: usize, last: Option<&ChunkInfo>) -> Result<ChunkInfo> {
        let entry = &self.chunk_table[position];
        let at = entry_offset(self.extended.chunk_table_offset.get(), position);
        checked(entry, blob, last).map_err(|(field, offset, problem)| {
            Thing::ChunkEntry(position).error(field, at + offset, problem)
        })
    }
}

fn checked(
    entry: &ChunkEntry,
    blob: &Blob,
    last: Option<&ChunkInfo>,
) -> Result<ChunkInfo, (&'static str, u64, Problem)> {
    let bits = entry.flags.get();
    let flags = ChunkFlags::from_bits(bits).filter(|flags| !flags.contains(ChunkFlags::HOLE)).ok_or((
        "flags",
        36,
        Problem::Value { found: bits.into(), expected: "known bits without 0x2 (hole)" },
    ))?;
    let info = ChunkInfo {
        index: entry.index.get(),
        digest: entry.digest,
        uncompressed_offset: entry.uncompressed_offset.get(),
        uncompressed_size: entry.uncompressed_size.get(),
        compressed_offset: entry.compressed_offset.get(),
        compressed_size: entry.compressed_size.get(),
        compressed: flags.contains(ChunkFlags::COMPRESSED),
        crc32: flags.contains(ChunkFlags::HAS_CRC32).then_some(entry.crc32.get()),
    };
    check_index(&info, blob, last)?;
    check_device(&info, blob, last)?;
    if blob.unsupported().is_none() {
        if flags.intersects(ChunkFlags::ENCRYPTED | ChunkFlags::BATCH) {
            let expected = "without flags that the blob's features exclude";
            return Err(("flags", 36, Problem::Value { found: bits.into(), expected }));
        }
        check_stored(&info, blob, last)?;
    }
    Ok(info)
}

type Fault = (&'static str, u64, Problem);

fn check_index(info: &ChunkInfo, blob: &Blob, last: Option<&ChunkInfo>) -> Result<(), Fault> {
    if info.index >= blob.chunk_count {
        let expected = "below the blob's number of chunks";
        return Err(("index", 72, Problem::Value { found: info.index.into(), expected }));
    }
    if last.is_some_and(|last| last.index == info.index) {
        return Err(("index", 72, Problem::Duplicate));
    }
    Ok(())
}

fn check_device(info: &ChunkInfo, blob: &Blob, last: Option<&ChunkInfo>) -> Result<(), Fault> {
    if info.uncompressed_size == 0 || info.uncompressed_size > blob.chunk_size {
        let found = info.uncompressed_size.into();
        return Err(("uncompressed_size", 44, Problem::Value { found, expected: "1 to the chunk size" }));
    }
    let offset = info.uncompressed_offset;
    if !offset.is_multiple_of(BLOCK) {
        return Err((
            "uncompressed_offset",
            56,
            Problem::Value { found: offset, expected: "a multiple of 4096" },
        ));
    }
    let Some(end) = next_device_offset(offset, info.uncompressed_size) else {
        return Err(("uncompressed_offset", 56, Problem::Overflow));
    };
    if end > blob.uncompressed_size {
        let problem = Problem::OutOfRange { end, limit: blob.uncompressed_size, of: "the device" };
        return Err(("uncompressed_offset", 56, problem));
    }
    let before = last.and_then(|last| next_device_offset(last.uncompressed_offset, last.uncompressed_size));
    if before.is_some_and(|before| offset < before) {
        let with = "the chunk before it, by CI index, in the device";
        return Err(("uncompressed_offset", 56, Problem::Overlap { with }));
    }
    Ok(())
}

fn check_stored(info: &ChunkInfo, blob: &Blob, last: Option<&ChunkInfo>) -> Result<(), Fault> {
    let size = info.compressed_size;
    if size == 0 || size > blob.chunk_size {
        let problem = Problem::Value { found: size.into(), expected: "1 to the chunk size" };
        return Err(("compressed_size", 40, problem));
    }
    if !info.compressed && size != info.uncompressed_size {
        let (found, expected) = (u64::from(size), u64::from(info.uncompressed_size));
        let with = "the uncompressed size of an uncompressed chunk";
        return Err(("compressed_size", 40, Problem::Mismatch { found, expected, with }));
    }
    if info.compressed && blob.compressor == Compressor::None {
        let problem = Problem::Value { found: 1, expected: "0, as the blob's compressor is none" };
        return Err(("flags", 36, problem));
    }
    let Some(end) = info.compressed_offset.checked_add(u64::from(size)) else {
        return Err(("compressed_offset", 48, Problem::Overflow));
    };
    if end > blob.data_size() {
        let problem = Problem::OutOfRange { end, limit: blob.data_size(), of: "the blob's chunk area" };
        return Err(("compressed_offset", 48, problem));
    }
    // The entry before was checked, so its sum does not overflow.
    if last
        .is_some_and(|last| info.compressed_offset < last.compressed_offset + u64::from(last.compressed_size))
    {
        let with = "the chunk before it, by CI index, in the blob";
        return Err(("compressed_offset", 48, Problem::Overlap { with }));
    }
    Ok(())
}
