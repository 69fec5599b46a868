//! Table of contents at the end of a blob that has sections, and the tar headers behind each section.
//! Skimmer's own blobs have the plain form, without either.

use alloc::vec::Vec;

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

use crate::{
    bytes,
    error::{Problem, Result, Thing},
};

/// Bytes of an entry.
pub const ENTRY_SIZE: u64 = 128;
/// Bytes of the tar header behind a section.
pub const TAR_HEADER_SIZE: u64 = 512;
/// Most entries, so that table and tar header fit in the last 4096 bytes of a blob.
pub const MAX_ENTRIES: u64 = 28;
/// Name of the table's own tar header.
pub const TOC_NAME: &[u8] = b"rafs.blob.toc";

bitflags! {
    /// How a section is stored.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct TocFlags: u32 {
        /// As it is.
        const NONE = 0x1;
        /// As a zstd frame.
        const ZSTD = 0x2;
    }
}

/// A section of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    /// Chunk data.
    Data,
    /// Compression info.
    Meta,
    /// Compression info header.
    MetaHeader,
    /// Chunk digests.
    Digest,
    /// Bootstrap.
    Bootstrap,
}

impl Section {
    /// All sections, in the order of their entries.
    pub const ALL: [Self; 5] = [Self::Data, Self::Meta, Self::MetaHeader, Self::Digest, Self::Bootstrap];

    /// Name in the table.
    pub const fn name(self) -> &'static [u8] {
        match self {
            Self::Data => b"image.blob",
            Self::Meta => b"blob.meta",
            Self::MetaHeader => b"blob.meta.header",
            Self::Digest => b"blob.digest",
            Self::Bootstrap => b"image.boot",
        }
    }
}

/// An entry as on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct TocEntry {
    /// [`TocFlags`], exactly one.
    pub flags: le::U32,
    /// 0.
    pub reserved: le::U32,
    /// [`Section::name`], padded with zeros.
    pub name: [u8; 16],
    /// sha256 of the uncompressed section.
    pub digest: [u8; 32],
    /// Offset in the blob.
    pub compressed_offset: le::U64,
    /// Bytes stored.
    pub compressed_size: le::U64,
    /// Bytes of the section.
    pub uncompressed_size: le::U64,
    /// 0.
    pub reserved2: [u8; 48],
}

assert_layout!(TocEntry, 128, {
    flags: 0, reserved: 4, name: 8, digest: 24, compressed_offset: 56, compressed_size: 64, uncompressed_size: 72,
    reserved2: 80,
});

impl TocEntry {
    /// The section, if the name is a known one.
    pub fn section(&self) -> Option<Section> {
        let end = self.name.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        Section::ALL.into_iter().find(|section| section.name() == &self.name[..end])
    }
}

/// Reads the table from the last bytes of a blob of `blob_size` bytes: the tar header at the very end, the entries
/// in front of it. Checks the header's checksum, the names, and that every section lies in the blob.
pub fn parse(tail: &[u8], blob_size: u64) -> Result<Vec<(Section, &TocEntry)>> {
    let have = bytes::len(tail);
    let Some(header_at) = have.checked_sub(TAR_HEADER_SIZE) else {
        return Err(Thing::Toc.error("tar header", 0, Problem::Truncated { need: TAR_HEADER_SIZE, have }));
    };
    let header = bytes::range(tail, Thing::Toc, "tar header", header_at, TAR_HEADER_SIZE)?;
    let (name, size) = parse_tar_header(header)
        .map_err(|(field, at, text)| Thing::Toc.error(field, header_at + at, Problem::Text(text)))?;
    if name != TOC_NAME {
        return Err(Thing::Toc.error("name", header_at, Problem::Text("is not rafs.blob.toc")));
    }
    if size % ENTRY_SIZE != 0 || size > header_at || size / ENTRY_SIZE > MAX_ENTRIES {
        let expected = "a multiple of 128 within the bytes in front of it, at most 28 entries";
        return Err(Thing::Toc.value("size", header_at + 124, size, expected));
    }
    let start = header_at - size;
    let entries = bytes::slice::<TocEntry>(tail, Thing::Toc, "entries", start, size / ENTRY_SIZE)?;
    let mut found: Vec<(Section, &TocEntry)> = Vec::with_capacity(entries.len());
    let mut at = start;
    for (i, entry) in entries.iter().enumerate() {
        let thing = Thing::TocEntry(i);
        let Some(section) = entry.section() else {
            return Err(thing.error("name", at + 8, Problem::Text("is not the name of a known section")));
        };
        if found.iter().any(|(other, _)| *other == section) {
            return Err(thing.error("name", at + 8, Problem::Duplicate));
        }
        if ![TocFlags::NONE.bits(), TocFlags::ZSTD.bits()].contains(&entry.flags.get()) {
            return Err(thing.value("flags", at, entry.flags.get(), "1 (stored) or 2 (zstd)"));
        }
        match entry.compressed_offset.get().checked_add(entry.compressed_size.get()) {
            None => return Err(thing.error("compressed_offset", at + 56, Problem::Overflow)),
            Some(end) if end > blob_size => {
                let problem = Problem::OutOfRange { end, limit: blob_size, of: "the blob" };
                return Err(thing.error("compressed_offset", at + 56, problem));
            }
            Some(_) => {}
        }
        found.push((section, entry));
        at += ENTRY_SIZE;
    }
    Ok(found)
}

