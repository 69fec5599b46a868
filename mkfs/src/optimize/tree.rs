//! The tree of an image, with its files' blocks at their new places.

use std::collections::{BTreeMap, HashMap};

use erofs_format::layout::BLOCK;
use erofs_format::{Chunk, FileKind, FormatError, Image, Inode};

use super::start::Moved;
use crate::pack::{ChunkRef, DataId, FileChunks, usize_from};
use crate::tree::{Body, Inode as TreeInode, InodeId, Meta, Tree, Xattr};

const BLOCK_BYTES: u32 = 4096;
const _: () = assert!(BLOCK == 4096);

/// The tree of an image with its files' chunks, what moved at its new place; and the paths of its prefetch table.
pub(super) fn read(
    image: &Image<'_>,
    moved: &Moved,
    prefetch: &mut Vec<Vec<u8>>,
) -> Result<(Tree, Vec<FileChunks>), FormatError> {
    let mut tree = Tree::new();
    let mut files: Vec<FileChunks> = Vec::new();
    let mut ids: HashMap<u64, InodeId> = HashMap::new();
    let mut listed: HashMap<u64, Vec<u8>> = image.prefetch().map(|nid| (nid, Vec::new())).collect();
    let mut walk = image.walk()?;
    while let Some(visit) = walk.next() {
        let visit = visit?;
        let inode = visit.inode;
        if let Some(path) = listed.get_mut(&inode.nid).filter(|path| path.is_empty()) {
            *path = walk.path().to_vec();
        }
        let id = match ids.get(&inode.nid) {
            Some(id) => *id,
            None => {
                let mut xattrs = Vec::new();
                for xattr in inode.xattrs() {
                    let xattr = xattr?;
                    let (suffix, value) = (xattr.suffix.to_vec(), xattr.value.to_vec());
                    xattrs.push(Xattr { index: xattr.index, suffix, value });
                }
                xattrs.sort();
                let meta = Meta {
                    permissions: inode.mode & 0o7777,
                    uid: inode.uid,
                    gid: inode.gid,
                    mtime: inode.mtime,
                    mtime_nsec: inode.mtime_nsec,
                    xattrs,
                };
                let device = inode.rdev.unwrap_or(erofs_format::inode::DeviceNumber { major: 0, minor: 0 });
                let body = match inode.kind {
                    FileKind::Directory => Body::Directory(BTreeMap::new()),
                    FileKind::Regular => {
                        files.push(chunks_of(&inode, image.chunk_size(), moved)?);
                        Body::Regular { size: inode.size, data: DataId::new(files.len() - 1) }
                    }
                    FileKind::Symlink => Body::Symlink(inode.target()?.unwrap_or_default().to_vec()),
                    FileKind::CharDevice => Body::Char(device),
                    FileKind::BlockDevice => Body::Block(device),
                    FileKind::Fifo => Body::Fifo,
                    FileKind::Socket => Body::Socket,
                };
                let id = if visit.depth == 0 {
                    let root = tree.root();
                    *tree.get_mut(root) = TreeInode { meta, body };
                    root
                } else {
                    tree.add(TreeInode { meta, body })
                };
                ids.insert(inode.nid, id);
                id
            }
        };
        if visit.depth > 0
            && let Some(parent) = ids.get(&visit.parent)
            && let Some(children) = tree.children_mut(*parent)
        {
            children.insert(visit.name.to_vec(), id);
        }
    }
    prefetch.extend(image.prefetch().filter_map(|nid| listed.remove(&nid).filter(|path| !path.is_empty())));
    Ok((tree, files))
}

/// Where the content of a file is, in as few indexes as its pieces allow.
fn chunks_of(inode: &Inode<'_>, chunk_size: u32, moved: &Moved) -> Result<FileChunks, FormatError> {
    let chunks: Vec<Chunk> = inode.chunks().collect::<Result<_, _>>()?;
    let stays = |chunk: &Chunk, skip: u16| {
        let blob = u32::try_from(chunk.blob).expect("the image was checked: at most 254");
        ChunkRef { blob, index: chunk.index, skip }
    };
    if !chunks.iter().any(|chunk| moved.contains_key(&(chunk.blob, chunk.index))) {
        return Ok(FileChunks {
            unit: chunk_size,
            refs: chunks.iter().map(|chunk| stays(chunk, 0)).collect(),
        });
    }
    let mut blocks: Vec<ChunkRef> = Vec::new();
    for chunk in &chunks {
        let places = moved.get(&(chunk.blob, chunk.index));
        let count = u16::try_from(u64::from(chunk.size).div_ceil(BLOCK)).expect("at most 16 MiB");
        blocks.extend((0..count).map(|block| {
            let place = places.and_then(|places| *places.get(usize::from(block))?);
            place.unwrap_or_else(|| stays(chunk, block))
        }));
    }
    let follows = |pair: &[ChunkRef]| {
        let [first, second] = pair else { return false };
        let ChunkRef { skip, .. } = *first;
        *second == ChunkRef { skip: skip.wrapping_add(1), ..*first }
    };
    let fits = |unit: &usize| blocks.chunks(*unit).all(|run| run.windows(2).all(follows));
    let most = usize_from(chunk_size / BLOCK_BYTES);
    let unit = std::iter::successors(Some(most), |unit| Some(unit / 2)).find(fits).unwrap_or(1);
    let refs = blocks.iter().step_by(unit).copied().collect();
    Ok(FileChunks { unit: u32::try_from(unit).expect("at most a chunk's") * BLOCK_BYTES, refs })
}
