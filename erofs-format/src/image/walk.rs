//! Every name of the tree, without recursion.

use alloc::{vec, vec::Vec};

use super::{DirEntry, Entries, Image, Inode};
use crate::{
    bytes,
    error::{Problem, Result, Thing},
    inode::SLOT_SIZE,
    kind::FileKind,
    layout::MAX_DEPTH,
};

/// A name that a walk has reached.
#[derive(Debug, Clone, Copy)]
pub struct Visit<'a> {
    /// Number of directories above; 0 for the root.
    pub depth: usize,
    /// nid of the directory that holds the name; the root's own for the root.
    pub parent: u64,
    /// The name; empty for the root.
    pub name: &'a [u8],
    /// The inode.
    pub inode: Inode<'a>,
    /// Whether no name before this one led to the same inode.
    pub first: bool,
}

/// A directory that is being read.
#[derive(Debug)]
struct Frame<'a> {
    nid: u64,
    parent: u64,
    entries: Entries<'a>,
    /// Bytes of the path in front of this directory's names.
    path_len: usize,
    dots: u8,
}

/// Iterator over all names of an image, depth first, in sorted order, the root first.
///
/// Checks on the way: names, order, `.` and `..` of every directory, that an entry's type is that of its target, that a
/// directory is reached once, that inodes do not claim more bytes than the file has. Ends after the first error.
/// Allocates an eighth of the file's length for the count of names, and at most 2 MiB for directories and path.
#[derive(Debug)]
pub struct Walk<'i, 'a> {
    image: &'i Image<'a>,
    stack: Vec<Frame<'a>>,
    /// Names seen, by nid: every inode in the file has its slot.
    links: Vec<u32>,
    path: Vec<u8>,
    /// Bytes of the file that no inode has claimed.
    unclaimed: u64,
    started: bool,
}

impl<'i, 'a> Walk<'i, 'a> {
    pub(super) fn new(image: &'i Image<'a>) -> Result<Self> {
        let len = bytes::len(image.core.bytes);
        let slots = len.saturating_sub(image.core.meta).div_ceil(SLOT_SIZE);
        let slots =
            usize::try_from(slots).map_err(|_| Thing::Bootstrap.error("length", 0, Problem::Overflow))?;
        Ok(Self {
            image,
            stack: Vec::new(),
            links: vec![0; slots],
            path: Vec::new(),
            unclaimed: len,
            started: false,
        })
    }

    /// Path of the name reached last, with a leading `/`.
    pub fn path(&self) -> &[u8] {
        if self.path.is_empty() { b"/" } else { &self.path }
    }

    /// Number of names seen so far for each inode that was reached, as (nid, names).
    pub fn link_counts(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.links
            .iter()
            .enumerate()
            .filter(|(_, links)| **links > 0)
            .map(|(nid, links)| (bytes::index(nid), *links))
    }

    /// Counts a name of an inode; true when it is the first.
    fn reach(&mut self, inode: &Inode<'a>, thing: Thing, at: u64) -> Result<bool> {
        let slot = usize::try_from(inode.nid).ok().and_then(|nid| self.links.get_mut(nid));
        let Some(links) = slot else {
            return Err(thing.error("nid", at, Problem::Missing("the inode")));
        };
        if *links > 0 && inode.kind == FileKind::Directory {
            let problem = Problem::Text("leads to a directory that has been reached before");
            return Err(thing.error("nid", at, problem));
        }
        *links = links.saturating_add(1);
        if *links > 1 {
            return Ok(false);
        }
        match self.unclaimed.checked_sub(inode.footprint()) {
            Some(rest) => self.unclaimed = rest,
            None => {
                let problem =
                    Problem::Overlap { with: "other inodes: together they claim more than the file has" };
                return Err(Thing::Inode(inode.nid).error("content", inode.offset, problem));
            }
        }
        Ok(true)
    }

    fn open(&mut self, inode: &Inode<'a>, parent: u64) -> Result<()> {
        if self.stack.len() >= MAX_DEPTH {
            let found = bytes::index(self.stack.len());
            return Err(Thing::Directory(inode.nid).value("depth", inode.offset, found, "below 4096"));
        }
        self.stack.push(Frame {
            nid: inode.nid,
            parent,
            entries: inode.entries(),
            path_len: self.path.len(),
            dots: 0,
        });
        Ok(())
    }

    fn advance(&mut self) -> Result<Option<Visit<'a>>> {
        if !self.started {
            self.started = true;
            let inode = self.image.root()?;
            self.reach(&inode, Thing::SuperBlock, 1038)?;
            self.open(&inode, inode.nid)?;
            return Ok(Some(Visit { depth: 0, parent: inode.nid, name: b"", inode, first: true }));
        }
        while let Some(frame) = self.stack.last_mut() {
            let thing = Thing::Directory(frame.nid);
            let Some(entry) = frame.entries.next() else {
                let missing = match frame.dots {
                    3 => None,
                    1 => Some(".."),
                    _ => Some("."),
                };
                if let Some(name) = missing {
                    return Err(thing.error(
                        "names",
                        self.image.inode(frame.nid)?.offset,
                        Problem::Missing(name),
                    ));
                }
                self.stack.pop();
                continue;
            };
            let entry = entry?;
            if entry.is_dot() {
                frame.check_dot(&entry)?;
                continue;
            }
            let (parent, path_len) = (frame.nid, frame.path_len);
            return self.visit(entry, parent, path_len).map(Some);
        }
        Ok(None)
    }

    fn visit(&mut self, entry: DirEntry<'a>, parent: u64, path_len: usize) -> Result<Visit<'a>> {
        let thing = Thing::Directory(parent);
        let depth = self.stack.len();
        let inode = self.image.inode(entry.nid)?;
        if inode.kind != entry.kind {
            let problem = Problem::Mismatch {
                found: entry.kind.dirent_type().into(),
                expected: inode.kind.dirent_type().into(),
                with: "the mode of its target",
            };
            return Err(thing.error("file_type", inode.offset, problem));
        }
        let first = self.reach(&inode, thing, inode.offset)?;
        self.path.truncate(path_len);
        self.path.push(b'/');
        self.path.extend_from_slice(entry.name);
        if inode.kind == FileKind::Directory {
            self.open(&inode, parent)?;
        }
        Ok(Visit { depth, parent, name: entry.name, inode, first })
    }
}

impl Frame<'_> {
    fn check_dot(&mut self, entry: &DirEntry<'_>) -> Result<()> {
        let (bit, expected, with) =
            if entry.name == b"." { (1, self.nid, "the directory") } else { (2, self.parent, "its parent") };
        self.dots |= bit;
        let thing = Thing::Directory(self.nid);
        if entry.nid != expected {
            let problem = Problem::Mismatch { found: entry.nid, expected, with };
            return Err(thing.error(if bit == 1 { "nid of '.'" } else { "nid of '..'" }, 0, problem));
        }
        if entry.kind != FileKind::Directory {
            return Err(thing.value("file_type", 0, entry.kind.dirent_type(), "2 for '.' and '..'"));
        }
        Ok(())
    }
}

impl<'a> Iterator for Walk<'_, 'a> {
    type Item = Result<Visit<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let visit = self.advance();
        if visit.is_err() {
            self.started = true;
            self.stack.clear();
        }
        visit.transpose()
    }
}
