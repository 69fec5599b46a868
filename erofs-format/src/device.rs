//! Device slots, one per blob, at file offset 1408 (kernel: `struct erofs_deviceslot`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

/// Bytes of a slot.
pub const SLOT_SIZE: u64 = 128;

/// A device slot as on disk. Slot i is device id i + 1 and blob table entry i.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DeviceSlot {
    /// Blob id: 64 hex digits. In fscache mode the cookie key of the device.
    pub tag: [u8; 64],
    /// Length of the device in blocks.
    pub blocks: le::U32,
    /// First block of the device in the flat address space of all devices; 0 when it is not mapped there.
    pub mapped_blkaddr: le::U32,
    /// Meaning for newer kernels only; 0.
    pub reserved: [u8; 56],
}

assert_layout!(DeviceSlot, 128, { tag: 0, blocks: 64, mapped_blkaddr: 68, reserved: 72 });
