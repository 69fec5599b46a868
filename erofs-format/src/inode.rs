//! Inodes as on disk: extended and compact form, format field, device numbers
//! (kernel: `struct erofs_inode_extended`, `struct erofs_inode_compact`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

use crate::layout::BLOCK;

/// Inodes start at multiples of this many bytes in the metadata area; a nid counts them.
pub const SLOT_SIZE: u64 = 32;
/// Bytes of a compact inode.
pub const COMPACT_SIZE: u64 = 32;
/// Bytes of an extended inode.
pub const EXTENDED_SIZE: u64 = 64;

/// Where an inode's data lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataLayout {
    /// In whole blocks of the bootstrap.
    FlatPlain,
    /// Full blocks in the bootstrap, the rest directly behind inode and xattrs.
    FlatInline,
    /// In chunks on devices; the chunk indexes follow inode and xattrs.
    ChunkBased,
}

impl DataLayout {
    /// Bits 1 to 3 of the format field.
    pub const fn code(self) -> u16 {
        match self {
            Self::FlatPlain => 0,
            Self::FlatInline => 2,
            Self::ChunkBased => 4,
        }
    }

    /// Layout for a directory or symlink of `size` bytes whose inode and xattrs take `head` bytes.
    ///
    /// Inline when the tail is not empty and fits in one block together with `head`; the writer must then place the
    /// inode so that head and tail do not cross a block boundary ([`inline_fits`]).
    pub const fn for_content(head: u64, size: u64) -> Self {
        let tail = size % BLOCK;
        if tail != 0 && head + tail <= BLOCK { Self::FlatInline } else { Self::FlatPlain }
    }
}

/// Whether the inline tail of an inode at file offset `offset` lies in one block, as the kernel requires.
/// `head` is the size of inode and xattrs, `tail` that of the inline data.
pub const fn inline_fits(offset: u64, head: u64, tail: u64) -> bool {
    match offset.checked_add(head) {
        Some(start) => tail <= BLOCK && start % BLOCK + tail <= BLOCK,
        None => false,
    }
}

/// The format field (`i_format`) of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InodeFormat {
    /// 64-byte form if set, else 32-byte form.
    pub extended: bool,
    /// Where the data lies.
    pub layout: DataLayout,
}

impl InodeFormat {
    /// The extended form with this layout.
    pub const fn extended(layout: DataLayout) -> Self {
        Self { extended: true, layout }
    }

    /// The field's value.
    pub const fn encode(self) -> u16 {
        self.extended as u16 | (self.layout.code() << 1)
    }

    /// The meaning of the field's value; `None` for layouts and bits that RAFS does not use.
    pub const fn decode(value: u16) -> Option<Self> {
        let layout = match value >> 1 {
            0 => DataLayout::FlatPlain,
            2 => DataLayout::FlatInline,
            4 => DataLayout::ChunkBased,
            _ => return None,
        };
        Some(Self { extended: value & 1 == 1, layout })
    }

    /// Bytes of the inode.
    pub const fn inode_size(self) -> u64 {
        if self.extended { EXTENDED_SIZE } else { COMPACT_SIZE }
    }
}

/// A device number as `i_u` holds it (the kernel's `new_encode_dev`). Major has 12 bits, minor 20.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeviceNumber {
    /// Major number, below 2^12.
    pub major: u32,
    /// Minor number, below 2^20.
    pub minor: u32,
}

impl DeviceNumber {
    /// The value of `i_u`; `None` when a number is too large for the kernel's 32-bit form.
    pub const fn encode(self) -> Option<u32> {
        if self.major >= 1 << 12 || self.minor >= 1 << 20 {
            return None;
        }
        Some((self.minor & 0xff) | self.major << 8 | (self.minor & !0xff) << 12)
    }

    /// The numbers in `i_u`.
    pub const fn decode(value: u32) -> Self {
        Self { major: (value >> 8) & 0xfff, minor: (value & 0xff) | (value >> 12) & 0xfff00 }
    }
}

