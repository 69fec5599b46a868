//! The entries of a directory, in order and by name.

use super::{Inode, inode::Data};
use crate::{
    bytes,
    dirent::{Dirent, ENTRY_SIZE, is_valid_name},
    error::{Problem, Result, Thing},
    kind::FileKind,
};

/// A name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// Name, 1 to 255 bytes without `/` and NUL; may be `.` or `..`.
    pub name: &'a [u8],
    /// nid of the target.
    pub nid: u64,
    /// Kind of the target, as recorded here.
    pub kind: FileKind,
}

impl DirEntry<'_> {
    /// Whether this is `.` or `..`.
    pub fn is_dot(&self) -> bool {
        matches!(self.name, b"." | b"..")
    }
}

/// One block of a directory, its first entry checked.
#[derive(Debug, Clone, Copy)]
struct Block<'a> {
    nid: u64,
    /// File offset.
    at: u64,
    bytes: &'a [u8],
    dirents: &'a [Dirent],
}

impl<'a> Block<'a> {
    fn open(nid: u64, at: u64, block: &'a [u8]) -> Result<Self> {
        let thing = Thing::Directory(nid);
        let first: &Dirent = bytes::read(block, thing, "entry", 0)
            .map_err(|error| crate::FormatError { offset: at, ..error })?;
        let names = u64::from(first.nameoff.get());
        if names == 0 || !names.is_multiple_of(ENTRY_SIZE) || names >= bytes::len(block) {
            let expected = "a multiple of 12 within the block";
            return Err(thing.value("nameoff", at + 8, names, expected));
        }
        let dirents = bytes::slice(block, thing, "entries", 0, names / ENTRY_SIZE)?;
        Ok(Self { nid, at, bytes: block, dirents })
    }

    fn entry(&self, index: usize) -> Result<DirEntry<'a>> {
        let thing = Thing::Directory(self.nid);
        let at = self.at + bytes::index(index) * ENTRY_SIZE;
        let Some(dirent) = self.dirents.get(index) else {
            return Err(thing.error("entry", at, Problem::Missing("the entry")));
        };
        let start = usize::from(dirent.nameoff.get());
        if start < size_of_val(self.dirents) {
            return Err(thing.value("nameoff", at + 8, dirent.nameoff.get(), "behind the entries"));
        }
        let end = match self.dirents.get(index + 1) {
            Some(next) => usize::from(next.nameoff.get()),
            None => self.bytes.len(),
        };
        let Some(mut name) = self.bytes.get(start..end) else {
            return Err(thing.value("nameoff", at + 8, dirent.nameoff.get(), "rising and within the block"));
        };
        if index + 1 == self.dirents.len() {
            // The last name ends at the first of the zeros that fill the block.
            let used = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
            let (used, fill) = name.split_at(used);
            if fill.iter().any(|byte| *byte != 0) {
                let problem = Problem::Text("has bytes other than 0 behind the last name");
                return Err(thing.error("names", self.at + bytes::index(start), problem));
            }
            name = used;
        }
        if !is_valid_name(name) {
            let problem = Problem::Text("is not 1 to 255 bytes without '/' and NUL");
            return Err(thing.error("name", self.at + bytes::index(start), problem));
        }
        let Some(kind) = FileKind::from_dirent_type(dirent.file_type) else {
            return Err(thing.value("file_type", at + 10, dirent.file_type, "1 to 7"));
        };
        Ok(DirEntry { name, nid: dirent.nid.get(), kind })
    }
}

/// The blocks of a directory.
#[derive(Debug, Clone, Copy)]
struct Blocks<'a> {
    nid: u64,
    full: &'a [u8],
    full_at: u64,
    tail: &'a [u8],
    tail_at: u64,
}

impl<'a> Blocks<'a> {
    const SIZE: usize = 4096;

    fn count(&self) -> usize {
        self.full.len().div_ceil(Self::SIZE) + usize::from(!self.tail.is_empty())
    }

    fn open(&self, index: usize) -> Result<Block<'a>> {
        let start = index * Self::SIZE;
        if start < self.full.len() {
            let end = self.full.len().min(start + Self::SIZE);
            Block::open(self.nid, self.full_at + bytes::index(start), &self.full[start..end])
        } else {
            Block::open(self.nid, self.tail_at, self.tail)
        }
    }
}

impl<'a> Inode<'a> {
    fn blocks(&self) -> Blocks<'a> {
        match self.data {
            Data::Flat { blocks, blocks_at, tail, tail_at } if self.kind == FileKind::Directory => {
                Blocks { nid: self.nid, full: blocks, full_at: blocks_at, tail, tail_at }
            }
            _ => Blocks { nid: self.nid, full: &[], full_at: 0, tail: &[], tail_at: 0 },
        }
    }

    /// The entries of a directory in order, `.` and `..` among them; empty for other kinds. Checks that names are
    /// valid and strictly rising. Ends after the first error.
    pub fn entries(&self) -> Entries<'a> {
        Entries { blocks: self.blocks(), next_block: 0, block: None, next_entry: 0, last: b"" }
    }

    /// The entry with this name, found as the kernel finds it: by bisection over the first names of the blocks, then
    /// in the block. `None` when there is none, or this is no directory.
    pub fn lookup(&self, name: &[u8]) -> Result<Option<DirEntry<'a>>> {
        let blocks = self.blocks();
        // The last block whose first name is not above `name`.
        let (mut low, mut high) = (0, blocks.count());
        let mut candidate = None;
        while low < high {
            let middle = low + (high - low) / 2;
            let block = blocks.open(middle)?;
            if block.entry(0)?.name <= name {
                candidate = Some(block);
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let Some(block) = candidate else { return Ok(None) };
        let (mut low, mut high) = (0, block.dirents.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let entry = block.entry(middle)?;
            match entry.name.cmp(name) {
                core::cmp::Ordering::Equal => return Ok(Some(entry)),
                core::cmp::Ordering::Less => low = middle + 1,
                core::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }
}

/// Iterator over the entries of a directory.
#[derive(Debug, Clone)]
pub struct Entries<'a> {
    blocks: Blocks<'a>,
    next_block: usize,
    block: Option<Block<'a>>,
    next_entry: usize,
    last: &'a [u8],
}

impl<'a> Entries<'a> {
    fn advance(&mut self) -> Result<Option<DirEntry<'a>>> {
        let block = match self.block.filter(|block| self.next_entry < block.dirents.len()) {
            Some(block) => block,
            None if self.next_block < self.blocks.count() => {
                let block = self.blocks.open(self.next_block)?;
                self.next_block += 1;
                self.next_entry = 0;
                self.block = Some(block);
                block
            }
            None => return Ok(None),
        };
        let entry = block.entry(self.next_entry)?;
        if entry.name <= self.last {
            let at = block.at + bytes::index(self.next_entry) * ENTRY_SIZE;
            let problem = Problem::Text("does not sort after the name before it");
            return Err(Thing::Directory(block.nid).error("name", at, problem));
        }
        self.last = entry.name;
        self.next_entry += 1;
        Ok(Some(entry))
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<DirEntry<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let entry = self.advance();
        if entry.is_err() {
            self.next_block = usize::MAX;
            self.block = None;
        }
        entry.transpose()
    }
}
