//! A writer of images, plain and straight, to test the reader with trees of any shape.

use std::collections::BTreeMap;

use erofs_format::{
    BlobFeatures, BlobId, Compressor, DigestAlgo, FileKind,
    blob_table::BlobEntry,
    chunk::{ChunkHeader, ChunkIndex},
    chunk_table::{ChunkEntry, ChunkFlags},
    device::DeviceSlot,
    dirent,
    extended::{ExtFlags, ExtSuperBlock},
    inode::{DataLayout, DeviceNumber, InodeCompact, InodeExtended, InodeFormat, inline_fits},
    layout::{BLOCK, DEVICE_SLOTS_OFFSET, blob_table_offset},
    superblock::{self, SuperBlock},
    xattr,
};
use zerocopy::{FromZeros, IntoBytes, little_endian as le};

pub const CHUNK_SIZE: u32 = 65536;

pub struct BlobSpec {
    pub compressor: Compressor,
    /// Size and stored size of each chunk.
    pub chunks: Vec<(u32, u32)>,
}

impl BlobSpec {
    fn device_offsets(&self) -> Vec<u64> {
        let mut next = 0;
        let mut offsets = Vec::new();
        for (size, _) in &self.chunks {
            offsets.push(next);
            next += u64::from(*size).next_multiple_of(BLOCK);
        }
        offsets.push(next);
        offsets
    }
}

pub enum Content {
    Directory(BTreeMap<Vec<u8>, usize>),
    /// Blob and CI index of each chunk; the size follows from them. Kernel chunk size if not the image's.
    File(Vec<(usize, u32)>, Option<u64>),
    Symlink(Vec<u8>),
    Special(FileKind, DeviceNumber),
}

pub struct Node {
    pub content: Content,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub compact: bool,
}

impl From<Content> for Node {
    fn from(content: Content) -> Self {
        Self { content, xattrs: Vec::new(), compact: false }
    }
}

pub struct Tree {
    pub nodes: Vec<Node>,
    pub blobs: Vec<BlobSpec>,
    pub prefetch: Vec<usize>,
}

impl Tree {
    pub fn new(blobs: Vec<BlobSpec>) -> Self {
        Self { nodes: vec![Content::Directory(BTreeMap::new()).into()], blobs, prefetch: Vec::new() }
    }

    pub fn link(&mut self, parent: usize, name: impl AsRef<[u8]>, node: usize) {
        let Content::Directory(children) = &mut self.nodes[parent].content else { panic!("not a directory") };
        assert!(children.insert(name.as_ref().to_vec(), node).is_none());
    }

    pub fn add(&mut self, parent: usize, name: impl AsRef<[u8]>, node: impl Into<Node>) -> usize {
        self.nodes.push(node.into());
        let index = self.nodes.len() - 1;
        self.link(parent, name, index);
        index
    }

    pub fn directory(&mut self, parent: usize, name: impl AsRef<[u8]>) -> usize {
        self.add(parent, name, Content::Directory(BTreeMap::new()))
    }

    pub fn build(&self) -> Vec<u8> {
        Writer::new(self).write()
    }
}

struct Place {
    offset: u64,
    head: u64,
    size: u64,
    layout: DataLayout,
    blocks_at: u64,
}

struct Writer<'t> {
    tree: &'t Tree,
    parents: Vec<usize>,
    /// Names of each node.
    names: Vec<u32>,
    places: Vec<Place>,
    meta: u64,
    end: u64,
}

fn xattr_area(node: &Node) -> Vec<u8> {
    let mut area = Vec::new();
    for (name, value) in &node.xattrs {
        let (index, suffix) = xattr::split_name(name).unwrap();
        if area.is_empty() {
            area.resize(12, 0);
        }
        let entry = xattr::XattrEntry {
            name_len: suffix.len() as u8,
            name_index: index.code(),
            value_size: le::U16::new(value.len() as u16),
        };
        let start = area.len();
        area.extend_from_slice(entry.as_bytes());
        area.extend_from_slice(suffix);
        area.extend_from_slice(value);
        area.resize(start + xattr::entry_size(suffix.len() as u8, value.len() as u16) as usize, 0);
    }
    area
}