/// The extended inode as on disk, the form that builders write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InodeExtended {
    /// [`InodeFormat`].
    pub i_format: le::U16,
    /// Size code of the xattr area, see [`xattr::icount`](crate::xattr::icount).
    pub i_xattr_icount: le::U16,
    /// Kind and permissions, a full `st_mode`.
    pub i_mode: le::U16,
    /// 0.
    pub reserved: le::U16,
    /// Bytes of content.
    pub i_size: le::U64,

    /// Flat data: start block; devices: [`DeviceNumber`]; chunks: [`ChunkHeader`](crate::chunk::ChunkHeader).
    pub i_u: le::U32,
    /// Number in build order; hard links share it. Not the inode number that the kernel shows.
    pub i_ino: le::U32,
    /// Owner.
    pub i_uid: le::U32,
    /// Group.
    pub i_gid: le::U32,

    /// Seconds since 1970, signed in meaning.
    pub i_mtime: le::U64,
    /// Nanoseconds, below 10^9.
    pub i_mtime_nsec: le::U32,
    /// Directory: 2 + subdirectories; else the number of names.
    pub i_nlink: le::U32,

    /// 0.
    pub reserved2: [u8; 16],
}

assert_layout!(InodeExtended, 64, {
    i_format: 0, i_xattr_icount: 2, i_mode: 4, reserved: 6, i_size: 8, i_u: 16, i_ino: 20, i_uid: 24, i_gid: 28,
    i_mtime: 32, i_mtime_nsec: 40, i_nlink: 44, reserved2: 48,
});

/// The compact inode as on disk, found in old images. Its time is the superblock's `build_time`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InodeCompact {
    /// [`InodeFormat`].
    pub i_format: le::U16,
    /// Size code of the xattr area.
    pub i_xattr_icount: le::U16,
    /// Kind and permissions.
    pub i_mode: le::U16,
    /// Number of names.
    pub i_nlink: le::U16,
    /// Bytes of content.
    pub i_size: le::U32,
    /// 0.
    pub reserved: le::U32,

    /// As in [`InodeExtended`].
    pub i_u: le::U32,
    /// As in [`InodeExtended`].
    pub i_ino: le::U32,
    /// Owner.
    pub i_uid: le::U16,
    /// Group.
    pub i_gid: le::U16,
    /// 0.
    pub reserved2: le::U32,
}

assert_layout!(InodeCompact, 32, {
    i_format: 0, i_xattr_icount: 2, i_mode: 4, i_nlink: 6, i_size: 8, reserved: 12, i_u: 16, i_ino: 20, i_uid: 24,
    i_gid: 26, reserved2: 28,
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats() {
        for (value, extended, layout) in [
            (0, false, DataLayout::FlatPlain),
            (1, true, DataLayout::FlatPlain),
            (4, false, DataLayout::FlatInline),
            (5, true, DataLayout::FlatInline),
            (8, false, DataLayout::ChunkBased),
            (9, true, DataLayout::ChunkBased),
        ] {
            let format = InodeFormat { extended, layout };
            assert_eq!(format.encode(), value);
            assert_eq!(InodeFormat::decode(value), Some(format));
        }
        for value in (0..=u16::MAX).filter(|v| ![0, 1, 4, 5, 8, 9].contains(v)) {
            assert_eq!(InodeFormat::decode(value), None, "{value}");
        }
    }

    #[test]
    fn device_numbers() {
        // mknod c 1 3 (/dev/null), and a minor that needs the high bits.
        assert_eq!(DeviceNumber { major: 1, minor: 3 }.encode(), Some(0x103));
        assert_eq!(DeviceNumber { major: 0xabc, minor: 0xfedcb }.encode(), Some(0xfeda_bccb));
        assert_eq!(DeviceNumber::decode(0xfeda_bccb), DeviceNumber { major: 0xabc, minor: 0xfedcb });
        assert_eq!(DeviceNumber { major: 1 << 12, minor: 0 }.encode(), None);
        assert_eq!(DeviceNumber { major: 0, minor: 1 << 20 }.encode(), None);
    }

    #[test]
    fn content_layout_at_the_edges() {
        assert_eq!(DataLayout::for_content(64, 0), DataLayout::FlatPlain);
        assert_eq!(DataLayout::for_content(64, 4096 - 64), DataLayout::FlatInline);
        assert_eq!(DataLayout::for_content(64, 4096 - 63), DataLayout::FlatPlain);
        assert_eq!(DataLayout::for_content(64, 4096), DataLayout::FlatPlain);
        assert_eq!(DataLayout::for_content(64, 4097), DataLayout::FlatInline);
        assert!(inline_fits(8192, 64, 4032));
        assert!(!inline_fits(8192 + 32, 64, 4032));
        // A head that ends on the boundary leaves the whole next block for the tail.
        assert!(inline_fits(8192 - 64, 64, 4096));
        assert!(!inline_fits(u64::MAX, 64, 1));
    }
}
