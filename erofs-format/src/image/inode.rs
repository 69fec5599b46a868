//! One inode: its fields, and where its content lies.

use super::Core;
use crate::{
    bytes,
    chunk::{self, ChunkHeader, ChunkIndex},
    error::{Problem, Result, Thing},
    inode::{
        COMPACT_SIZE, DataLayout, DeviceNumber, EXTENDED_SIZE, InodeCompact, InodeExtended, InodeFormat,
        SLOT_SIZE,
    },
    kind::FileKind,
    layout::{BLOCK, MAX_SYMLINK, chunk_count},
    xattr,
};

/// An inode whose fields and whose content's place have been checked; its content has not.
#[derive(Debug, Clone, Copy)]
pub struct Inode<'a> {
    /// Number that directory entries refer to it by; the inode number that the kernel shows.
    pub nid: u64,
    /// File offset of the inode.
    pub offset: u64,
    /// Kind.
    pub kind: FileKind,
    /// Kind and permissions, a full `st_mode`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of content, not above `i64::MAX`.
    pub size: u64,
    /// Modification time, seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds of the modification time, below 10^9.
    pub mtime_nsec: u32,
    /// Directory: 2 + subdirectories; else the number of names. As recorded, not counted.
    pub nlink: u32,
    /// Device number of a character or block device.
    pub rdev: Option<DeviceNumber>,
    /// Number in build order; not unique in merged images.
    pub ino: u32,
    /// Form and data layout.
    pub format: InodeFormat,
    pub(super) core: Core<'a>,
    /// The xattr area, header included; empty without xattrs.
    pub(crate) xattr_area: &'a [u8],
    pub(crate) data: Data<'a>,
}

/// Content of an inode, or where it is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Data<'a> {
    /// Devices, fifos, sockets, empty flat content.
    None,
    /// Directory or symlink.
    Flat {
        /// What lies in whole blocks, and where.
        blocks: &'a [u8],
        blocks_at: u64,
        /// What lies behind the inode, and where.
        tail: &'a [u8],
        tail_at: u64,
    },
    /// Regular file; `unit` are the bytes of the file that each index stands for.
    Chunks { header: ChunkHeader, unit: u32, indexes: &'a [ChunkIndex], at: u64 },
}

/// The fields that both forms have.
struct Fields {
    xattr_icount: u16,
    mode: u16,
    size: u64,
    u: u32,
    ino: u32,
    uid: u32,
    gid: u32,
    mtime: u64,
    mtime_nsec: u32,
    nlink: u32,
    /// Must be 0: newer kernels give it meaning.
    reserved: u64,
    reserved_at: u64,
    size_at: u64,
    u_at: u64,
}

impl<'a> Inode<'a> {
    pub(super) fn parse(core: Core<'a>, nid: u64) -> Result<Self> {
        let thing = Thing::Inode(nid);
        let offset = nid
            .checked_mul(SLOT_SIZE)
            .and_then(|offset| offset.checked_add(core.meta))
            .ok_or_else(|| thing.error("nid", 0, Problem::Overflow))?;
        let raw_format =
            bytes::read::<zerocopy::little_endian::U16>(core.bytes, thing, "i_format", offset)?.get();
        let Some(format) = InodeFormat::decode(raw_format) else {
            return Err(thing.value("i_format", offset, raw_format, "0, 1, 4, 5, 8 or 9"));
        };
        let fields = Fields::read(core, thing, offset, format)?;
        let fail =
            |field, at: u64, found: u64, expected| Err(thing.value(field, offset + at, found, expected));
        let Some(kind) = FileKind::from_mode(fields.mode) else {
            return fail("i_mode", 4, fields.mode.into(), "a mode with a file type");
        };
        if fields.reserved != 0 {
            return fail("reserved", fields.reserved_at, fields.reserved, "0");
        }
        if i64::try_from(fields.size).is_err() {
            return fail("i_size", fields.size_at, fields.size, "at most 2^63 - 1");
        }
        if fields.mtime_nsec >= 1_000_000_000 {
            return fail("i_mtime_nsec", 40, fields.mtime_nsec.into(), "below 10^9");
        }
        if fields.xattr_icount == 1 {
            return fail("i_xattr_icount", 2, 1, "0 or at least 2");
        }
        let xattr_at = offset + format.inode_size();
        let xattr_area =
            bytes::range(core.bytes, thing, "xattrs", xattr_at, xattr::area_size(fields.xattr_icount))?;
        let content = Content {
            core,
            thing,
            offset,
            head_end: xattr_at + bytes::len(xattr_area),
            format,
            fields: &fields,
        };
        let data = content.locate(kind)?;
        Ok(Self {
            nid,
            offset,
            kind,
            mode: fields.mode,
            uid: fields.uid,
            gid: fields.gid,
            size: fields.size,
            mtime: i64::from_le_bytes(fields.mtime.to_le_bytes()),
            mtime_nsec: fields.mtime_nsec,
            nlink: fields.nlink,
            rdev: kind.is_device().then(|| DeviceNumber::decode(fields.u)),
            ino: fields.ino,
            format,
            core,
            xattr_area,
            data,
        })
    }