impl<'t> Writer<'t> {
    fn new(tree: &'t Tree) -> Self {
        let mut parents = vec![0; tree.nodes.len()];
        let mut names = vec![0; tree.nodes.len()];
        for (index, node) in tree.nodes.iter().enumerate() {
            if let Content::Directory(children) = &node.content {
                for child in children.values() {
                    parents[*child] = index;
                    names[*child] += 1;
                }
            }
        }
        let table = blob_table_offset(tree.blobs.len() as u64);
        let meta =
            (table + 256 * tree.blobs.len() as u64 + 4 * tree.prefetch.len() as u64).next_multiple_of(BLOCK);
        let mut writer = Self { tree, parents, names, places: Vec::new(), meta, end: meta + 4096 };
        for node in 0..tree.nodes.len() {
            writer.place(node);
        }
        writer.end = writer.end.next_multiple_of(BLOCK);
        for place in &mut writer.places {
            let full = match place.layout {
                DataLayout::FlatInline => place.size - place.size % BLOCK,
                DataLayout::FlatPlain => place.size,
                DataLayout::ChunkBased => 0,
            };
            if full > 0 {
                place.blocks_at = writer.end;
                writer.end = (writer.end + full).next_multiple_of(BLOCK);
            }
        }
        writer
    }

    fn children(&self, node: usize) -> Vec<(Vec<u8>, usize)> {
        let Content::Directory(children) = &self.tree.nodes[node].content else { return Vec::new() };
        let mut all: Vec<_> = children.iter().map(|(name, child)| (name.clone(), *child)).collect();
        all.push((b".".to_vec(), node));
        all.push((b"..".to_vec(), self.parents[node]));
        all.sort();
        all
    }

    fn file_size(&self, chunks: &[(usize, u32)]) -> u64 {
        chunks.iter().map(|(blob, index)| u64::from(self.tree.blobs[*blob].chunks[*index as usize].0)).sum()
    }

    fn place(&mut self, index: usize) {
        let node = &self.tree.nodes[index];
        let head = if node.compact { 32 } else { 64 } + xattr_area(node).len() as u64;
        let (size, layout, behind) = match &node.content {
            Content::Directory(_) => {
                let size = dirent::packed_size(self.children(index).iter().map(|(name, _)| name.len()));
                (size, DataLayout::for_content(head, size), 0)
            }
            Content::Symlink(target) => {
                let size = target.len() as u64;
                (size, DataLayout::for_content(head, size), 0)
            }
            Content::File(chunks, _) => {
                (self.file_size(chunks), DataLayout::ChunkBased, 8 + 8 * chunks.len() as u64)
            }
            Content::Special(..) => (0, DataLayout::FlatPlain, 0),
        };
        let tail = if layout == DataLayout::FlatInline { size % BLOCK } else { 0 };
        let mut offset = self.end.next_multiple_of(32);
        if !inline_fits(offset, head, tail) {
            offset = offset.next_multiple_of(BLOCK);
        }
        assert!(inline_fits(offset, head, tail));
        self.places.push(Place { offset, head, size, layout, blocks_at: 0 });
        self.end = offset + head + tail + behind;
    }

    fn nid(&self, node: usize) -> u64 {
        (self.places[node].offset - self.meta) / 32
    }

    fn nlink(&self, node: usize) -> u32 {
        let is_directory = |node: usize| matches!(self.tree.nodes[node].content, Content::Directory(_));
        match &self.tree.nodes[node].content {
            Content::Directory(children) => {
                2 + children.values().filter(|child| is_directory(**child)).count() as u32
            }
            _ => self.names[node],
        }
    }

