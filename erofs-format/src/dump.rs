//! Names every byte of a bootstrap.

use alloc::vec::Vec;
use core::fmt;

use crate::{
    blob_table, bytes, chunk, device,
    error::Result,
    image::{Image, Inode, InodeData, Visit},
    kind::FileKind,
    layout::{DEVICE_SLOTS_OFFSET, EXT_SUPERBLOCK_OFFSET, SUPERBLOCK_OFFSET},
};

/// A run of bytes of a bootstrap and what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region<'a> {
    /// File offset of the first byte.
    pub start: u64,
    /// File offset behind the last byte.
    pub end: u64,
    /// What the bytes are.
    pub what: What<'a>,
}

/// What some bytes of a bootstrap are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What<'a> {
    /// The EROFS superblock.
    SuperBlock,
    /// The RAFS extended superblock.
    ExtSuperBlock,
    /// The device slot of this blob.
    DeviceSlot(usize),
    /// The blob table entry of this blob.
    BlobEntry(usize),
    /// The prefetch table.
    PrefetchTable,
    /// The chunk table.
    ChunkTable,
    /// An inode.
    Inode {
        /// nid.
        nid: u64,
        /// The first name that leads to it; empty for the root.
        name: &'a [u8],
    },
    /// The xattr area of an inode.
    Xattrs {
        /// nid.
        nid: u64,
    },
    /// Entries of a directory or the target of a symlink, behind its inode.
    InlineData {
        /// nid.
        nid: u64,
    },
    /// Entries of a directory or the target of a symlink, in blocks of their own.
    DataBlocks {
        /// nid.
        nid: u64,
    },
    /// The chunk indexes of a file.
    ChunkIndexes {
        /// nid.
        nid: u64,
    },
    /// Zeros that belong to nothing.
    Padding,
    /// Bytes other than zero that belong to nothing.
    Unaccounted,
}

/// Every byte of a bootstrap, named. Displays as text, one region per line with its fields.
#[derive(Debug, Clone)]
pub struct Dump<'a> {
    image: Image<'a>,
    /// Regions that something claims, sorted.
    claimed: Vec<Region<'a>>,
    unaccounted: u64,
    overlapping: u64,
}

/// Names every byte of a bootstrap. An error when the tree cannot be walked.
///
/// Allocates at most 8 times the file's length and 4 MiB.
pub fn dump(file: &[u8]) -> Result<Dump<'_>> {
    let image = Image::parse(file)?;
    let mut claimed = Claims(Vec::new());
    claimed.head(&image);
    for visit in image.walk()? {
        let visit = visit?;
        if visit.first {
            claimed.inode(&visit);
        }
    }
    let mut claimed = claimed.0;
    claimed.sort_unstable_by_key(|region| (region.start, region.end));
    let overlapping = overlapping(&claimed);
    let mut dump = Dump { image, claimed, unaccounted: 0, overlapping };
    dump.unaccounted = dump
        .regions()
        .filter(|region| region.what == What::Unaccounted)
        .map(|region| region.end - region.start)
        .sum();
    Ok(dump)
}

struct Claims<'a>(Vec<Region<'a>>);

impl<'a> Claims<'a> {
    fn add(&mut self, start: u64, size: u64, what: What<'a>) {
        if size > 0 {
            // Everything claimed has been read from the file, so its end does not overflow.
            self.0.push(Region { start, end: start.saturating_add(size), what });
        }
    }

    fn head(&mut self, image: &Image<'a>) {
        let ext = image.extended();
        self.add(SUPERBLOCK_OFFSET, 128, What::SuperBlock);
        self.add(EXT_SUPERBLOCK_OFFSET, 256, What::ExtSuperBlock);
        for blob in image.blobs() {
            let index = bytes::index(blob.index);
            let slot = DEVICE_SLOTS_OFFSET + index * device::SLOT_SIZE;
            self.add(slot, device::SLOT_SIZE, What::DeviceSlot(blob.index));
            let entry = ext.blob_table_offset.get() + index * blob_table::ENTRY_SIZE;
            self.add(entry, blob_table::ENTRY_SIZE, What::BlobEntry(blob.index));
        }
        self.add(ext.prefetch_table_offset.get(), ext.prefetch_table_size.get().into(), What::PrefetchTable);
        self.add(ext.chunk_table_offset.get(), ext.chunk_table_size.get(), What::ChunkTable);
    }