    /// Target of a symlink: 1 to 4095 bytes without NUL. `None` for other kinds.
    pub fn target(&self) -> Result<Option<&'a [u8]>> {
        if self.kind != FileKind::Symlink {
            return Ok(None);
        }
        // At most 4095 bytes, so all of it is on one side.
        let (target, at) = match self.data {
            Data::Flat { tail, tail_at, .. } if !tail.is_empty() => (tail, tail_at),
            Data::Flat { blocks, blocks_at, .. } => (blocks, blocks_at),
            _ => (&[][..], self.offset),
        };
        if target.contains(&0) {
            return Err(Thing::Symlink(self.nid).error("target", at, Problem::Text("contains a NUL")));
        }
        Ok(Some(target))
    }

    /// Bytes of the bootstrap that belong to this inode alone: itself, xattrs, and what its layout places.
    pub fn footprint(&self) -> u64 {
        let data = match self.data {
            Data::None => 0,
            Data::Flat { blocks, tail, .. } => bytes::len(blocks) + bytes::len(tail),
            Data::Chunks { indexes, .. } => bytes::len(indexes) * chunk::INDEX_SIZE,
        };
        self.format.inode_size() + bytes::len(self.xattr_area) + data
    }
}

impl Fields {
    fn read(core: Core<'_>, thing: Thing, offset: u64, format: InodeFormat) -> Result<Self> {
        if format.extended {
            let raw = bytes::read::<InodeExtended>(core.bytes, thing, "inode", offset)?;
            Ok(Self {
                xattr_icount: raw.i_xattr_icount.get(),
                mode: raw.i_mode.get(),
                size: raw.i_size.get(),
                u: raw.i_u.get(),
                ino: raw.i_ino.get(),
                uid: raw.i_uid.get(),
                gid: raw.i_gid.get(),
                mtime: raw.i_mtime.get(),
                mtime_nsec: raw.i_mtime_nsec.get(),
                nlink: raw.i_nlink.get(),
                reserved: raw.reserved.get().into(),
                reserved_at: 6,
                size_at: 8,
                u_at: 16,
            })
        } else {
            let raw = bytes::read::<InodeCompact>(core.bytes, thing, "inode", offset)?;
            Ok(Self {
                xattr_icount: raw.i_xattr_icount.get(),
                mode: raw.i_mode.get(),
                size: raw.i_size.get().into(),
                u: raw.i_u.get(),
                ino: raw.i_ino.get(),
                uid: raw.i_uid.get().into(),
                gid: raw.i_gid.get().into(),
                mtime: core.build_time,
                mtime_nsec: core.build_time_nsec,
                nlink: raw.i_nlink.get().into(),
                reserved: raw.reserved.get().into(),
                reserved_at: 12,
                size_at: 8,
                u_at: 16,
            })
        }
    }
}

const _: () = assert!(COMPACT_SIZE == SLOT_SIZE && EXTENDED_SIZE == 2 * SLOT_SIZE);