    fn write(&self) -> Vec<u8> {
        let chunks: usize = self.tree.blobs.iter().map(|blob| blob.chunks.len()).sum();
        let chunk_table = self.end.next_multiple_of(BLOCK);
        let len = (chunk_table + 80 * chunks as u64).next_multiple_of(BLOCK);
        let mut out = vec![0; len as usize];
        let names: u64 = (0..self.tree.nodes.len())
            .map(|node| self.children(node).len().saturating_sub(2) as u64)
            .sum::<u64>()
            + 1;
        self.head(&mut out, names, chunk_table, chunks as u64);
        for node in 0..self.tree.nodes.len() {
            self.node(&mut out, node);
        }
        let mut at = chunk_table as usize;
        for (index, blob) in self.tree.blobs.iter().enumerate() {
            let mut stored_at = 0;
            for (ci, ((size, stored), offset)) in blob.chunks.iter().zip(blob.device_offsets()).enumerate() {
                let mut entry = ChunkEntry::new_zeroed();
                entry.digest = [ci as u8 ^ 0x5a; 32];
                entry.blob_index = le::U32::new(index as u32);
                let flags = if size == stored { ChunkFlags::empty() } else { ChunkFlags::COMPRESSED };
                entry.flags = le::U32::new(flags.bits());
                entry.compressed_size = le::U32::new(*stored);
                entry.uncompressed_size = le::U32::new(*size);
                entry.compressed_offset = le::U64::new(stored_at);
                entry.uncompressed_offset = le::U64::new(offset);
                entry.index = le::U32::new(ci as u32);
                out[at..at + 80].copy_from_slice(entry.as_bytes());
                stored_at += u64::from(*stored);
                at += 80;
            }
        }
        out
    }

    fn head(&self, out: &mut [u8], names: u64, chunk_table: u64, chunks: u64) {
        let blobs = self.tree.blobs.len();
        let mut sb = SuperBlock::new_zeroed();
        sb.magic = le::U32::new(superblock::MAGIC);
        sb.feature_compat = le::U32::new(superblock::FEATURE_COMPAT_RAFS_V6);
        sb.blkszbits = 12;
        sb.root_nid = le::U16::new(self.nid(0) as u16);
        sb.inos = le::U64::new(names);
        sb.meta_blkaddr = le::U32::new((self.meta / BLOCK) as u32);
        sb.feature_incompat = le::U32::new(superblock::FEATURE_INCOMPAT);
        sb.extra_devices = le::U16::new(blobs as u16);
        sb.devt_slotoff = le::U16::new(superblock::DEVT_SLOTOFF);
        let mut ext = ExtSuperBlock::new_zeroed();
        let flags = ExtFlags::COMPRESSION_ZSTD | ExtFlags::DIGEST_SHA256 | ExtFlags::EXPLICIT_UID_GID;
        ext.flags = le::U64::new(flags.bits());
        ext.blob_table_offset = le::U64::new(blob_table_offset(blobs as u64));
        ext.blob_table_size = le::U32::new(256 * blobs as u32);
        ext.chunk_size = le::U32::new(CHUNK_SIZE);
        ext.chunk_table_offset = le::U64::new(chunk_table);
        ext.chunk_table_size = le::U64::new(80 * chunks);
        if !self.tree.prefetch.is_empty() {
            ext.prefetch_table_offset = le::U64::new(blob_table_offset(blobs as u64) + 256 * blobs as u64);
            ext.prefetch_table_size = le::U32::new(4 * self.tree.prefetch.len() as u32);
        }
        out[1024..1152].copy_from_slice(sb.as_bytes());
        out[1152..1408].copy_from_slice(ext.as_bytes());
        let mut mapped = (out.len() as u64).next_multiple_of(512 << 10) / BLOCK;
        for (index, blob) in self.tree.blobs.iter().enumerate() {
            let device = *blob.device_offsets().last().unwrap();
            let stored: u64 = blob.chunks.iter().map(|(_, stored)| u64::from(*stored)).sum();
            let id = BlobId([index as u8 + 1; 32]).to_hex();
            let mut slot = DeviceSlot::new_zeroed();
            slot.tag = id;
            slot.blocks = le::U32::new((device / BLOCK) as u32);
            slot.mapped_blkaddr = le::U32::new(mapped as u32);
            mapped += (device / BLOCK).next_multiple_of(128);
            let at = (DEVICE_SLOTS_OFFSET + 128 * index as u64) as usize;
            out[at..at + 128].copy_from_slice(slot.as_bytes());
            let mut entry = BlobEntry::new_zeroed();
            let ci = 16 * blob.chunks.len() as u64;
            entry.blob_id = id;
            entry.blob_index = le::U32::new(index as u32);
            entry.chunk_size = le::U32::new(CHUNK_SIZE);
            entry.chunk_count = le::U32::new(blob.chunks.len() as u32);
            entry.compression_algo = le::U32::new(blob.compressor.code());
            entry.digest_algo = le::U32::new(DigestAlgo::Sha256.code());
            entry.features = le::U32::new(BlobFeatures::PLAIN.bits());
            entry.compressed_size = le::U64::new(stored + ci + 4096);
            entry.uncompressed_size = le::U64::new(device);
            entry.ci_offset = le::U64::new(stored);
            entry.ci_compressed_size = le::U64::new(ci);
            entry.ci_uncompressed_size = le::U64::new(ci);
            let at = (blob_table_offset(blobs as u64) + 256 * index as u64) as usize;
            out[at..at + 256].copy_from_slice(entry.as_bytes());
        }
        let at = (blob_table_offset(blobs as u64) + 256 * blobs as u64) as usize;
        for (i, node) in self.tree.prefetch.iter().enumerate() {
            out[at + 4 * i..at + 4 * i + 4].copy_from_slice(&(self.nid(*node) as u32).to_le_bytes());
        }
    }

