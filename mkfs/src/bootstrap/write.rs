//! Encodes a planned and placed tree.

use erofs_format::blob_table::{BlobEntry, BlobId};
use erofs_format::chunk::{ChunkHeader, ChunkIndex, indexes_offset};
use erofs_format::chunk_table::{ChunkEntry, ChunkFlags};
use erofs_format::device::DeviceSlot;
use erofs_format::extended::{ExtFlags, ExtSuperBlock};
use erofs_format::inode::{DataLayout, InodeExtended, InodeFormat};
use erofs_format::layout::{
    BLOCK, BLOCK_BITS, DEVICE_MAP_ALIGN, DEVICE_SLOTS_OFFSET, EXT_SUPERBLOCK_OFFSET, SUPERBLOCK_OFFSET,
};
use erofs_format::superblock::{self, SuperBlock};
use erofs_format::xattr::{XattrEntry, XattrHeader, icount};
use erofs_format::{dirent, prefetch::PrefetchEntry};
use skimmer_fetcher::BlobRef;
use zerocopy::{FromZeros, IntoBytes, little_endian as le};

use super::Plan;
use super::place::{Placed, Places, dir_names};
use crate::blob::StoredChunk;
use crate::pack::{ChunkRef, FileChunks, Packed, usize_from};
use crate::tree::{Body, Inode, Tree, Xattr};
use crate::{MkfsError, Options};

/// A blob in the destination.
#[derive(Debug)]
pub(crate) struct PublishedBlob {
    /// sha256 of its file.
    pub(crate) id: BlobId,
    pub(crate) chunks: Vec<StoredChunk>,
    /// The blob table entry, id and index left out.
    pub(crate) entry: BlobEntry,
}

/// A file under construction: bytes come in order, gaps are zero.
struct Image(Vec<u8>);

impl Image {
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let offset = size(offset);
        debug_assert!(offset >= self.0.len(), "parts are written in order");
        self.0.resize(offset, 0);
        self.0.extend_from_slice(bytes);
    }
}

fn size(value: u64) -> usize {
    usize::try_from(value).expect("a bootstrap is built in memory, which its tree has outgrown before")
}

fn len64(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).expect("usize has at most 64 bits")
}

fn u32_of(value: u64) -> le::U32 {
    le::U32::new(u32::try_from(value).expect("Places and Plan bound all counts and block numbers to 32 bits"))
}

