//! CI entries of 16 bytes.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

use super::{CiEntry, CiFlags};
use crate::layout::{MAX_BLOB_SIZE, MAX_CHUNK_SIZE, MAX_DEVICE_SIZE};

/// Bytes of a V1 entry.
pub const V1_SIZE: u64 = 16;

/// A V1 entry as on disk: two words, each an offset and a size minus 1 in two parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CiV1 {
    /// Bits 12 to 43: device offset in place; 44 to 63 and 8 to 11: low 20 and high 4 bits of the size minus 1.
    pub uncompressed: le::U64,
    /// Bits 0 to 39: blob offset; 44 to 63 and 40 to 43: low 20 and high 4 bits of the stored size minus 1.
    pub compressed: le::U64,
}

assert_layout!(CiV1, 16, { uncompressed: 0, compressed: 8 });

const DEVICE_OFFSET: u64 = 0xfff_ffff_f000;
const BLOB_OFFSET: u64 = 0xff_ffff_ffff;

impl CiV1 {
    /// The entry in these bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        Self { uncompressed: le::U64::from_bytes(words[0]), compressed: le::U64::from_bytes(words[1]) }
    }

    /// Entry for a chunk. `None` when a number does not fit, or the flags say what V1 cannot: it has room for
    /// "compressed" only, as sizes that differ.
    pub fn encode(entry: &CiEntry) -> Option<Self> {
        let compressed = entry.compressed_size != entry.uncompressed_size;
        let flags = if compressed { CiFlags::COMPRESSED } else { CiFlags::empty() };
        if entry.uncompressed_offset & !DEVICE_OFFSET != 0
            || entry.compressed_offset & !BLOB_OFFSET != 0
            || entry.flags != flags
            || entry.data != 0
        {
            return None;
        }
        let (ulow, uhigh) = split_size(entry.uncompressed_size)?;
        let (clow, chigh) = split_size(entry.compressed_size)?;
        Some(Self {
            uncompressed: le::U64::new(entry.uncompressed_offset | ulow << 44 | uhigh << 8),
            compressed: le::U64::new(entry.compressed_offset | clow << 44 | chigh << 40),
        })
    }

    /// The chunk of the entry; `None` when the reserved bits are not 0.
    pub fn decode(self) -> Option<CiEntry> {
        let (u, c) = (self.uncompressed.get(), self.compressed.get());
        if u & 0xff != 0 {
            return None;
        }
        let uncompressed_size = join_size(u >> 44, u >> 8 & 0xf);
        let compressed_size = join_size(c >> 44, c >> 40 & 0xf);
        let compressed = compressed_size != uncompressed_size;
        Some(CiEntry {
            uncompressed_offset: u & DEVICE_OFFSET,
            uncompressed_size,
            compressed_offset: c & BLOB_OFFSET,
            compressed_size,
            flags: if compressed { CiFlags::COMPRESSED } else { CiFlags::empty() },
            data: 0,
        })
    }
}

/// Low 20 and high 4 bits of `size` minus 1.
fn split_size(size: u32) -> Option<(u64, u64)> {
    let stored = u64::from(size.checked_sub(1).filter(|stored| *stored < MAX_CHUNK_SIZE)?);
    Some((stored & 0xf_ffff, stored >> 20))
}

fn join_size(low: u64, high: u64) -> u32 {
    u32::try_from((low | high << 20) + 1).expect("20 and 4 bits and 1 fit in 32 bits")
}

const _: () = assert!(DEVICE_OFFSET + 4096 == MAX_DEVICE_SIZE && BLOB_OFFSET + 1 == MAX_BLOB_SIZE);

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(uoff: u64, usize: u32, coff: u64, csize: u32) -> CiEntry {
        CiEntry {
            uncompressed_offset: uoff,
            uncompressed_size: usize,
            compressed_offset: coff,
            compressed_size: csize,
            flags: if usize == csize { CiFlags::empty() } else { CiFlags::COMPRESSED },
            data: 0,
        }
    }

    #[test]
    fn literal_bytes() {
        // The two chunks of the documented test vector.
        for (entry, hex) in [
            (entry(0, 6, 0, 6), "00000000005000000000000000500000"),
            (entry(4096, 5000, 6, 5000), "00100000007038010600000000703801"),
        ] {
            let raw = CiV1::encode(&entry).unwrap();
            assert_eq!(hex::encode(raw.as_bytes()), hex);
            assert_eq!(raw.decode(), Some(entry));
        }
    }

    #[test]
    fn edges() {
        let max = entry(MAX_DEVICE_SIZE - 4096, 1 << 24, MAX_BLOB_SIZE - 1, 1 << 24);
        assert_eq!(CiV1::encode(&max).unwrap().decode(), Some(max));
        for bad in [
            entry(1, 1, 0, 1),
            entry(MAX_DEVICE_SIZE, 1, 0, 1),
            entry(0, 0, 0, 1),
            entry(0, 1, 0, 0),
            entry(0, (1 << 24) + 1, 0, 1),
            entry(0, 1, MAX_BLOB_SIZE, 1),
            CiEntry { flags: CiFlags::COMPRESSED, ..entry(0, 1, 0, 1) },
            CiEntry { data: 1, ..entry(0, 1, 0, 1) },
        ] {
            assert_eq!(CiV1::encode(&bad), None, "{bad:?}");
        }
        let mut raw = CiV1::encode(&entry(0, 6, 0, 6)).unwrap();
        raw.uncompressed = le::U64::new(raw.uncompressed.get() | 1);
        assert_eq!(raw.decode(), None);
    }
}