    fn kind(&self, node: usize) -> FileKind {
        match &self.tree.nodes[node].content {
            Content::Directory(_) => FileKind::Directory,
            Content::File(..) => FileKind::Regular,
            Content::Symlink(_) => FileKind::Symlink,
            Content::Special(kind, _) => *kind,
        }
    }

    fn node(&self, out: &mut [u8], index: usize) {
        let (node, place) = (&self.tree.nodes[index], &self.places[index]);
        let mut content = Vec::new();
        let u = match &node.content {
            Content::Directory(_) => {
                let children = self.children(index);
                let entries =
                    children.iter().map(|(name, child)| (&name[..], self.nid(*child), self.kind(*child)));
                dirent::encode(entries, &mut content).unwrap();
                (place.blocks_at / BLOCK) as u32
            }
            Content::Symlink(target) => {
                content.clone_from(target);
                (place.blocks_at / BLOCK) as u32
            }
            Content::File(chunks, kernel) => {
                for (blob, ci) in chunks {
                    let offset = self.tree.blobs[*blob].device_offsets()[*ci as usize];
                    let index = ChunkIndex::new(*blob, *ci, (offset / BLOCK) as u32).unwrap();
                    content.extend_from_slice(index.as_bytes());
                }
                ChunkHeader::for_chunk_size(kernel.unwrap_or(CHUNK_SIZE.into())).unwrap().encode()
            }
            Content::Special(_, rdev) => rdev.encode().unwrap(),
        };
        let area = xattr_area(node);
        let mode = self.kind(index).mode_bits() | 0o755;
        let format = InodeFormat { extended: !node.compact, layout: place.layout }.encode();
        let icount = xattr::icount(area.len() as u64).unwrap();
        let at = place.offset as usize;
        if node.compact {
            let mut inode = InodeCompact::new_zeroed();
            inode.i_format = le::U16::new(format);
            inode.i_xattr_icount = le::U16::new(icount);
            inode.i_mode = le::U16::new(mode);
            inode.i_nlink = le::U16::new(self.nlink(index) as u16);
            inode.i_size = le::U32::new(place.size as u32);
            inode.i_u = le::U32::new(u);
            out[at..at + 32].copy_from_slice(inode.as_bytes());
        } else {
            let mut inode = InodeExtended::new_zeroed();
            inode.i_format = le::U16::new(format);
            inode.i_xattr_icount = le::U16::new(icount);
            inode.i_mode = le::U16::new(mode);
            inode.i_size = le::U64::new(place.size);
            inode.i_u = le::U32::new(u);
            inode.i_ino = le::U32::new(index as u32 + 1);
            inode.i_uid = le::U32::new(1000);
            inode.i_mtime = le::U64::new(1_700_000_000);
            inode.i_mtime_nsec = le::U32::new(999_999_999);
            inode.i_nlink = le::U32::new(self.nlink(index));
            out[at..at + 64].copy_from_slice(inode.as_bytes());
        }
        let head_end = at + place.head as usize;
        out[head_end - area.len()..head_end].copy_from_slice(&area);
        match place.layout {
            DataLayout::ChunkBased => {
                let at = head_end.next_multiple_of(8);
                out[at..at + content.len()].copy_from_slice(&content);
            }
            _ => {
                assert_eq!(content.len() as u64, place.size);
                let full = match place.layout {
                    DataLayout::FlatInline => content.len() - content.len() % 4096,
                    _ => content.len(),
                };
                let (blocks, tail) = content.split_at(full);
                let at = place.blocks_at as usize;
                out[at..at + full].copy_from_slice(blocks);
                out[head_end..head_end + tail.len()].copy_from_slice(tail);
            }
        }
    }
}

