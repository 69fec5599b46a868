//! Walks a tar stream: extensions are gathered, the entry they belong to comes out, its data is read in order.

use std::io::{self, Read};

use crate::error::{EntryProblem, show};
use crate::tar::header::{checksum_is_right, number, unsigned};
use crate::tar::pax::Extensions;
use crate::tar::sparse::{self, Extent, PaxMap};
use crate::tree::RawXattr;

const BLOCK: usize = 512;
const BLOCK_U64: u64 = 512;
/// Longest GNU long name or link. A path that a kernel takes has at most 4095 bytes.
const GNU_NAME_MAX: u64 = 64 << 10;
/// Longest PAX extended header: some dozens of the largest xattrs.
const PAX_MAX: u64 = 4 << 20;

/// The kind of an entry, links with their target as the tar gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TarKind {
    Regular,
    HardLink,
    Symlink,
    Char,
    Block,
    Directory,
    Fifo,
}

/// One entry with everything its extensions said.
#[derive(Debug)]
pub(crate) struct TarEntry {
    /// Offset of its first header, extensions included.
    pub(crate) offset: u64,
    pub(crate) kind: TarKind,
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) permissions: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: Vec<RawXattr>,
    /// Size of the file.
    pub(crate) size: u64,
    /// Ranges with data; all other bytes are zero. Regular files that are not sparse have one.
    pub(crate) extents: Vec<Extent>,
}

/// Why a tar stream cannot be read on.
#[derive(Debug)]
pub(crate) enum TarFault {
    /// The stream below failed, or ended too early.
    Read { offset: u64, source: io::Error },
    /// The bytes are not a tar, or not one that we take.
    Bad { offset: u64, path: String, problem: EntryProblem },
}

/// A tar stream.
pub(crate) struct TarReader<R> {
    inner: R,
    /// Bytes of the stream read so far.
    offset: u64,
    /// Bytes of the current entry's data not read yet.
    data_left: u64,
    /// Bytes behind them up to the next header.
    padding: u64,
    ended: bool,
}

enum Fault {
    Read(io::Error),
    Problem(EntryProblem),
}

