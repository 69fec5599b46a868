//! CI entries of 24 bytes.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

use super::CiEntry;
use crate::layout::MAX_CHUNK_SIZE;

/// Bytes of a V2 entry.
pub const V2_SIZE: u64 = 24;

bitflags! {
    /// Flags of a compression info entry.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct CiFlags: u8 {
        /// Stored compressed.
        const COMPRESSED = 0x1;
        /// Part of a gzip stream.
        const ZRAN = 0x2;
        /// Part of a batch.
        const BATCH = 0x4;
        /// Stored encrypted.
        const ENCRYPTED = 0x8;
        /// The entry has a CRC-32C.
        const HAS_CRC32 = 0x10;
    }
}

/// A V2 entry as on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CiV2 {
    /// Bits 0 to 31: device offset in blocks; 32 to 55: size minus 1; 56 to 63: [`CiFlags`].
    pub uncompressed: le::U64,
    /// Bits 0 to 39: blob offset; 40 to 63: stored size.
    pub compressed: le::U64,
    /// CRC-32C, or context index << 32 | offset in the context's output.
    pub data: le::U64,
}

assert_layout!(CiV2, 24, { uncompressed: 0, compressed: 8, data: 16 });

impl CiV2 {
    /// The entry in these bytes.
    pub const fn from_bytes(bytes: [u8; 24]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        Self {
            uncompressed: le::U64::from_bytes(words[0]),
            compressed: le::U64::from_bytes(words[1]),
            data: le::U64::from_bytes(words[2]),
        }
    }

    /// Entry for a chunk; `None` when a number does not fit.
    pub fn encode(entry: &CiEntry) -> Option<Self> {
        let blocks = u32::try_from(entry.uncompressed_offset >> 12).ok()?;
        let size = entry.uncompressed_size.checked_sub(1).filter(|size| *size < MAX_CHUNK_SIZE)?;
        if entry.uncompressed_offset & 0xfff != 0
            || entry.compressed_offset >> 40 != 0
            || entry.compressed_size >> 24 != 0
        {
            return None;
        }
        Some(Self {
            uncompressed: le::U64::new(
                u64::from(blocks) | u64::from(size) << 32 | u64::from(entry.flags.bits()) << 56,
            ),
            compressed: le::U64::new(entry.compressed_offset | u64::from(entry.compressed_size) << 40),
            data: le::U64::new(entry.data),
        })
    }

    /// The chunk of the entry; `None` when it has unknown flags.
    pub fn decode(self) -> Option<CiEntry> {
        let (u, c) = (self.uncompressed.to_bytes(), self.compressed.to_bytes());
        Some(CiEntry {
            uncompressed_offset: u64::from(u32::from_le_bytes([u[0], u[1], u[2], u[3]])) << 12,
            uncompressed_size: u32::from_le_bytes([u[4], u[5], u[6], 0]) + 1,
            compressed_offset: self.compressed.get() & 0xff_ffff_ffff,
            compressed_size: u32::from_le_bytes([c[5], c[6], c[7], 0]),
            flags: CiFlags::from_bits(u[7])?,
            data: self.data.get(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literal_bytes() {
        let entry = CiEntry {
            uncompressed_offset: 0x1234_5678_0000,
            uncompressed_size: 0xabcdef,
            compressed_offset: 0x12_3456_789a,
            compressed_size: 0x654321,
            flags: CiFlags::COMPRESSED | CiFlags::HAS_CRC32,
            data: 0xdead_beef,
        };
        // 0x1234_5678_0000 needs 45 bits: one too many.
        assert_eq!(CiV2::encode(&entry), None);
        let entry = CiEntry { uncompressed_offset: 0xabc_def0_1000, ..entry };
        let raw = CiV2::encode(&entry).unwrap();
        assert_eq!(hex::encode(raw.as_bytes()), "01efcdabeecdab119a78563412214365efbeadde00000000");
        assert_eq!(raw.decode(), Some(entry));
        assert_eq!(CiV2::from_bytes(raw.as_bytes().try_into().unwrap()), raw);
    }

    #[test]
    fn edges() {
        let max = CiEntry {
            uncompressed_offset: 0xfff_ffff_f000,
            uncompressed_size: 1 << 24,
            compressed_offset: 0xff_ffff_ffff,
            compressed_size: 0xff_ffff,
            flags: CiFlags::all(),
            data: u64::MAX,
        };
        assert_eq!(CiV2::encode(&max).unwrap().decode(), Some(max));
        for bad in [
            CiEntry { uncompressed_offset: 1, ..max },
            CiEntry { uncompressed_size: 0, ..max },
            CiEntry { uncompressed_size: (1 << 24) + 1, ..max },
            CiEntry { compressed_offset: 1 << 40, ..max },
            CiEntry { compressed_size: 1 << 24, ..max },
        ] {
            assert_eq!(CiV2::encode(&bad), None, "{bad:?}");
        }
        let mut raw = CiV2::encode(&max).unwrap();
        raw.uncompressed = le::U64::new(raw.uncompressed.get() | 1 << 63);
        assert_eq!(raw.decode(), None);
    }
}
