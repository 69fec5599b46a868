//! Checked navigation of a bootstrap from an untrusted place.

mod blob;
mod check;
mod chunk_map;
mod directory;
mod file;
mod head;
mod inode;
mod walk;
mod xattrs;

use alloc::vec::Vec;

use zerocopy::little_endian as le;

pub use blob::Blob;
pub use check::{BlobSummary, Summary};
pub use chunk_map::ChunkInfo;
pub use directory::{DirEntry, Entries};
pub use file::{Chunk, Chunks};
pub(crate) use inode::Data as InodeData;
pub use inode::Inode;
pub use walk::{Visit, Walk};
pub use xattrs::{Xattr, Xattrs};

use crate::{
    blob_table::BlobFeatures,
    chunk_table::ChunkEntry,
    error::{Result, Thing},
    extended::{ExtFlags, ExtSuperBlock},
    layout::BLOCK,
    superblock::SuperBlock,
};

/// What an inode needs to know of its image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Core<'a> {
    pub(crate) bytes: &'a [u8],
    /// File offset of nid 0.
    pub(crate) meta: u64,
    pub(crate) chunk_size: u32,
    /// Whether chunk indexes may lie inside chunks.
    pub(crate) fine: bool,
    pub(crate) blobs: usize,
    pub(crate) build_time: u64,
    pub(crate) build_time_nsec: u32,
}

/// A whole bootstrap, its superblocks, tables and blobs checked.
///
/// Inodes are checked when they are reached; [`Image::check`] reaches all of them.
#[derive(Debug, Clone)]
pub struct Image<'a> {
    pub(crate) core: Core<'a>,
    pub(crate) superblock: &'a SuperBlock,
    pub(crate) extended: &'a ExtSuperBlock,
    pub(crate) flags: ExtFlags,
    pub(crate) blobs: Vec<Blob>,
    pub(crate) chunk_table: &'a [ChunkEntry],
    /// Positions in the chunk table, sorted by blob and CI index.
    pub(crate) chunk_order: Vec<u32>,
    pub(crate) prefetch: &'a [le::U32],
}

impl<'a> Image<'a> {
    /// Checks superblocks, device slots and tables of a bootstrap.
    ///
    /// The caller bounds the length of the file. Allocates at most a quarter of it, besides 128 KiB.
    pub fn parse(bytes: &'a [u8]) -> Result<Self> {
        let head = head::parse(bytes)?;
        let blobs = blob::parse(bytes, &head)?;
        let chunk_order = chunk_map::order(head.chunk_table, head.extended, blobs.len())?;
        let superblock = head.superblock;
        let image = Self {
            core: Core {
                bytes,
                meta: u64::from(superblock.meta_blkaddr.get()) * BLOCK,
                chunk_size: head.extended.chunk_size.get(),
                fine: blobs.iter().any(|blob| blob.features.contains(BlobFeatures::FINE_INDEXES)),
                blobs: blobs.len(),
                build_time: superblock.build_time.get(),
                build_time_nsec: superblock.build_time_nsec.get(),
            },
            superblock,
            extended: head.extended,
            flags: head.flags,
            blobs,
            chunk_table: head.chunk_table,
            chunk_order,
            prefetch: head.prefetch,
        };
        image.root()?;
        Ok(image)
    }

    /// The whole file.
    pub fn bytes(&self) -> &'a [u8] {
        self.core.bytes
    }

    /// The superblock.
    pub fn superblock(&self) -> &'a SuperBlock {
        self.superblock
    }

    /// The extended superblock.
    pub fn extended(&self) -> &'a ExtSuperBlock {
        self.extended
    }

    /// Flags of the extended superblock.
    pub fn flags(&self) -> ExtFlags {
        self.flags
    }

    /// Most bytes of a chunk; what one chunk index of a file stands for, unless indexes are fine.
    pub fn chunk_size(&self) -> u32 {
        self.core.chunk_size
    }

    /// The blobs, in device order: blob i is device id i + 1.
    pub fn blobs(&self) -> &[Blob] {
        &self.blobs
    }

    /// The chunk table as it is on disk; see [`Image::chunk_map`] for the checked view of one blob.
    pub fn chunk_table(&self) -> &'a [ChunkEntry] {
        self.chunk_table
    }

    /// nids to fetch early, in order of priority. A hint: they may name no inode.
    pub fn prefetch(&self) -> impl Iterator<Item = u64> + use<'a> {
        self.prefetch.iter().map(|nid| u64::from(nid.get())).take_while(|nid| *nid != 0)
    }

    /// nid of the root directory.
    pub fn root_nid(&self) -> u64 {
        u64::from(self.superblock.root_nid.get())
    }

    /// The root directory.
    pub fn root(&self) -> Result<Inode<'a>> {
        let root = self.inode(self.root_nid())?;
        if root.kind != crate::FileKind::Directory {
            return Err(Thing::SuperBlock.value("root_nid", 1038, root.nid, "the nid of a directory"));
        }
        Ok(root)
    }

    /// The inode with this nid, its own fields and the place of its content checked.
    pub fn inode(&self, nid: u64) -> Result<Inode<'a>> {
        Inode::parse(self.core, nid)
    }

    /// The inode at a path from the root, by bisection in each directory. Empty components are skipped, symlinks
    /// not followed. `None` when there is no such name, or a component before the last is not a directory.
    pub fn lookup(&self, path: &[u8]) -> Result<Option<Inode<'a>>> {
        let mut inode = self.root()?;
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            if inode.kind != crate::FileKind::Directory {
                return Ok(None);
            }
            match inode.lookup(name)? {
                Some(entry) => inode = self.inode(entry.nid)?,
                None => return Ok(None),
            }
        }
        Ok(Some(inode))
    }

    /// Every name of the tree, depth first in sorted order, each directory checked on the way.
    pub fn walk(&self) -> Result<Walk<'_, 'a>> {
        Walk::new(self)
    }
}
