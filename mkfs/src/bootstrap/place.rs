//! Where everything goes: offsets of tables, inodes and blocks of content.

use std::ops::Bound;

use erofs_format::inode::{DataLayout, EXTENDED_SIZE, SLOT_SIZE, inline_fits};
use erofs_format::layout::{BLOCK, META_SPARE, blob_table_offset};
use erofs_format::{blob_table, chunk, chunk_table, dirent, prefetch};

use super::Plan;
use crate::MkfsError;
use crate::pack::Packed;
use crate::tree::{Body, InodeId, Tree, xattr_area};

/// The place of one inode and its content.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    /// File offset of the inode.
    pub(super) offset: u64,
    /// Bytes of inode and xattrs.
    pub(super) head: u64,
    pub(super) layout: DataLayout,
    /// `i_size`.
    pub(super) size: u64,
    /// Flat layouts: file offset of the whole blocks of content; 0 when there are none.
    pub(super) blocks_at: u64,
}

/// All offsets of a bootstrap file.
#[derive(Debug)]
pub(super) struct Places {
    pub(super) blob_table: u64,
    pub(super) prefetch_table: u64,
    /// M: what nids are relative to.
    pub(super) meta: u64,
    pub(super) inodes: Vec<Placed>,
    /// First block behind the inodes.
    pub(super) blocks: u64,
    pub(super) chunk_table: u64,
    /// Length of the file.
    pub(super) end: u64,
}

impl Places {
    /// Inodes are packed in plan order; whole blocks of content follow behind all inodes, so that a walk over names
    /// and attributes reads neighbouring blocks.
    pub(super) fn new(
        tree: &Tree,
        plan: &Plan,
        packed: &Packed,
        prefetch: u64,
        chunks: u64,
    ) -> Result<Self, MkfsError> {
        let blobs = u64::try_from(plan.blobs.len()).expect("usize has at most 64 bits");
        let blob_table = blob_table_offset(blobs);
        let prefetch_table = blob_table + blob_table::ENTRY_SIZE * blobs;
        let meta = (prefetch_table + prefetch::ENTRY_SIZE * prefetch).next_multiple_of(BLOCK);
        let mut at = meta + META_SPARE;
        let mut inodes = Vec::with_capacity(plan.inodes.len());
        for planned in &plan.inodes {
            let placed = place(tree, planned.id, planned.parent, packed, at);
            // What the tree holds is in memory, chunk indexes are bounded by the packer: no sum comes near 2^64.
            at = placed.1.next_multiple_of(SLOT_SIZE);
            inodes.push(placed.0);
        }
        let blocks = at.next_multiple_of(BLOCK);
        let mut next = blocks;
        for placed in &mut inodes {
            let len = match placed.layout {
                DataLayout::FlatPlain => placed.size.next_multiple_of(BLOCK),
                DataLayout::FlatInline => placed.size / BLOCK * BLOCK,
                DataLayout::ChunkBased => 0,
            };
            if len > 0 {
                placed.blocks_at = next;
                next += len;
            }
        }
        let chunk_table = next;
        let end = (chunk_table + chunk_table::ENTRY_SIZE * chunks).next_multiple_of(BLOCK);
        if u32::try_from(end / BLOCK).is_err() {
            return Err(MkfsError::Limit {
                what: "blocks of metadata",
                found: end / BLOCK,
                limit: u32::MAX.into(),
                remedy: "split the image",
            });
        }
        Ok(Self { blob_table, prefetch_table, meta, inodes, blocks, chunk_table, end })
    }

    pub(super) fn nid(&self, position: usize) -> u64 {
        (self.inodes[position].offset - self.meta) / SLOT_SIZE
    }
}

/// Places one inode at or behind `at`; gives also the end of what is written with it.
fn place(tree: &Tree, id: InodeId, parent: InodeId, packed: &Packed, at: u64) -> (Placed, u64) {
    let inode = tree.get(id);
    let head = EXTENDED_SIZE + xattr_area(&inode.meta.xattrs);
    let flat = |size: u64| {
        let layout = DataLayout::for_content(head, size);
        let tail = if layout == DataLayout::FlatInline { size % BLOCK } else { 0 };
        // The kernel cannot read inline data that crosses a block.
        let offset = if tail > 0 && !inline_fits(at, head, tail) { at.next_multiple_of(BLOCK) } else { at };
        (Placed { offset, head, layout, size, blocks_at: 0 }, offset + head + tail)
    };
    match &inode.body {
        Body::Directory(_) => {
            flat(dirent::packed_size(dir_names(tree, id, parent).map(|(name, _)| name.len())))
        }
        Body::Symlink(target) => flat(u64::try_from(target.len()).expect("at most 4095")),
        Body::Regular { size, data } => {
            let count = u64::try_from(packed.chunks_of(*data).refs.len()).expect("usize has at most 64 bits");
            let indexes = chunk::indexes_offset(at + head).expect("offsets stay far below 2^64");
            let placed =
                Placed { offset: at, head, layout: DataLayout::ChunkBased, size: *size, blocks_at: 0 };
            (placed, if count == 0 { at + head } else { indexes + chunk::INDEX_SIZE * count })
        }
        Body::Char(_) | Body::Block(_) | Body::Fifo | Body::Socket => {
            (Placed { offset: at, head, layout: DataLayout::FlatPlain, size: 0, blocks_at: 0 }, at + head)
        }
    }
}

/// All names of a directory in byte order, `.` and `..` included.
pub(super) fn dir_names<'t>(
    tree: &'t Tree,
    id: InodeId,
    parent: InodeId,
) -> impl Iterator<Item = (&'t [u8], InodeId)> {
    let children = tree.children(id).expect("the caller asks for directories only");
    let (dot, dots): (&[u8], &[u8]) = (b".", b"..");
    let before = children.range::<[u8], _>((Bound::Unbounded, Bound::Excluded(dot)));
    // Between them there may be names such as ".\x01" and ".-".
    let between = children.range::<[u8], _>((Bound::Excluded(dot), Bound::Excluded(dots)));
    let after = children.range::<[u8], _>((Bound::Excluded(dots), Bound::Unbounded));
    let pair = |(name, id): (&'t Vec<u8>, &InodeId)| (name.as_slice(), *id);
    before
        .map(pair)
        .chain([(dot, id)])
        .chain(between.map(pair))
        .chain([(dots, parent)])
        .chain(after.map(pair))
}
