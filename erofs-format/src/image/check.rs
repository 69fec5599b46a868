//! The whole image, and whole blobs against it.

use alloc::vec::Vec;

use super::{Chunk, Image, Inode, Xattr};
use crate::{
    blob_table::BlobFeatures,
    bytes,
    chunk_table::ChunkFlags,
    compression_info::{CiArray, CiEntry, CiFlags, CiHeader},
    error::{Problem, Result, Thing},
    kind::FileKind,
};

/// What a check has counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// Names, the root among them; every hard link counted.
    pub names: u64,
    /// Number of inodes that the superblock records. Builders count every hard link.
    pub recorded_inos: u64,
    /// Distinct inodes.
    pub inodes: u64,
    /// Directories.
    pub directories: u64,
    /// Regular files.
    pub files: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Devices, fifos and sockets.
    pub specials: u64,
    /// Extended attributes.
    pub xattrs: u64,
    /// Bytes of all regular files, hard links counted once.
    pub file_bytes: u64,
    /// Chunk indexes of all regular files.
    pub chunk_references: u64,
    /// Chunk table entries.
    pub chunks: u64,
    /// Depth of the deepest name; the root has 0.
    pub depth: u64,
    /// Inodes whose recorded link count is not the number of their names (directories: 2 + subdirectories).
    /// Reference builders leave such counts after a merge, so this is no error.
    pub wrong_link_counts: u64,
}

/// What a blob's compression info has confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobSummary {
    /// Chunks of the blob.
    pub chunks: u64,
    /// Chunks that the image refers to.
    pub referenced: u64,
}

