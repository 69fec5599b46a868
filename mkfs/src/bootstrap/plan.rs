//! The order in which inodes are written, and what of the blobs the merged tree still uses.

use crate::MkfsError;
use crate::layer::split_path;
use crate::pack::{ChunkRef, Packed};
use crate::report::TreeCounts;
use crate::tree::{Body, InodeId, Tree};

/// Most blobs of an image (the device id of a chunk index has 8 bits).
const BLOBS_MAX: usize = erofs_format::layout::MAX_BLOBS;

/// One inode that gets written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planned {
    pub(crate) id: InodeId,
    /// Directories only: the directory that holds it; the root holds itself.
    pub(crate) parent: InodeId,
    pub(crate) nlink: u32,
}

/// A blob as the merged tree uses it.
#[derive(Debug)]
pub(crate) struct UsedBlob {
    /// Number in build order.
    pub(crate) number: usize,
    /// For every chunk of the blob the offset in the first file that uses it.
    pub(crate) first_use: Vec<Option<u64>>,
}

/// What is written, in which order.
pub(crate) struct Plan {
    /// All inodes that a name leads to: the root; then, directory by directory in tree order, the new children.
    pub(crate) inodes: Vec<Planned>,
    /// Position in `inodes` of every inode of the tree.
    position: Vec<u32>,
    /// Blobs in the order of the device table: build order without those that nothing uses.
    pub(crate) blobs: Vec<UsedBlob>,
    /// Position in `blobs` of every blob in build order.
    blob_position: Vec<Option<usize>>,
    pub(crate) counts: TreeCounts,
}

const UNPLANNED: u32 = u32::MAX;

impl Plan {
    /// `counts` are the numbers of chunks of the blobs in build order.
    pub(crate) fn new(tree: &Tree, packed: &Packed, counts: &[usize]) -> Result<Self, MkfsError> {
        let mut plan = Self {
            inodes: Vec::new(),
            position: vec![UNPLANNED; tree.inode_count()],
            blobs: Vec::new(),
            blob_position: vec![None; counts.len()],
            counts: TreeCounts::default(),
        };
        plan.walk(tree)?;
        plan.find_used(tree, packed, counts);
        if plan.blobs.len() > BLOBS_MAX {
            return Err(MkfsError::Limit {
                what: "layers with file data",
                found: u64::try_from(plan.blobs.len()).unwrap_or(u64::MAX),
                limit: u64::try_from(BLOBS_MAX).unwrap_or(u64::MAX),
                remedy: "join some layers of the image, or convert its unpacked tree",
            });
        }
        Ok(plan)
    }

    /// Position of an inode in [`Self::inodes`].
    pub(crate) fn position(&self, id: InodeId) -> usize {
        usize::try_from(self.position[id.index()]).expect("usize has at least 32 bits")
    }

    /// Position in the device table of the blob that a chunk is in.
    pub(crate) fn blob_of(&self, chunk: ChunkRef) -> usize {
        self.blob_position[crate::pack::usize_from(chunk.blob)]
            .expect("every chunk of the tree marks its blob as used")
    }

    fn add(&mut self, tree: &Tree, id: InodeId, parent: InodeId) -> Result<(), MkfsError> {
        let position = u32::try_from(self.inodes.len()).ok().filter(|&n| n < u32::MAX >> 1);
        self.position[id.index()] = position.ok_or(MkfsError::Limit {
            what: "files",
            found: u64::try_from(self.inodes.len()).unwrap_or(u64::MAX),
            limit: (u32::MAX >> 1).into(),
            remedy: "split the image",
        })?;
        let nlink = if tree.children(id).is_some() { 2 } else { 0 };
        self.inodes.push(Planned { id, parent, nlink });
        Ok(())
    }

    fn walk(&mut self, tree: &Tree) -> Result<(), MkfsError> {
        self.add(tree, tree.root(), tree.root())?;
        self.counts.directories = 1;
        let mut todo = vec![tree.root()];
        while let Some(dir) = todo.pop() {
            let first = todo.len();
            let Some(children) = tree.children(dir) else { continue };
            for &child in children.values() {
                let is_new = self.position[child.index()] == UNPLANNED;
                if is_new {
                    self.add(tree, child, dir)?;
                }
                match &tree.get(child).body {
                    Body::Directory(_) => {
                        self.counts.directories += 1;
                        todo.push(child);
                        let dir = self.position(dir);
                        self.inodes[dir].nlink += 1;
                        continue;
                    }
                    Body::Regular { size, .. } => {
                        self.counts.files += 1;
                        self.counts.hard_links += u64::from(!is_new);
                        if is_new {
                            self.counts.file_bytes = self.counts.file_bytes.saturating_add(*size);
                        }
                    }
                    Body::Symlink(_) => self.counts.symlinks += 1,
                    Body::Char(_) | Body::Block(_) | Body::Fifo | Body::Socket => self.counts.special += 1,
                }
                let child = self.position(child);
                self.inodes[child].nlink += 1;
            }
            todo[first..].reverse();
        }
        Ok(())
    }

    fn find_used(&mut self, tree: &Tree, packed: &Packed, counts: &[usize]) {
        let mut used: Vec<Vec<Option<u64>>> = counts.iter().map(|_| Vec::new()).collect();
        for planned in &self.inodes {
            let Body::Regular { data, .. } = &tree.get(planned.id).body else { continue };
            let mut offset = 0;
            let chunks = packed.chunks_of(*data);
            for chunk in &chunks.refs {
                let number = crate::pack::usize_from(chunk.blob);
                let used = &mut used[number];
                if used.is_empty() {
                    used.resize(counts[number], None);
                }
                used[crate::pack::usize_from(chunk.index)].get_or_insert(offset);
                offset += u64::from(chunks.unit);
            }
        }
        for (number, first_use) in used.into_iter().enumerate() {
            if !first_use.is_empty() {
                self.blob_position[number] = Some(self.blobs.len());
                self.blobs.push(UsedBlob { number, first_use });
            }
        }
    }

    /// Number of names in the tree, the root's included: the superblock's `inos`.
    pub(crate) fn names(&self) -> u64 {
        let TreeCounts { directories, files, symlinks, special, .. } = self.counts;
        directories + files + symlinks + special
    }

    /// Positions of the inodes of a prefetch list.
    pub(crate) fn prefetch(&self, tree: &Tree, paths: &[Vec<u8>]) -> Result<Vec<usize>, MkfsError> {
        let find = |path: &Vec<u8>| {
            let mut id = tree.root();
            for name in split_path(path).ok()? {
                id = tree.child(id, &name)?;
            }
            Some(self.position(id))
        };
        paths
            .iter()
            .map(|path| find(path).ok_or_else(|| MkfsError::Prefetch { path: crate::error::show(path) }))
            .collect()
    }
}
