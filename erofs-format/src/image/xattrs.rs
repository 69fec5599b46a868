//! The extended attributes of an inode.

use alloc::vec::Vec;

use super::Inode;
use crate::{
    bytes,
    error::{FormatError, Problem, Result, Thing},
    xattr::{HEADER_SIZE, NameIndex, XattrEntry, XattrHeader, entry_size},
};

/// An extended attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Xattr<'a> {
    /// What stands in front of the suffix.
    pub index: NameIndex,
    /// Rest of the name; empty when the prefix is the whole name.
    pub suffix: &'a [u8],
    /// Value.
    pub value: &'a [u8],
}

impl Xattr<'_> {
    /// The full name.
    pub fn name(&self) -> Vec<u8> {
        [self.index.prefix(), self.suffix].concat()
    }
}

/// Iterator over the extended attributes of an inode, in the order on disk. Ends after the first error.
#[derive(Debug, Clone)]
pub struct Xattrs<'a> {
    nid: u64,
    /// File offset of `rest`.
    at: u64,
    rest: &'a [u8],
    header: bool,
}

impl<'a> Inode<'a> {
    /// The extended attributes.
    pub fn xattrs(&self) -> Xattrs<'a> {
        Xattrs {
            nid: self.nid,
            at: self.offset + self.format.inode_size(),
            rest: self.xattr_area,
            header: !self.xattr_area.is_empty(),
        }
    }
}

impl<'a> Xattrs<'a> {
    fn fail<T>(&self, field: &'static str, at: u64, problem: Problem) -> Result<T> {
        Err(Thing::Xattrs(self.nid).error(field, self.at + at, problem))
    }

    fn take(&mut self, size: u64) -> Result<&'a [u8]> {
        let thing = Thing::Xattrs(self.nid);
        let part = bytes::range(self.rest, thing, "size", 0, size)
            .map_err(|error| FormatError { offset: self.at, ..error })?;
        self.rest = &self.rest[part.len()..];
        self.at += size;
        Ok(part)
    }

    fn read_header(&mut self) -> Result<()> {
        let at = self.at;
        let raw = self.take(HEADER_SIZE)?;
        let header: &XattrHeader = bytes::read(raw, Thing::Xattrs(self.nid), "header", 0)?;
        if header.shared_count != 0 {
            let found = header.shared_count;
            return Err(Thing::Xattrs(self.nid).value("shared_count", at + 4, found, "0 (no shared xattrs)"));
        }
        if header.name_filter.get() != 0 {
            let found = header.name_filter.get();
            return Err(Thing::Xattrs(self.nid).value("name_filter", at, found, "0"));
        }
        Ok(())
    }

    fn read_entry(&mut self) -> Result<Xattr<'a>> {
        let raw: &XattrEntry = bytes::read(self.rest, Thing::Xattrs(self.nid), "entry", 0)
            .map_err(|error| FormatError { offset: self.at, ..error })?;
        let name_len = usize::from(raw.name_len);
        let Some(index) = NameIndex::from_code(raw.name_index) else {
            let expected = "1, 2, 3, 4 or 6";
            return self.fail("name_index", 1, Problem::Value { found: raw.name_index.into(), expected });
        };
        if index.is_whole_name() != (name_len == 0) {
            let expected = "0 for an ACL, else not 0";
            return self.fail("name_len", 0, Problem::Value { found: raw.name_len.into(), expected });
        }
        let value_end = 4 + name_len + usize::from(raw.value_size.get());
        let at = self.at;
        let entry = self.take(entry_size(raw.name_len, raw.value_size.get()))?;
        let (suffix, value) = (&entry[4..4 + name_len], &entry[4 + name_len..value_end]);
        if suffix.contains(&0) {
            let problem = Problem::Text("contains a NUL");
            return Err(Thing::Xattrs(self.nid).error("name", at + 4, problem));
        }
        Ok(Xattr { index, suffix, value })
    }
}

impl<'a> Iterator for Xattrs<'a> {
    type Item = Result<Xattr<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if core::mem::take(&mut self.header)
            && let Err(error) = self.read_header()
        {
            self.rest = &[];
            return Some(Err(error));
        }
        if self.rest.is_empty() {
            return None;
        }
        let entry = self.read_entry();
        if entry.is_err() {
            self.rest = &[];
        }
        Some(entry)
    }
}