/// The bootstrap's bytes. `blobs` are those of the plan, in its order.
pub(crate) fn write(
    tree: &Tree,
    plan: &Plan,
    packed: &Packed,
    blobs: &[(BlobRef, PublishedBlob)],
    options: &Options,
) -> Result<Vec<u8>, MkfsError> {
    let blobs: Vec<&PublishedBlob> = blobs.iter().map(|(_, blob)| blob).collect();
    let blobs = blobs.as_slice();
    let chunks = chunk_table(plan, blobs, options);
    let prefetch = plan.prefetch(tree, &options.prefetch)?;
    let prefetch_len = u64::try_from(prefetch.len()).expect("usize has at most 64 bits");
    let chunk_len = u64::try_from(chunks.len()).expect("usize has at most 64 bits");
    let places = Places::new(tree, plan, packed, prefetch_len, chunk_len)?;
    let mut image = Image(Vec::new());
    image.0.reserve_exact(size(places.end));

    image.put(SUPERBLOCK_OFFSET, super_block(plan, &places, blobs).as_bytes());
    let ext = ext_super_block(tree, plan, &places, options, prefetch_len, chunk_len);
    image.put(EXT_SUPERBLOCK_OFFSET, ext.as_bytes());
    let mut slot_at = DEVICE_SLOTS_OFFSET;
    for slot in device_slots(blobs, places.end)? {
        image.put(slot_at, slot.as_bytes());
        slot_at += len64(slot.as_bytes());
    }
    let mut at = places.blob_table;
    for (index, blob) in (0u32..).zip(blobs) {
        let mut entry = blob.entry;
        entry.blob_id = blob.id.to_hex();
        entry.blob_index = le::U32::new(index);
        image.put(at, entry.as_bytes());
        at += len64(entry.as_bytes());
    }
    let mut at = places.prefetch_table;
    for position in prefetch {
        let nid = places.nid(position);
        let entry: PrefetchEntry = u32::try_from(nid).map(le::U32::new).map_err(|_| MkfsError::Limit {
            what: "metadata in front of a file of the prefetch list",
            found: nid,
            limit: u32::MAX.into(),
            remedy: "shorten the prefetch list",
        })?;
        image.put(at, entry.as_bytes());
        at += len64(entry.as_bytes());
    }
    let mut blocks = Vec::new();
    for (position, (planned, placed)) in plan.inodes.iter().zip(&places.inodes).enumerate() {
        let inode = tree.get(planned.id);
        let ino = u64::try_from(position).expect("usize has at most 64 bits") + 1;
        write_head(
            &mut image,
            inode,
            placed,
            u32_of(ino),
            planned.nlink,
            i_u(inode, placed, plan, packed, blobs),
        );
        match &inode.body {
            Body::Directory(_) => {
                let entries = dir_names(tree, planned.id, planned.parent)
                    .map(|(name, id)| (name, places.nid(plan.position(id)), tree.get(id).body.kind()));
                let mut content = Vec::new();
                dirent::encode(entries, &mut content)
                    .expect("names were checked when they came in, and a map sorts them");
                write_flat(&mut image, &mut blocks, placed, &content);
            }
            Body::Symlink(target) => write_flat(&mut image, &mut blocks, placed, target),
            Body::Regular { data, .. } => {
                let mut at = indexes_offset(placed.offset + placed.head).expect("as in Places");
                for &chunk in &packed.chunks_of(*data).refs {
                    let block = device_offset(chunk, plan, blobs) / BLOCK;
                    let index = ChunkIndex::new(plan.blob_of(chunk), chunk.index, u32_of(block).get());
                    let index = index.expect("Plan bounds blobs, BlobWriter bounds chunks");
                    image.put(at, index.as_bytes());
                    at += len64(index.as_bytes());
                }
            }
            Body::Char(_) | Body::Block(_) | Body::Fifo | Body::Socket => {}
        }
    }
    image.put(places.blocks, &blocks);
    drop(blocks);
    let mut at = places.chunk_table;
    for entry in &chunks {
        image.put(at, entry.as_bytes());
        at += len64(entry.as_bytes());
    }
    image.put(places.end, &[]);
    Ok(image.0)
}

fn super_block(plan: &Plan, places: &Places, blobs: &[&PublishedBlob]) -> SuperBlock {
    let mut sb = SuperBlock::new_zeroed();
    sb.magic = le::U32::new(superblock::MAGIC);
    sb.feature_compat = le::U32::new(superblock::FEATURE_COMPAT_RAFS_V6);
    sb.blkszbits = BLOCK_BITS;
    sb.root_nid = le::U16::new(u16::try_from(places.nid(0)).expect("the root comes first: nid 128"));
    sb.inos = le::U64::new(plan.names());
    // The kernel adds the devices' blocks: only the bootstrap's own make statfs right. Loaders refuse an image
    // without blobs that has any.
    sb.blocks = if blobs.is_empty() { le::U32::ZERO } else { u32_of(places.end / BLOCK) };
    sb.meta_blkaddr = u32_of(places.meta / BLOCK);
    sb.feature_incompat = le::U32::new(superblock::FEATURE_INCOMPAT);
    sb.extra_devices = le::U16::new(u16::try_from(blobs.len()).expect("at most 254"));
    sb.devt_slotoff = le::U16::new(superblock::DEVT_SLOTOFF);
    sb
}