impl<'a> Image<'a> {
    /// Checks the chunk table, and every directory, inode, xattr and chunk index that the root leads to.
    ///
    /// Allocates at most half the file's length and 6 MiB.
    pub fn check(&self) -> Result<Summary> {
        let mut summary = Summary {
            recorded_inos: self.superblock.inos.get(),
            chunks: bytes::len(self.chunk_table),
            ..Summary::default()
        };
        for blob in &self.blobs {
            self.check_chunks(blob)?;
        }
        let mut walk = self.walk()?;
        // Subdirectories of the directories on the way to the current name.
        let mut subdirectories: Vec<(Inode<'a>, u32)> = Vec::new();
        for visit in walk.by_ref() {
            let visit = visit?;
            summary.names += 1;
            summary.depth = summary.depth.max(bytes::index(visit.depth));
            while subdirectories.len() > visit.depth {
                summary.count_directory_links(subdirectories.pop());
            }
            if visit.inode.kind == FileKind::Directory {
                if let Some((_, count)) = subdirectories.last_mut() {
                    *count = count.saturating_add(1);
                }
                subdirectories.push((visit.inode, 0));
            }
            if visit.first {
                self.check_inode(&visit.inode, &mut summary)?;
            }
        }
        while let Some(directory) = subdirectories.pop() {
            summary.count_directory_links(Some(directory));
        }
        for (nid, links) in walk.link_counts() {
            let inode = self.inode(nid)?;
            if inode.kind != FileKind::Directory && inode.nlink != links {
                summary.wrong_link_counts += 1;
            }
        }
        Ok(summary)
    }

    fn check_inode(&self, inode: &Inode<'a>, summary: &mut Summary) -> Result<()> {
        summary.inodes += 1;
        summary.xattrs += check_xattrs(inode)?;
        match inode.kind {
            FileKind::Directory => summary.directories += 1,
            FileKind::Symlink => {
                inode.target()?;
                summary.symlinks += 1;
            }
            FileKind::Regular => {
                summary.files += 1;
                summary.file_bytes = summary.file_bytes.saturating_add(inode.size);
                summary.chunk_references += self.check_file(inode)?;
            }
            _ => summary.specials += 1,
        }
        Ok(())
    }

    fn check_file(&self, inode: &Inode<'a>) -> Result<u64> {
        let thing = Thing::ChunkIndexes(inode.nid);
        let mut chunks = inode.chunks();
        let mut count = 0;
        loop {
            let at = chunks.position();
            let Some(chunk) = chunks.next() else { break };
            self.check_chunk(&chunk?)
                .map_err(|(field, offset, problem)| thing.error(field, at + offset, problem))?;
            count += 1;
        }
        inode.check_enlarged()?;
        Ok(count)
    }

    /// Compares a chunk index with the chunk table.
    fn check_chunk(&self, chunk: &Chunk) -> Result<(), (&'static str, u64, Problem)> {
        let Some(entry) = self.chunk(chunk.blob, chunk.index) else {
            return Err(("ci_index", 0, Problem::Missing("its entry in the chunk table")));
        };
        let expected = entry.uncompressed_offset.get();
        if self.core.fine {
            // Offsets in a device are below 2^44, those of the table were checked before: no overflow.
            let (start, end) = (chunk.device_offset, chunk.device_offset + u64::from(chunk.size));
            let limit = expected + u64::from(entry.uncompressed_size.get());
            let problem = if start < expected {
                let with = "the start of its chunk (as bytes in the device)";
                Problem::Mismatch { found: start, expected, with }
            } else if end > limit {
                Problem::OutOfRange { end, limit, of: "its chunk (as bytes in the device)" }
            } else {
                return Ok(());
            };
            return Err(("start_block", 4, problem));
        }
        if chunk.device_offset != expected {
            let problem = Problem::Mismatch {
                found: chunk.device_offset,
                expected,
                with: "the chunk table (as bytes in the device)",
            };
            return Err(("start_block", 4, problem));
        }
        let expected = entry.uncompressed_size.get();
        if chunk.size != expected {
            let problem = Problem::Mismatch {
                found: chunk.size.into(),
                expected: expected.into(),
                with: "the chunk table (as size of the chunk)",
            };
            return Err(("size", 0, problem));
        }
        Ok(())
    }

    /// Checks the compression info of a blob, as found in the blob, against the bootstrap: `header` is the block
    /// behind it, `ci` its uncompressed bytes. A blob without chunks has neither.
    pub fn check_blob(&self, blob: usize, header: &CiHeader, ci: &[u8]) -> Result<BlobSummary> {
        let Some(found) = self.blobs.get(blob) else {
            let expected = "below the number of blobs";
            return Err(Thing::BlobEntry(blob).value("index", 0, bytes::index(blob), expected));
        };
        header.check(found)?;
        let array = CiArray::decode(ci, header, found)?;
        let referenced = self.check_chunks(found)?;
        let wanted = u32::try_from(blob).unwrap_or(u32::MAX);
        for entry in self.chunk_table.iter().filter(|entry| entry.blob_index.get() == wanted) {
            let index = usize::try_from(entry.index.get()).unwrap_or(usize::MAX);
            let thing = Thing::CiEntry(index);
            let at = bytes::index(index).saturating_mul(found.features.ci_entry_size());
            let Some(ci) = array.entries.get(index) else {
                return Err(thing.error("index", at, Problem::Missing("the entry of a chunk")));
            };
            let stored = !ci.flags.intersects(CiFlags::BATCH | CiFlags::ZRAN);
            for (field, found, expected) in pairs(ci, entry, stored) {
                if found != expected {
                    let problem = Problem::Mismatch { found, expected, with: "the chunk table" };
                    return Err(thing.error(field, at, problem));
                }
            }
            if found.features.contains(BlobFeatures::CHUNK_INFO_V2)
                && ci.flags.contains(CiFlags::HAS_CRC32)
                && entry.flags.get() & ChunkFlags::HAS_CRC32.bits() != 0
                && ci.data & 0xffff_ffff != u64::from(entry.crc32.get())
            {
                let problem = Problem::Mismatch {
                    found: ci.data & 0xffff_ffff,
                    expected: entry.crc32.get().into(),
                    with: "the chunk table",
                };
                return Err(thing.error("crc32", at + 16, problem));
            }
        }
        Ok(BlobSummary { chunks: bytes::len(&array.entries), referenced })
    }
}

/// Fields of a CI entry and what the chunk table says of them.
fn pairs(
    ci: &CiEntry,
    entry: &crate::chunk_table::ChunkEntry,
    stored: bool,
) -> impl Iterator<Item = (&'static str, u64, u64)> {
    let compressed = u64::from(ci.flags.contains(CiFlags::COMPRESSED));
    let table_compressed = u64::from(entry.flags.get() & ChunkFlags::COMPRESSED.bits() != 0);
    let device = [
        ("uncompressed_offset", ci.uncompressed_offset, entry.uncompressed_offset.get()),
        ("uncompressed_size", ci.uncompressed_size.into(), entry.uncompressed_size.get().into()),
    ];
    let blob = [
        ("compressed_offset", ci.compressed_offset, entry.compressed_offset.get()),
        ("compressed_size", ci.compressed_size.into(), entry.compressed_size.get().into()),
        ("flags", compressed, table_compressed),
    ];
    device.into_iter().chain(blob.into_iter().filter(move |_| stored))
}

/// Checks the xattrs of an inode and that no name occurs twice; returns their number.
fn check_xattrs(inode: &Inode<'_>) -> Result<u64> {
    let mut found: Vec<Xattr<'_>> = inode.xattrs().collect::<Result<_>>()?;
    found.sort_unstable_by_key(|xattr| (xattr.index, xattr.suffix));
    if found.windows(2).any(|pair| (pair[0].index, pair[0].suffix) == (pair[1].index, pair[1].suffix)) {
        let at = inode.offset + inode.format.inode_size();
        return Err(Thing::Xattrs(inode.nid).error("name", at, Problem::Duplicate));
    }
    Ok(bytes::len(&found))
}

impl Summary {
    fn count_directory_links(&mut self, directory: Option<(Inode<'_>, u32)>) {
        if let Some((inode, subdirectories)) = directory
            && u64::from(inode.nlink) != 2 + u64::from(subdirectories)
        {
            self.wrong_link_counts += 1;
        }
    }
}