/// Name and size in a GNU tar header of a regular file.
fn parse_tar_header(header: &[u8]) -> Result<(&[u8], u64), (&'static str, u64, &'static str)> {
    let field = |range: core::ops::Range<usize>| header.get(range).unwrap_or_default();
    if field(257..265) != b"ustar  \0" {
        return Err(("magic", 257, "is not that of a GNU tar header"));
    }
    if ![b'0', 0].contains(&header[156]) {
        return Err(("type", 156, "is not that of a regular file"));
    }
    let sum = header
        .iter()
        .enumerate()
        .map(|(i, byte)| if (148..156).contains(&i) { u64::from(b' ') } else { u64::from(*byte) })
        .sum::<u64>();
    if octal(field(148..156)) != Some(sum) {
        return Err(("checksum", 148, "does not match the header"));
    }
    let size = octal(field(124..136)).ok_or(("size", 124, "is not an octal number"))?;
    let name = field(0..100);
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok((&name[..end], size))
}

/// An octal number with blanks in front and blanks or NULs behind.
fn octal(text: &[u8]) -> Option<u64> {
    let text = text.trim_ascii_start();
    let end = text.iter().position(|byte| *byte == 0 || *byte == b' ').unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    if digits.is_empty() || rest.iter().any(|byte| *byte != 0 && *byte != b' ') {
        return None;
    }
    digits.iter().try_fold(0u64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(edit: impl Fn(&mut TocEntry, &mut [u8])) -> Vec<u8> {
        let mut name = [0; 16];
        name[..10].copy_from_slice(b"image.blob");
        let mut entry = TocEntry {
            flags: le::U32::new(1),
            reserved: le::U32::ZERO,
            name,
            digest: [7; 32],
            compressed_offset: le::U64::new(0),
            compressed_size: le::U64::new(1000),
            uncompressed_size: le::U64::new(1000),
            reserved2: [0; 48],
        };
        let mut header = [0; 512];
        header[..13].copy_from_slice(TOC_NAME);
        header[124..136].copy_from_slice(b"00000000200\0");
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar  \0");
        edit(&mut entry, &mut header);
        header[148..156].copy_from_slice(b"        ");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(alloc::format!("{sum:06o}\0").as_bytes());
        let mut tail = entry.as_bytes().to_vec();
        tail.extend_from_slice(&header);
        tail
    }

    #[test]
    fn finds_sections() {
        let tail = table(|_, _| ());
        let found = parse(&tail, 5000).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].0, found[0].1.compressed_size.get()), (Section::Data, 1000));
    }

    #[test]
    fn refuses_what_does_not_add_up() {
        let field = |tail: &[u8], size| parse(tail, size).unwrap_err().field;
        assert_eq!(field(&table(|_, _| ()), 999), "compressed_offset");
        assert_eq!(field(&table(|entry, _| entry.name[0] = b'x'), 5000), "name");
        assert_eq!(field(&table(|entry, _| entry.flags = le::U32::new(4)), 5000), "flags");
        assert_eq!(field(&table(|_, header| header[134] = b'1'), 5000), "size");
        assert_eq!(field(&table(|_, header| header[130] = b'7'), 5000), "size");
        assert_eq!(field(&table(|_, header| header[0] = b'x'), 5000), "name");
        assert_eq!(field(&table(|_, header| header[257] = b'x'), 5000), "magic");
        let mut tail = table(|_, _| ());
        tail[200] ^= 1;
        assert_eq!(field(&tail, 5000), "checksum");
        for len in 0..tail.len() {
            parse(&tail[..len], 5000).unwrap_err();
        }
    }
}
