//! What is encoded decodes to the same, and what decodes encodes to the same bytes.

use erofs_format::{
    chunk::{ChunkHeader, ChunkIndex},
    compression_info::{CiEntry, CiFlags, CiV1, CiV2},
    inode::{DeviceNumber, InodeFormat},
    xattr::{NameIndex, area_size, icount, split_name},
};
use proptest::prelude::*;
use zerocopy::IntoBytes;

fn entry() -> impl Strategy<Value = CiEntry> {
    let size = || prop_oneof![1u32..=1 << 24, Just(1), Just(1 << 24), Just(1 << 20)];
    (0u64..1 << 32, size(), 0u64..1 << 40, size(), 0u8..32, any::<u64>()).prop_map(
        |(blocks, uncompressed_size, compressed_offset, compressed_size, flags, data)| CiEntry {
            uncompressed_offset: blocks << 12,
            uncompressed_size,
            compressed_offset,
            compressed_size,
            flags: CiFlags::from_bits_truncate(flags),
            data,
        },
    )
}

proptest! {
    #[test]
    fn ci_v1_entries(entry in entry()) {
        let compressed = entry.uncompressed_size != entry.compressed_size;
        let flags = if compressed { CiFlags::COMPRESSED } else { CiFlags::empty() };
        let entry = CiEntry { flags, data: 0, ..entry };
        let raw = CiV1::encode(&entry).expect("numbers in range");
        prop_assert_eq!(raw.decode(), Some(entry));
    }

    #[test]
    fn ci_v1_bytes(bytes in any::<[u8; 16]>()) {
        let raw = CiV1::from_bytes(bytes);
        match raw.decode() {
            None => prop_assert_ne!(bytes[0], 0),
            Some(entry) => prop_assert_eq!(CiV1::encode(&entry).map(|raw| raw.as_bytes().to_vec()), Some(bytes.to_vec())),
        }
    }

    #[test]
    fn ci_v2_entries(entry in entry()) {
        let entry = CiEntry { compressed_size: entry.compressed_size % (1 << 24), ..entry };
        let raw = CiV2::encode(&entry).expect("numbers in range");
        prop_assert_eq!(raw.decode(), Some(entry));
    }

    #[test]
    fn ci_v2_bytes(bytes in any::<[u8; 24]>()) {
        let raw = CiV2::from_bytes(bytes);
        match raw.decode() {
            None => prop_assert!(bytes[7] > 0x1f),
            Some(entry) => prop_assert_eq!(CiV2::encode(&entry).map(|raw| raw.as_bytes().to_vec()), Some(bytes.to_vec())),
        }
    }

    #[test]
    fn chunk_indexes(blob in 0usize..254, ci in 0u32..1 << 24, block in any::<u32>()) {
        let index = ChunkIndex::new(blob, ci, block).expect("numbers in range");
        prop_assert_eq!(usize::from(index.device_id()), blob + 1);
        prop_assert_eq!((index.ci_index(), index.start_block.get()), (ci, block));
    }

    #[test]
    fn chunk_headers(value in any::<u32>()) {
        if let Some(header) = ChunkHeader::decode(value) {
            prop_assert_eq!(header.encode(), value);
        } else {
            prop_assert!(!(0x20..0x40).contains(&value));
        }
    }

    #[test]
    fn device_numbers(major in 0u32..1 << 12, minor in 0u32..1 << 20) {
        let number = DeviceNumber { major, minor };
        prop_assert_eq!(number.encode().map(DeviceNumber::decode), Some(number));
    }

    #[test]
    fn encoded_device_numbers(value in any::<u32>()) {
        prop_assert_eq!(DeviceNumber::decode(value).encode(), Some(value));
    }

    #[test]
    fn inode_formats(value in any::<u16>()) {
        if let Some(format) = InodeFormat::decode(value) {
            prop_assert_eq!(format.encode(), value);
        } else {
            prop_assert!(![0, 1, 4, 5, 8, 9].contains(&value));
        }
    }

    #[test]
    fn xattr_names(index in prop::sample::select(NameIndex::ALL.to_vec()), suffix in prop::collection::vec(1u8.., 1..=255)) {
        let suffix = if index.is_whole_name() { Vec::new() } else { suffix };
        let name = [index.prefix(), &suffix].concat();
        prop_assert_eq!(split_name(&name), Some((index, &suffix[..])));
    }

    #[test]
    fn xattr_counts(count in any::<u16>()) {
        prop_assert_eq!(icount(area_size(count)), (count != 1).then_some(count));
    }
}