/// Finds an inode's content.
struct Content<'a, 'f> {
    core: Core<'a>,
    thing: Thing,
    offset: u64,
    /// File offset behind inode and xattrs.
    head_end: u64,
    format: InodeFormat,
    fields: &'f Fields,
}

impl<'a> Content<'a, '_> {
    fn locate(&self, kind: FileKind) -> Result<Data<'a>> {
        let layout = self.format.layout;
        let (allowed, expected) = match kind {
            FileKind::Regular => {
                (layout == DataLayout::ChunkBased, "chunk-based (8 or 9) for a regular file")
            }
            FileKind::Directory | FileKind::Symlink => {
                (layout != DataLayout::ChunkBased, "flat (0, 1, 4 or 5) for a directory or symlink")
            }
            _ => (layout == DataLayout::FlatPlain, "flat (0 or 1) for a special file"),
        };
        if !allowed {
            return Err(self.thing.value("i_format", self.offset, self.format.encode(), expected));
        }
        match kind {
            FileKind::Regular => self.chunks(),
            FileKind::Directory => self.flat(),
            FileKind::Symlink => {
                if self.fields.size == 0 || self.fields.size > MAX_SYMLINK {
                    return self.bad_size("1 to 4095 for a symlink");
                }
                self.flat()
            }
            _ if self.fields.size != 0 => self.bad_size("0 for a special file"),
            _ => Ok(Data::None),
        }
    }

    fn bad_size<T>(&self, expected: &'static str) -> Result<T> {
        Err(self.thing.value("i_size", self.offset + self.fields.size_at, self.fields.size, expected))
    }

    fn flat(&self) -> Result<Data<'a>> {
        let size = self.fields.size;
        let tail = match self.format.layout {
            DataLayout::FlatInline => size % BLOCK,
            _ => 0,
        };
        if self.format.layout == DataLayout::FlatInline {
            if tail == 0 {
                return self.bad_size("no multiple of 4096 with inline data");
            }
            if !crate::inode::inline_fits(self.offset, self.head_end - self.offset, tail) {
                let text = "crosses a block boundary, where the kernel cannot read it";
                return Err(self.thing.error("inline data", self.head_end, Problem::Text(text)));
            }
        }
        let full = size - tail;
        let blocks_at = if full == 0 { 0 } else { u64::from(self.fields.u) * BLOCK };
        Ok(Data::Flat {
            blocks: bytes::range(self.core.bytes, self.thing, "content", blocks_at, full)?,
            blocks_at,
            tail: bytes::range(self.core.bytes, self.thing, "inline data", self.head_end, tail)?,
            tail_at: self.head_end,
        })
    }

    fn chunks(&self) -> Result<Data<'a>> {
        let u_at = self.offset + self.fields.u_at;
        let Some(header) = ChunkHeader::decode(self.fields.u) else {
            let expected = "0x20 to 0x3f (8-byte chunk indexes)";
            return Err(self.thing.value("i_u", u_at, self.fields.u, expected));
        };
        let kernel = header.chunk_size();
        let ours = u64::from(self.core.chunk_size);
        // A larger chunk is allowed where it holds the whole file, because then the kernel uses the first index only.
        if (kernel < ours && !self.core.fine) || (kernel > ours && self.fields.size > kernel) {
            let expected = "the image's chunk size, or a larger one that holds the whole file";
            return Err(self.thing.value("i_u", u_at, self.fields.u, expected));
        }
        let unit =
            u32::try_from(kernel).map_or(self.core.chunk_size, |kernel| kernel.min(self.core.chunk_size));
        let count = chunk_count(self.fields.size, unit);
        let thing = Thing::ChunkIndexes(match self.thing {
            Thing::Inode(nid) => nid,
            _ => 0,
        });
        let at = chunk::indexes_offset(self.head_end)
            .ok_or_else(|| thing.error("indexes", self.head_end, Problem::Overflow))?;
        let at = if count == 0 { self.head_end } else { at };
        let indexes = bytes::slice(self.core.bytes, thing, "indexes", at, count)?;
        Ok(Data::Chunks { header, unit, indexes, at })
    }
}