fn ext_super_block(
    tree: &Tree,
    plan: &Plan,
    places: &Places,
    options: &Options,
    prefetch: u64,
    chunks: u64,
) -> ExtSuperBlock {
    let mut flags = ExtFlags::of_compressor(options.compression.into())
        | ExtFlags::of_digest(options.digest.into())
        | ExtFlags::EXPLICIT_UID_GID
        | ExtFlags::ENCRYPTION_NONE;
    if plan.inodes.iter().any(|planned| !tree.get(planned.id).meta.xattrs.is_empty()) {
        flags |= ExtFlags::HAS_XATTR;
    }
    let mut ext = ExtSuperBlock::new_zeroed();
    ext.flags = le::U64::new(flags.bits());
    ext.blob_table_offset = le::U64::new(places.blob_table);
    ext.blob_table_size = u32_of(places.prefetch_table - places.blob_table);
    ext.chunk_size = le::U32::new(options.chunk_size);
    ext.chunk_table_offset = le::U64::new(places.chunk_table);
    ext.chunk_table_size = le::U64::new(chunks * erofs_format::chunk_table::ENTRY_SIZE);
    if prefetch > 0 {
        ext.prefetch_table_offset = le::U64::new(places.prefetch_table);
        ext.prefetch_table_size = u32_of(prefetch * erofs_format::prefetch::ENTRY_SIZE);
    }
    ext
}

/// Devices follow the bootstrap in one flat address space, each on a 512 KiB boundary.
fn device_slots(blobs: &[&PublishedBlob], end: u64) -> Result<Vec<DeviceSlot>, MkfsError> {
    let mut position = end;
    let mut slots = Vec::with_capacity(blobs.len());
    for blob in blobs {
        let start = position.next_multiple_of(DEVICE_MAP_ALIGN);
        let bytes = blob.entry.uncompressed_size.get();
        position = start + bytes;
        if u32::try_from(position / BLOCK).is_err() {
            return Err(MkfsError::Limit {
                what: "blocks of file data in all layers",
                found: position / BLOCK,
                limit: u32::MAX.into(),
                remedy: "split the image",
            });
        }
        let mut slot = DeviceSlot::new_zeroed();
        slot.tag = blob.id.to_hex();
        slot.blocks = u32_of(bytes / BLOCK);
        slot.mapped_blkaddr = u32_of(start / BLOCK);
        slots.push(slot);
    }
    Ok(slots)
}

/// One entry per chunk that the tree uses, sorted by digest and blob.
fn chunk_table(plan: &Plan, blobs: &[&PublishedBlob], options: &Options) -> Vec<ChunkEntry> {
    let mut table = Vec::new();
    for (blob_index, (used, blob)) in (0u32..).zip(plan.blobs.iter().zip(blobs)) {
        for (index, (chunk, first_use)) in (0u32..).zip(blob.chunks.iter().zip(&used.first_use)) {
            let Some(file_offset) = first_use else { continue };
            let mut flags = ChunkFlags::empty();
            flags.set(ChunkFlags::COMPRESSED, chunk.is_compressed());
            // A checksum that happens to be 0 cannot be told from a missing one.
            flags.set(ChunkFlags::HAS_CRC32, options.crc32 && chunk.crc32 != 0);
            table.push(ChunkEntry {
                digest: chunk.digest,
                blob_index: le::U32::new(blob_index),
                flags: le::U32::new(flags.bits()),
                compressed_size: le::U32::new(chunk.stored_len),
                uncompressed_size: le::U32::new(chunk.len),
                compressed_offset: le::U64::new(chunk.stored_offset),
                uncompressed_offset: le::U64::new(chunk.device_offset),
                file_offset: le::U64::new(*file_offset),
                index: le::U32::new(index),
                crc32: le::U32::new(chunk.crc32),
            });
        }
    }
    table.sort_unstable_by_key(|entry| (entry.digest, entry.blob_index.get()));
    table
}

fn device_offset(chunk: ChunkRef, plan: &Plan, blobs: &[&PublishedBlob]) -> u64 {
    let offset = blobs[plan.blob_of(chunk)].chunks[usize_from(chunk.index)].device_offset;
    offset + u64::from(chunk.skip) * BLOCK
}