/// An image with some of everything: two blobs, every kind, xattrs, hard links, large directories with names that sort
/// before `.`, symlinks around the block's edge, enlarged chunks, compact inodes, a prefetch table.
pub fn rich() -> Tree {
    let zstd = BlobSpec {
        compressor: Compressor::Zstd,
        chunks: vec![(CHUNK_SIZE, 1000), (CHUNK_SIZE, CHUNK_SIZE), (5000, 4999), (1, 1), (CHUNK_SIZE, 2)],
    };
    let plain = BlobSpec {
        compressor: Compressor::None,
        chunks: vec![(CHUNK_SIZE, CHUNK_SIZE), (CHUNK_SIZE, CHUNK_SIZE), (4097, 4097)],
    };
    let mut tree = Tree::new(vec![zstd, plain]);
    let usr = tree.directory(0, "usr");
    let file = tree.add(usr, "file", Content::File(vec![(0, 0), (0, 1), (0, 2)], None));
    tree.link(usr, "link", file);
    tree.link(0, b"\xff\xfe not utf-8", file);
    tree.add(usr, "empty", Content::File(vec![], None));
    tree.add(usr, "one", Content::File(vec![(0, 3)], None));
    tree.add(usr, "enlarged", Content::File(vec![(1, 0), (1, 1), (1, 2)], Some(4 * u64::from(CHUNK_SIZE))));
    tree.add(usr, "repeats", Content::File(vec![(0, 0), (0, 4), (1, 0), (0, 0), (1, 2)], None));
    let dev = tree.directory(0, "dev");
    tree.add(dev, "null", Content::Special(FileKind::CharDevice, DeviceNumber { major: 1, minor: 3 }));
    tree.add(
        dev,
        "disk",
        Content::Special(FileKind::BlockDevice, DeviceNumber { major: 259, minor: 0x12345 }),
    );
    let none = DeviceNumber { major: 0, minor: 0 };
    tree.add(dev, "pipe", Content::Special(FileKind::Fifo, none));
    tree.add(dev, "socket", Content::Special(FileKind::Socket, none));
    let links = tree.directory(0, "links");
    for len in [1, 2, 100, 4000, 4031, 4032, 4033, 4095] {
        tree.add(links, format!("to-{len}"), Content::Symlink(vec![b'x'; len]));
    }
    let many = tree.directory(0, "many");
    for i in 0..3000 {
        tree.add(many, format!("name-{i}"), Content::File(vec![(0, 3)], None));
    }
    for name in ["-x", "!", "+a", "...", ".a", ". ", ".-"] {
        tree.add(many, name, Content::Symlink(b"target".to_vec()));
    }
    tree.add(many, [b'L'; 255], Content::File(vec![], None));
    // One entry short of, at, and over a block.
    for len in [4080usize, 4096, 4112] {
        let directory = tree.directory(0, format!("full-{len}"));
        let mut left = len - 2 * 12 - 3;
        let mut i = 0;
        while left > 0 {
            let size = if left < 160 { left - 12 } else { 100 };
            tree.add(directory, format!("{i:0size$}"), Content::File(vec![], None));
            left -= 12 + size;
            i += 1;
        }
    }
    let mut old = Node::from(Content::File(vec![(0, 2)], None));
    old.compact = true;
    tree.add(0, "old", old);
    let mut with = Node::from(Content::File(vec![(0, 2)], None));
    with.xattrs = vec![
        (b"user.k".to_vec(), b"v".to_vec()),
        (b"system.posix_acl_access".to_vec(), vec![2, 0, 0, 0]),
        (b"trusted.t".to_vec(), vec![]),
        (b"security.capability".to_vec(), vec![1; 20]),
        (b"user.large".to_vec(), vec![7; 5000]),
    ];
    tree.add(0, "xattrs", with);
    let mut deep = 0;
    for i in 0..100 {
        deep = tree.directory(deep, format!("deep{i}"));
    }
    tree.prefetch = vec![file, usr];
    tree
}