impl From<EntryProblem> for Fault {
    fn from(problem: EntryProblem) -> Self {
        Self::Problem(problem)
    }
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, offset: 0, data_left: 0, padding: 0, ended: false }
    }

    /// Bytes of the stream read so far.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Skips what is left of the current entry and reads the next one; `None` at the end of the archive.
    pub(crate) fn next(&mut self) -> Result<Option<TarEntry>, TarFault> {
        if self.ended {
            return Ok(None);
        }
        let here = self.offset;
        let fault = |reader: &Self, path: &[u8], start, fault| match fault {
            Fault::Read(source) => TarFault::Read { offset: reader.offset, source },
            Fault::Problem(problem) => TarFault::Bad { offset: start, path: show(path), problem },
        };
        self.skip_data().map_err(|e| fault(self, b"", here, e))?;
        let start = self.offset;
        let mut path = Vec::new();
        match self.read_entry(start, &mut path) {
            Ok(entry) => {
                self.ended = entry.is_none();
                Ok(entry)
            }
            Err(e) => Err(fault(self, &path, start, e)),
        }
    }

    /// Reads everything behind the end of the archive, so that digests over the stream see all of it.
    pub(crate) fn drain(&mut self) -> Result<(), TarFault> {
        let mut buffer = [0; 8192];
        loop {
            match self.inner.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => self.offset += u64::try_from(n).expect("at most the buffer's size"),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TarFault::Read { offset: self.offset, source }),
            }
        }
    }

    fn skip_data(&mut self) -> Result<(), Fault> {
        let mut left = std::mem::take(&mut self.data_left).saturating_add(std::mem::take(&mut self.padding));
        let mut buffer = [0; 8192];
        while left > 0 {
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            self.fill(&mut buffer[..len])?;
            left -= u64::try_from(len).expect("at most the buffer's size");
        }
        Ok(())
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), Fault> {
        self.inner.read_exact(buffer).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                Fault::Read(io::Error::new(e.kind(), "the tar ends in the middle of an entry"))
            }
            _ => Fault::Read(e),
        })?;
        self.offset += u64::try_from(buffer.len()).expect("usize has at most 64 bits");
        Ok(())
    }

    /// The next 512 bytes; `None` when the stream ends exactly here.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, Fault> {
        let mut block = [0; BLOCK];
        let mut have = 0;
        while have < BLOCK {
            match self.inner.read(&mut block[have..]) {
                Ok(0) if have == 0 => return Ok(None),
                Ok(0) => {
                    let short = io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the tar ends in the middle of a header",
                    );
                    return Err(Fault::Read(short));
                }
                Ok(n) => have += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Fault::Read(e)),
            }
        }
        self.offset += BLOCK_U64;
        Ok(Some(block))
    }

    fn read_entry(&mut self, start: u64, path: &mut Vec<u8>) -> Result<Option<TarEntry>, Fault> {
        let mut ext = Extensions::default();
        let mut long_path = None;
        let mut long_link = None;
        loop {
            let block = match self.block()? {
                Some(block) => block,
                None if ext.is_empty() && long_path.is_none() && long_link.is_none() => return Ok(None),
                None => {
                    return Err(
                        EntryProblem::Header("an extended header is the last in the tar".to_owned()).into()
                    );
                }
            };
            if block == [0; BLOCK] {
                return match self.block()? {
                    None => Ok(None),
                    Some(second) if second == [0; BLOCK] => Ok(None),
                    Some(_) => {
                        Err(EntryProblem::Header("one block of zeros, then more data".to_owned()).into())
                    }
                };
            }
            if !checksum_is_right(&block) {
                return Err(
                    EntryProblem::Header("the checksum is wrong; this is no tar header".to_owned()).into()
                );
            }
            let header = tar::Header::from_byte_slice(&block);
            let size = unsigned(&header.as_old().size, "size")?;
            match header.as_old().linkflag[0] {
                b'x' | b'X' => ext.add_pax(&self.extension(size, PAX_MAX, "PAX extended header")?)?,
                // Global headers carry comments in practice; unpackers of images ignore them, so this one does.
                b'g' => drop(self.extension(size, PAX_MAX, "PAX global header")?),
                b'L' => long_path = Some(c_string(self.extension(size, GNU_NAME_MAX, "GNU long name")?)),
                b'K' => long_link = Some(c_string(self.extension(size, GNU_NAME_MAX, "GNU long link")?)),
                _ => {
                    let given = ext.path.take().or(long_path.take());
                    *path = given.unwrap_or_else(|| header.path_bytes().into_owned());
                    let link = ext.link.take().or(long_link.take());
                    let link =
                        link.unwrap_or_else(|| header.link_name_bytes().unwrap_or_default().into_owned());
                    return self.entry(start, header, ext, path, link).map(Some);
                }
            }
        }
    }

    fn extension(&mut self, size: u64, limit: u64, what: &'static str) -> Result<Vec<u8>, Fault> {
        if size > limit {
            return Err(EntryProblem::TooLarge { what, found: size, limit }.into());
        }
        let mut bytes = vec![0; usize::try_from(size).expect("at most 4 MiB")];
        self.fill(&mut bytes)?;
        self.padding = size.next_multiple_of(BLOCK_U64) - size;
        self.skip_data()?;
        Ok(bytes)
    }

    fn entry(
        &mut self,
        offset: u64,
        header: &tar::Header,
        mut ext: Extensions,
        path: &mut Vec<u8>,
        link: Vec<u8>,
    ) -> Result<TarEntry, Fault> {
        let old = header.as_old();
        let flag = old.linkflag[0];
        let kind = match flag {
            // Before ustar, directories were files whose name ends in a slash.
            0 | b'0' if path.ends_with(b"/") => TarKind::Directory,
            0 | b'0' | b'7' | b'S' => TarKind::Regular,
            b'1' => TarKind::HardLink,
            b'2' => TarKind::Symlink,
            b'3' => TarKind::Char,
            b'4' => TarKind::Block,
            b'5' => TarKind::Directory,
            b'6' => TarKind::Fifo,
            other => return Err(EntryProblem::UnknownType(char::from(other)).into()),
        };
        // Only regular files have data, whatever the size field says: links carry the size of their target.
        let mut stored = match kind {
            TarKind::Regular => ext.size.map_or_else(|| unsigned(&old.size, "size"), Ok)?,
            _ => 0,
        };
        if stored > u64::try_from(i64::MAX).expect("positive") {
            return Err(EntryProblem::TooLarge {
                what: "the size",
                found: stored,
                limit: i64::MAX.unsigned_abs(),
            }
            .into());
        }
        let padding = stored.next_multiple_of(BLOCK_U64) - stored;
        let mut size = stored;
        let mut extents = vec![Extent { start: 0, len: stored }];
        if flag == b'S' {
            (size, extents) = self.gnu_sparse(header)?;
            sparse::check(&extents, size, stored)?;
        } else if kind == TarKind::Regular && ext.is_sparse() {
            let pax = ext.take_sparse();
            let (real, map) = pax.form()?;
            if let Some(name) = pax.name {
                *path = name;
            }
            size = real;
            extents = match map {
                PaxMap::Given(extents) => extents,
                PaxMap::InData => {
                    let before = self.offset;
                    let extents = self.map_in_data(stored)?;
                    stored -= self.offset - before;
                    extents
                }
            };
            sparse::check(&extents, size, stored)?;
        }
        let narrow = |what, value: u64| {
            u32::try_from(value).map_err(|_| EntryProblem::TooLarge {
                what,
                found: value,
                limit: u32::MAX.into(),
            })
        };
        let device = match (kind, header.as_ustar(), header.as_gnu()) {
            (TarKind::Char | TarKind::Block, Some(ustar), _) => (&ustar.dev_major, &ustar.dev_minor),
            (TarKind::Char | TarKind::Block, _, Some(gnu)) => (&gnu.dev_major, &gnu.dev_minor),
            (TarKind::Char | TarKind::Block, None, None) => {
                return Err(EntryProblem::Header(
                    "an old header has no place for a device number".to_owned(),
                )
                .into());
            }
            _ => (&[0; 8], &[0; 8]),
        };
        let mode = unsigned(&old.mode, "mode")? & 0o7777;
        let uid = ext.uid.map_or_else(|| unsigned(&old.uid, "uid"), Ok)?;
        let gid = ext.gid.map_or_else(|| unsigned(&old.gid, "gid"), Ok)?;
        self.data_left = stored;
        self.padding = padding;
        Ok(TarEntry {
            offset,
            kind,
            path: path.clone(),
            link,
            permissions: u16::try_from(mode).expect("masked to 12 bits"),
            uid: narrow("the uid", uid)?,
            gid: narrow("the gid", gid)?,
            mtime: ext.mtime.map_or_else(|| number(&old.mtime, "mtime").map(|s| (s, 0)), Ok)?,
            device: (
                narrow("the major number", unsigned(device.0, "major number")?)?,
                narrow("the minor number", unsigned(device.1, "minor number")?)?,
            ),
            xattrs: std::mem::take(&mut ext.xattrs),
            size,
            extents,
        })
    }

    /// The old GNU form: four ranges in the header, 21 more in each block that follows.
    fn gnu_sparse(&mut self, header: &tar::Header) -> Result<(u64, Vec<Extent>), Fault> {
        let gnu = header.as_gnu();
        let gnu = gnu.ok_or_else(|| EntryProblem::Sparse("the header is not in GNU format".to_owned()))?;
        let size = unsigned(&gnu.realsize, "real size")?;
        let mut extents = Vec::new();
        let mut add = |slots: &[tar::GnuSparseHeader]| -> Result<(), EntryProblem> {
            for slot in slots.iter().filter(|slot| slot.offset[0] != 0) {
                if extents.len() >= sparse::EXTENTS_MAX {
                    return Err(EntryProblem::Sparse(format!("more than {} ranges", sparse::EXTENTS_MAX)));
                }
                let start = unsigned(&slot.offset, "sparse offset")?;
                extents.push(Extent { start, len: unsigned(&slot.numbytes, "sparse length")? });
            }
            Ok(())
        };
        add(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut block = tar::GnuExtSparseHeader::new();
            self.fill(block.as_mut_bytes())?;
            add(&block.sparse)?;
            more = block.is_extended();
        }
        Ok((size, extents))
    }

    /// The map at the start of the data, padded to a block. Reads at most `stored` bytes.
    fn map_in_data(&mut self, stored: u64) -> Result<Vec<Extent>, Fault> {
        let mut left = stored;
        let mut block = [0; BLOCK];
        let mut at = BLOCK;
        sparse::read_map(|| {
            if at == BLOCK {
                if left < BLOCK_U64 {
                    return Err(EntryProblem::Sparse("the map does not end".to_owned()).into());
                }
                self.fill(&mut block)?;
                left -= BLOCK_U64;
                at = 0;
            }
            at += 1;
            Ok(block[at - 1])
        })
    }
}

/// The data of the current entry.
impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = usize::try_from(self.data_left).unwrap_or(usize::MAX).min(buffer.len());
        let n = self.inner.read(&mut buffer[..len])?;
        let read = u64::try_from(n).expect("at most the buffer's size");
        self.data_left -= read;
        self.offset += read;
        Ok(n)
    }
}

fn c_string(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|&byte| byte == 0) {
        bytes.truncate(end);
    }
    bytes
}