fn i_u(inode: &Inode, placed: &Placed, plan: &Plan, packed: &Packed, blobs: &[&PublishedBlob]) -> le::U32 {
    match &inode.body {
        Body::Directory(_) | Body::Symlink(_) => u32_of(placed.blocks_at / BLOCK),
        Body::Regular { size, data } => {
            let chunks = packed.chunks_of(*data);
            let plain = ChunkHeader::for_chunk_size(chunks.unit.into());
            let plain = plain.expect("Options::check allows powers of two from 4 KiB only");
            let is_run = is_one_run(chunks, plan, blobs);
            let whole =
                size.checked_next_power_of_two().filter(|_| is_run).and_then(ChunkHeader::for_chunk_size);
            le::U32::new(whole.unwrap_or(plain).encode())
        }
        Body::Char(device) | Body::Block(device) => {
            le::U32::new(device.encode().expect("device_number has checked the limits"))
        }
        Body::Fifo | Body::Socket => le::U32::ZERO,
    }
}

/// Whether a file's chunks, more than one, follow each other in one device, so that the kernel can map all of them by
/// the first entry and read the file in large pieces.
fn is_one_run(chunks: &FileChunks, plan: &Plan, blobs: &[&PublishedBlob]) -> bool {
    let follows = |pair: &[ChunkRef]| {
        let [first, second] = pair else { return false };
        first.blob == second.blob
            && device_offset(*first, plan, blobs) + u64::from(chunks.unit)
                == device_offset(*second, plan, blobs)
    };
    chunks.refs.len() > 1 && chunks.refs.windows(2).all(follows)
}

fn write_head(image: &mut Image, inode: &Inode, placed: &Placed, ino: le::U32, nlink: u32, i_u: le::U32) {
    let meta = &inode.meta;
    let area = placed.head - erofs_format::inode::EXTENDED_SIZE;
    let head = InodeExtended {
        i_format: le::U16::new(InodeFormat::extended(placed.layout).encode()),
        i_xattr_icount: le::U16::new(icount(area).expect("make_xattrs bounds the area")),
        i_mode: le::U16::new(inode.body.kind().mode_bits() | meta.permissions),
        reserved: le::U16::ZERO,
        i_size: le::U64::new(placed.size),
        i_u,
        i_ino: ino,
        i_uid: le::U32::new(meta.uid),
        i_gid: le::U32::new(meta.gid),
        i_mtime: le::U64::new(meta.mtime.cast_unsigned()),
        i_mtime_nsec: le::U32::new(meta.mtime_nsec),
        i_nlink: le::U32::new(nlink),
        reserved2: [0; 16],
    };
    image.put(placed.offset, head.as_bytes());
    if meta.xattrs.is_empty() {
        return;
    }
    let mut at = placed.offset + len64(head.as_bytes());
    let header = XattrHeader::new_zeroed();
    image.put(at, header.as_bytes());
    at += len64(header.as_bytes());
    for Xattr { index, suffix, value } in &meta.xattrs {
        let entry = XattrEntry {
            name_len: u8::try_from(suffix.len()).expect("split_name bounds the suffix"),
            name_index: index.code(),
            value_size: le::U16::new(u16::try_from(value.len()).expect("make_xattrs bounds the value")),
        };
        image.put(at, &[entry.as_bytes(), suffix, value].concat());
        at += (len64(entry.as_bytes()) + len64(suffix) + len64(value)).next_multiple_of(4);
    }
    image.put(at, &[]);
}

/// Content of a directory or symlink: whole blocks to the block area, an inline tail behind the inode.
fn write_flat(image: &mut Image, blocks: &mut Vec<u8>, placed: &Placed, content: &[u8]) {
    debug_assert_eq!(len64(content), placed.size);
    let whole = match placed.layout {
        DataLayout::FlatInline => size(placed.size / BLOCK * BLOCK),
        DataLayout::FlatPlain | DataLayout::ChunkBased => content.len(),
    };
    let (whole, tail) = content.split_at(whole);
    blocks.extend_from_slice(whole);
    blocks.resize(blocks.len().next_multiple_of(size(BLOCK)), 0);
    if !tail.is_empty() {
        image.put(placed.offset + placed.head, tail);
    }
}