    fn inode(&mut self, visit: &Visit<'a>) {
        let inode = &visit.inode;
        let nid = inode.nid;
        let size = inode.format.inode_size();
        self.add(inode.offset, size, What::Inode { nid, name: visit.name });
        self.add(inode.offset + size, bytes::len(inode.xattr_area), What::Xattrs { nid });
        match inode.data {
            InodeData::None => {}
            InodeData::Flat { blocks, blocks_at, tail, tail_at } => {
                self.add(blocks_at, bytes::len(blocks), What::DataBlocks { nid });
                self.add(tail_at, bytes::len(tail), What::InlineData { nid });
            }
            InodeData::Chunks { indexes, at, .. } => {
                self.add(at, bytes::len(indexes) * chunk::INDEX_SIZE, What::ChunkIndexes { nid });
            }
        }
    }
}

/// Bytes that a region shares with one that starts before it.
fn overlapping(sorted: &[Region<'_>]) -> u64 {
    let mut covered = 0;
    let mut shared = 0u64;
    for region in sorted {
        shared = shared.saturating_add(covered.min(region.end).saturating_sub(region.start));
        covered = covered.max(region.end);
    }
    shared
}

impl<'a> Dump<'a> {
    /// The image.
    pub fn image(&self) -> &Image<'a> {
        &self.image
    }

    /// All regions in order. Unless some overlap, each starts where the one before it ends; the first starts at 0, the
    /// last ends at the end of the file.
    pub fn regions(&self) -> impl Iterator<Item = Region<'a>> + '_ {
        let file = self.image.bytes();
        let end = Region { start: bytes::len(file), end: bytes::len(file), what: What::Padding };
        let mut covered = 0;
        self.claimed.iter().copied().chain([end]).flat_map(move |region| {
            let gap = gap(file, covered, region.start);
            covered = covered.max(region.end);
            gap.into_iter().chain([region]).filter(|region| region.start < region.end)
        })
    }

    /// Bytes other than zero that belong to nothing: 0 for our own images.
    pub fn unaccounted(&self) -> u64 {
        self.unaccounted
    }

    /// Bytes that more than one thing claims: 0 for our own images.
    pub fn overlapping(&self) -> u64 {
        self.overlapping
    }
}

/// Zeros, other bytes, zeros: what lies between two claimed regions.
fn gap<'a>(file: &[u8], start: u64, end: u64) -> [Region<'a>; 3] {
    let part = |start, end, what| Region { start, end, what };
    let bytes = match (usize::try_from(start), usize::try_from(end)) {
        (Ok(from), Ok(to)) => file.get(from..to).unwrap_or_default(),
        _ => &[],
    };
    let used = |position: Option<usize>| position.map(|position| start + bytes::index(position));
    match (used(bytes.iter().position(|b| *b != 0)), used(bytes.iter().rposition(|b| *b != 0))) {
        (Some(first), Some(last)) => [
            part(start, first, What::Padding),
            part(first, last + 1, What::Unaccounted),
            part(last + 1, end, What::Padding),
        ],
        _ => [part(start, end, What::Padding), part(end, end, What::Padding), part(end, end, What::Padding)],
    }
}

impl fmt::Display for Dump<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for region in self.regions() {
            write!(f, "{:08x}-{:08x} {:>9}  ", region.start, region.end, region.end - region.start)?;
            self.describe(f, &region.what)?;
            writeln!(f)?;
        }
        writeln!(
            f,
            "{} bytes, {} unaccounted, {} overlapping",
            self.image.bytes().len(),
            self.unaccounted,
            self.overlapping
        )
    }
}

