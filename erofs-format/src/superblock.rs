//! EROFS superblock, at file offset 1024 (kernel: `struct erofs_super_block`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

/// `EROFS_SUPER_MAGIC_V1`.
pub const MAGIC: u32 = 0xE0F5_E1E2;
/// Compatible feature bit 0: the superblock has a checksum. Clear in RAFS.
pub const FEATURE_COMPAT_SB_CHECKSUM: u32 = 0x1;
/// Compatible feature bit that marks a RAFS v6 image; the kernel ignores it.
pub const FEATURE_COMPAT_RAFS_V6: u32 = 0x4000_0000;
/// Incompatible feature: files made of chunks (kernel 5.15).
pub const FEATURE_INCOMPAT_CHUNKED_FILE: u32 = 0x4;
/// Incompatible feature: extra devices (kernel 5.16).
pub const FEATURE_INCOMPAT_DEVICE_TABLE: u32 = 0x8;
/// The only value of the incompatible features that a RAFS v6 loader takes.
pub const FEATURE_INCOMPAT: u32 = FEATURE_INCOMPAT_CHUNKED_FILE | FEATURE_INCOMPAT_DEVICE_TABLE;
/// `devt_slotoff` of RAFS, in units of 128 bytes: the slots follow the extended superblock.
pub const DEVT_SLOTOFF: u16 = 11;

/// The superblock as on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SuperBlock {
    /// [`MAGIC`].
    pub magic: le::U32,
    /// Checksum; 0 in RAFS.
    pub checksum: le::U32,
    /// Features that a reader may ignore.
    pub feature_compat: le::U32,
    /// log2 of the block size.
    pub blkszbits: u8,
    /// Extra superblock slots of 16 bytes; 0 in RAFS.
    pub sb_extslots: u8,
    /// nid of the root directory.
    pub root_nid: le::U16,

    /// Number of inodes, every hard link counted.
    pub inos: le::U64,
    /// Seconds since 1970; the mtime of compact inodes.
    pub build_time: le::U64,

    /// Nanoseconds of `build_time`.
    pub build_time_nsec: le::U32,
    /// Blocks, for statfs.
    pub blocks: le::U32,
    /// First block of the metadata area.
    pub meta_blkaddr: le::U32,
    /// First block of shared xattrs; 0 in RAFS.
    pub xattr_blkaddr: le::U32,

    /// UUID of the file system.
    pub uuid: [u8; 16],
    /// Volume name.
    pub volume_name: [u8; 16],

    /// Features that a reader must know; [`FEATURE_INCOMPAT`].
    pub feature_incompat: le::U32,
    /// Compression algorithms of plain EROFS; 0 in RAFS.
    pub u1: le::U16,
    /// Number of device slots.
    pub extra_devices: le::U16,
    /// Offset of the device slots in units of 128 bytes; [`DEVT_SLOTOFF`].
    pub devt_slotoff: le::U16,
    /// log2 of directory block size minus that of the block size; 0.
    pub dirblkbits: u8,
    /// Meaning for newer kernels only; 0.
    pub reserved: [u8; 37],
}

assert_layout!(SuperBlock, 128, {
    magic: 0, checksum: 4, feature_compat: 8, blkszbits: 12, sb_extslots: 13, root_nid: 14,
    inos: 16, build_time: 24, build_time_nsec: 32, blocks: 36, meta_blkaddr: 40, xattr_blkaddr: 44,
    uuid: 48, volume_name: 64, feature_incompat: 80, u1: 84, extra_devices: 86, devt_slotoff: 88,
    dirblkbits: 90, reserved: 91,
});
