//! The chunks of a regular file.

use super::{Inode, inode::Data};
use crate::{
    bytes,
    chunk::{ChunkIndex, HOLE, INDEX_SIZE},
    error::{Problem, Result, Thing},
    layout::BLOCK,
};

/// A chunk of a file, as its index says: where in which device. With fine indexes it may be a part of the blob's chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Offset in the file.
    pub file_offset: u64,
    /// Bytes of the file in this chunk.
    pub size: u32,
    /// Position of the blob.
    pub blob: usize,
    /// Position in the blob's compression info.
    pub index: u32,
    /// Offset in the device, a multiple of 4096.
    pub device_offset: u64,
}

/// Iterator over the chunks of a file. Ends after the first error.
#[derive(Debug, Clone)]
pub struct Chunks<'a> {
    nid: u64,
    at: u64,
    blobs: usize,
    unit: u32,
    file_size: u64,
    next: usize,
    indexes: &'a [ChunkIndex],
}

impl<'a> Inode<'a> {
    /// The chunks of a regular file in order; none for other kinds and empty files.
    pub fn chunks(&self) -> Chunks<'a> {
        let (indexes, at, unit) = match self.data {
            Data::Chunks { indexes, at, unit, .. } => (indexes, at, unit),
            _ => (&[][..], self.offset, self.core.chunk_size),
        };
        Chunks { nid: self.nid, at, blobs: self.core.blobs, unit, file_size: self.size, next: 0, indexes }
    }

    /// Checks that the kernel, which may take the whole file by its first index, and user space, which takes each
    /// index, find the same bytes.
    pub(super) fn check_enlarged(&self) -> Result<()> {
        let Data::Chunks { header, at, .. } = self.data else { return Ok(()) };
        if header.chunk_size() <= u64::from(self.core.chunk_size) {
            return Ok(());
        }
        let mut first = None;
        for chunk in self.chunks() {
            let chunk = chunk?;
            let Chunk { blob, device_offset, .. } = *first.get_or_insert(chunk);
            // Start blocks have 32 bits, file sizes 63: no overflow.
            if chunk.blob != blob || chunk.device_offset != device_offset + chunk.file_offset {
                let problem =
                    Problem::Text("does not follow the chunk before it, as the enlarged chunk size says");
                let at = at + chunk.file_offset / u64::from(self.core.chunk_size) * INDEX_SIZE;
                return Err(Thing::ChunkIndexes(self.nid).error("start_block", at, problem));
            }
        }
        Ok(())
    }
}

impl Chunks<'_> {
    /// File offset in the bootstrap of the index that comes next.
    pub(super) fn position(&self) -> u64 {
        self.at + bytes::index(self.next) * INDEX_SIZE
    }

    fn read(&self, raw: &ChunkIndex) -> Result<Chunk> {
        let thing = Thing::ChunkIndexes(self.nid);
        let at = self.position();
        let device = raw.device_id();
        let blob = match usize::from(device).checked_sub(1) {
            Some(blob) if blob < self.blobs => blob,
            _ => return Err(thing.value("device", at + 2, device, "1 to the number of blobs")),
        };
        if raw.start_block.get() == HOLE {
            return Err(thing.value("start_block", at + 4, HOLE, "a block (holes are not allowed)"));
        }
        let file_offset = bytes::index(self.next) * u64::from(self.unit);
        // The number of indexes is that of the file's chunks, so this is at least 1.
        let rest = self.file_size.saturating_sub(file_offset);
        Ok(Chunk {
            file_offset,
            size: u32::try_from(rest).map_or(self.unit, |rest| rest.min(self.unit)),
            blob,
            index: raw.ci_index(),
            device_offset: u64::from(raw.start_block.get()) * BLOCK,
        })
    }
}

impl Iterator for Chunks<'_> {
    type Item = Result<Chunk>;

    fn next(&mut self) -> Option<Self::Item> {
        let raw = self.indexes.get(self.next)?;
        let chunk = self.read(raw);
        self.next = if chunk.is_ok() { self.next + 1 } else { usize::MAX };
        Some(chunk)
    }
}