impl Dump<'_> {
    fn describe(&self, f: &mut fmt::Formatter<'_>, what: &What<'_>) -> fmt::Result {
        match *what {
            What::SuperBlock => self.superblock(f),
            What::ExtSuperBlock => self.extended(f),
            What::DeviceSlot(index) => self.slot(f, index),
            What::BlobEntry(index) => self.blob(f, index),
            What::PrefetchTable => {
                write!(f, "prefetch table: nids")?;
                self.image.prefetch().try_for_each(|nid| write!(f, " {nid}"))
            }
            What::ChunkTable => self.chunk_table(f),
            What::Inode { nid, name } => self.inode(f, nid, name),
            What::Xattrs { nid } => self.with_inode(f, nid, |f, inode| {
                write!(f, "xattrs of {nid}:")?;
                inode.xattrs().flatten().try_for_each(|xattr| {
                    write!(f, " {} ({} bytes)", xattr.name().escape_ascii(), xattr.value.len())
                })
            }),
            What::InlineData { nid } => self.content(f, nid, "inline"),
            What::DataBlocks { nid } => self.content(f, nid, "in blocks"),
            What::ChunkIndexes { nid } => self.with_inode(f, nid, |f, inode| {
                write!(f, "chunk indexes of {nid}: {}", inode.chunks().count())?;
                match inode.chunks().next() {
                    Some(Ok(chunk)) => {
                        write!(
                            f,
                            ", first blob {} chunk {} at {:#x}",
                            chunk.blob, chunk.index, chunk.device_offset
                        )
                    }
                    Some(Err(error)) => write!(f, ", {error}"),
                    None => Ok(()),
                }
            }),
            What::Padding => write!(f, "zero padding"),
            What::Unaccounted => write!(f, "UNACCOUNTED"),
        }
    }

    fn superblock(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sb = self.image.superblock();
        write!(
            f,
            "superblock: root nid {}, {} inodes, {} blocks, metadata at block {}, {} devices, compat {:#x}, incompat {:#x}, built {}",
            sb.root_nid,
            sb.inos,
            sb.blocks,
            sb.meta_blkaddr,
            sb.extra_devices,
            sb.feature_compat,
            sb.feature_incompat,
            sb.build_time
        )
    }

    fn extended(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ext = self.image.extended();
        write!(
            f,
            "extended superblock: flags {:#x}, chunk size {}, blob table {:#x}+{:#x}, chunk table {:#x}+{:#x}, prefetch table {:#x}+{:#x}",
            ext.flags,
            ext.chunk_size,
            ext.blob_table_offset,
            ext.blob_table_size,
            ext.chunk_table_offset,
            ext.chunk_table_size,
            ext.prefetch_table_offset,
            ext.prefetch_table_size
        )
    }

    fn slot(&self, f: &mut fmt::Formatter<'_>, index: usize) -> fmt::Result {
        let Some(blob) = self.image.blobs().get(index) else { return Ok(()) };
        let (blocks, mapped) = (blob.blocks, blob.mapped_blkaddr);
        write!(f, "device slot {index}: {}, {blocks} blocks, mapped at block {mapped}", blob.id)
    }

    fn blob(&self, f: &mut fmt::Formatter<'_>, index: usize) -> fmt::Result {
        let Some(blob) = self.image.blobs().get(index) else { return Ok(()) };
        write!(
            f,
            "blob {index}: {} chunks, {}, {}, features {:#x}, stored {}, device {}, CI {} at {:#x}+{:#x} of {:#x}",
            blob.chunk_count,
            blob.compressor,
            blob.digest,
            blob.features.bits(),
            blob.compressed_size,
            blob.uncompressed_size,
            blob.ci_compressor,
            blob.ci_offset,
            blob.ci_compressed_size,
            blob.ci_uncompressed_size
        )
    }

    fn chunk_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chunk table: {} chunks", self.image.chunk_table().len())?;
        for entry in self.image.chunk_table() {
            write!(f, "\n  ")?;
            entry.digest.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
            write!(
                f,
                " blob {} chunk {}: {} bytes at {:#x}, stored {} at {:#x}, flags {:#x}",
                entry.blob_index,
                entry.index,
                entry.uncompressed_size,
                entry.uncompressed_offset,
                entry.compressed_size,
                entry.compressed_offset,
                entry.flags
            )?;
        }
        Ok(())
    }

    fn inode(&self, f: &mut fmt::Formatter<'_>, nid: u64, name: &[u8]) -> fmt::Result {
        let name = if name.is_empty() { b"/" } else { name };
        self.with_inode(f, nid, |f, inode| {
            write!(
                f,
                "inode {nid} \"{}\": {}, mode {:o}, {}:{}, {} bytes, {} links, mtime {}.{:09}, {:?}{}",
                name.escape_ascii(),
                inode.kind,
                inode.mode & 0o7777,
                inode.uid,
                inode.gid,
                inode.size,
                inode.nlink,
                inode.mtime,
                inode.mtime_nsec,
                inode.format.layout,
                if inode.format.extended { "" } else { ", compact" }
            )?;
            match inode.rdev {
                Some(rdev) => write!(f, ", device {}:{}", rdev.major, rdev.minor),
                None => Ok(()),
            }
        })
    }

    fn content(&self, f: &mut fmt::Formatter<'_>, nid: u64, place: &str) -> fmt::Result {
        self.with_inode(f, nid, |f, inode| match inode.kind {
            FileKind::Symlink => match inode.target() {
                Ok(target) => {
                    write!(f, "target of {nid}, {place}: {}", target.unwrap_or_default().escape_ascii())
                }
                Err(error) => write!(f, "target of {nid}, {place}: {error}"),
            },
            _ => write!(f, "entries of {nid}, {place}"),
        })
    }

    fn with_inode(
        &self,
        f: &mut fmt::Formatter<'_>,
        nid: u64,
        show: impl FnOnce(&mut fmt::Formatter<'_>, &Inode<'_>) -> fmt::Result,
    ) -> fmt::Result {
        match self.image.inode(nid) {
            Ok(inode) => show(f, &inode),
            Err(error) => write!(f, "{error}"),
        }
    }
}
