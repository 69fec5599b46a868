//! Images that break a rule: refused with the rule's field, and never with a panic.

mod common;

use common::{exercise, synthetic, vector};
use erofs_format::{FormatError, Image, dump::dump};
use proptest::prelude::*;

/// The first error that reading all of an image gives.
fn first_error(bytes: &[u8]) -> Option<FormatError> {
    let image = match Image::parse(bytes) {
        Ok(image) => image,
        Err(error) => return Some(error),
    };
    for blob in 0..image.blobs().len() {
        if let Err(error) = image.chunk_map(blob) {
            return Some(error);
        }
    }
    image.check().err()
}

/// Places `bytes` at `at` in the vector and names the structure and field that must be refused.
#[test]
fn each_rule_is_enforced() {
    let cases: &[(usize, &[u8], &str, &str)] = &[
        // Superblock.
        (1024, &[0], "superblock", "magic"),
        (1028, &[1], "superblock", "checksum"),
        (1032, &[1], "superblock", "feature_compat"),
        (1035, &[0], "superblock", "feature_compat"),
        (1036, &[9], "superblock", "blkszbits"),
        (1037, &[1], "superblock", "sb_extslots"),
        (1038, &[0x85], "superblock", "root_nid"),
        (1040, &[0], "superblock", "inos"),
        (1064, &[6], "superblock", "meta_blkaddr"),
        (1068, &[1], "superblock", "xattr_blkaddr"),
        (1103, b"x", "superblock", "volume_name"),
        (1104, &[0x0d], "superblock", "feature_incompat"),
        (1105, &[1], "superblock", "feature_incompat"),
        (1108, &[1], "superblock", "u1"),
        (1110, &[255], "superblock", "extra_devices"),
        (1112, &[12], "superblock", "devt_slotoff"),
        (1114, &[1], "superblock", "dirblkbits"),
        (1120, &[1], "superblock", "reserved"),
        (1151, &[1], "superblock", "reserved"),
        // Extended superblock.
        (1152, &[0x3b], "extended superblock", "flags"),
        (1152, &[0x38], "extended superblock", "flags"),
        (1152, &[0x3d], "extended superblock", "flags"),
        (1153, &[2], "extended superblock", "flags"),
        (1155, &[3], "extended superblock", "flags"),
        (1156, &[1], "extended superblock", "flags"),
        (1160, &[1], "extended superblock", "blob_table"),
        (1161, &[0], "extended superblock", "blob_table"),
        (1161, &[0x50], "extended superblock", "blob_table"),
        (1169, &[2], "extended superblock", "blob_table_size"),
        (1172, &[1], "extended superblock", "chunk_size"),
        (1174, &[0x00, 0x02], "extended superblock", "chunk_size"),
        (1177, &[0x50], "extended superblock", "chunk_table"),
        (1177, &[0x10], "extended superblock", "chunk_table"),
        (1184, &[161], "extended superblock", "chunk_table"),
        (1186, &[1], "extended superblock", "chunk_table"),
        (1191, &[0x10], "extended superblock", "chunk_table"),
        (1200, &[6], "extended superblock", "prefetch_table"),
        (1200, &[4], "extended superblock", "prefetch_table"),
        // Slot.
        (0x580, b"X", "device slot 0", "tag"),
        (0x580, b"/", "device slot 0", "tag"),
        (0x580, &[b'x'; 64], "device slot 0", "tag"),
        (0x5c0, &[0], "device slot 0", "blocks"),
        (0x5c4, &[1], "device slot 0", "mapped_blkaddr"),
        (0x5c4, &[0xff; 4], "device slot 0", "mapped_blkaddr"),
        (0x5c8, &[1], "device slot 0", "reserved"),
        // Blob table.
        (0x1000, b"0", "blob table entry 0", "blob_id"),
        (0x1040, &[1], "blob table entry 0", "blob_index"),
        (0x1044, &[1], "blob table entry 0", "chunk_size"),
        (0x104b, &[1], "blob table entry 0", "chunk_count"),
        (0x104c, &[4], "blob table entry 0", "compression_algo"),
        (0x1050, &[2], "blob table entry 0", "digest_algo"),
        (0x1054, &[0], "blob table entry 0", "features"),
        (0x1054, &[0x41], "blob table entry 0", "features"),
        (0x1054, &[0x81], "blob table entry 0", "features"),
        (0x1054, &[9], "blob table entry 0", "features"),
        (0x1055, &[0x20], "blob table entry 0", "features"),
        (0x1055, &[0x08], "blob table entry 0", "features"),
        (0x1057, &[0xc0], "blob table entry 0", "features"),
        (0x1059, &[0x22], "blob table entry 0", "ci_offset"),
        (0x105e, &[2], "blob table entry 0", "compressed_size"),
        (0x1061, &[0x40], "blob table entry 0", "uncompressed_size"),
        (0x1066, &[1], "blob table entry 0", "uncompressed_size"),
        (0x106c, &[4], "blob table entry 0", "ci_compressor"),
        (0x1077, &[0xff], "blob table entry 0", "ci_offset"),
        (0x1070, &[0xff; 8], "blob table entry 0", "ci_offset"),
        (0x1078, &[33], "blob table entry 0", "ci_compressed_size"),
        (0x1080, &[48], "blob table entry 0", "ci_uncompressed_size"),
        (0x10d8, &[2], "blob table entry 0", "cipher_algo"),
        // Inodes.
        (0x30a0, &[3], "inode 133", "i_format"),
        (0x30a0, &[1], "inode 133", "i_format"),
        (0x30a0, &[0x19], "inode 133", "i_format"),
        (0x3100, &[9], "inode 136", "i_format"),
        (0x3000, &[1], "directory 128", "nameoff"),
        (0x30a2, &[1], "inode 133", "i_xattr_icount"),
        (0x30a2, &[0xff, 0xff], "inode 133", "xattrs"),
        (0x30a5, &[0x31], "inode 133", "i_mode"),
        (0x30a6, &[1], "inode 133", "reserved"),
        (0x30af, &[0x80], "inode 133", "i_size"),
        (0x30ad, &[1], "chunk indexes of inode 133", "indexes"),
        (0x30b0, &[0x27], "inode 133", "i_u"),
        (0x30b0, &[0x68], "inode 133", "i_u"),
        (0x30b0, &[0x08], "inode 133", "i_u"),
        (0x30b2, &[1], "inode 133", "i_u"),
        (0x30cb, &[0xff], "inode 133", "i_mtime_nsec"),
        (0x3108, &[0x00, 0x10], "inode 136", "i_size"),
        (0x3108, &[0xff, 0x0f], "inode 136", "inline data"),
        (0x310a, &[1], "inode 136", "content"),
        (0x3188, &[0], "inode 140", "i_size"),
        (0x3189, &[0x10], "inode 140", "i_size"),
        // Xattrs.
        (0x30e0, &[1], "xattrs of inode 133", "name_filter"),
        (0x30e4, &[1], "xattrs of inode 133", "shared_count"),
        (0x30ec, &[5], "xattrs of inode 133", "size"),
        (0x30ec, &[0], "xattrs of inode 133", "name_len"),
        (0x30ed, &[2], "xattrs of inode 133", "name_len"),
        (0x30ed, &[5], "xattrs of inode 133", "name_index"),
        (0x30ed, &[0x81], "xattrs of inode 133", "name_index"),
        (0x30ee, &[4], "xattrs of inode 133", "size"),
        (0x30f0, &[0], "xattrs of inode 133", "name"),
        // Directories.
        (0x3040, &[0x81], "directory 128", "nid of '.'"),
        (0x304c, &[0x81], "directory 128", "nid of '..'"),
        (0x3148 - 8, &[0x80], "directory 136", "nid of '.'"),
        (0x314c, &[0x88], "directory 136", "nid of '..'"),
        (0x304a, &[1], "directory 128", "file_type"),
        (0x3048, &[0], "directory 128", "nameoff"),
        (0x3048, &[61], "directory 128", "nameoff"),
        (0x3048, &[72], "directory 128", "nameoff"),
        (0x3048, &[48], "directory 128", "name"),
        (0x3054, &[60], "directory 128", "name"),
        (0x3054, &[0xff], "directory 128", "nameoff"),
        (0x3060, &[62], "directory 128", "name"),
        (0x3062, &[0], "directory 128", "file_type"),
        (0x3062, &[9], "directory 128", "file_type"),
        (0x3062, &[2], "directory 128", "file_type"),
        (0x3058, &[0xff], "inode 255", "i_mode"),
        (0x307c, b"/", "directory 128", "name"),
        (0x307f, b"e", "directory 128", "name"),
        (0x307f, b"\0", "directory 128", "name"),
        (0x3080, b"l", "directory 128", "name"),
        (0x3080, b"a", "directory 128", "name"),
        (0x3080, b"\0", "directory 128", "name"),
        (0x3081, &[0], "directory 128", "name"),
        // d/b leads back to the root, and to its own directory.
        (0x3158, &[0x80, 0, 0, 0, 0, 0, 0, 0, 0x33, 0, 2], "directory 136", "nid"),
        (0x3158, &[0x88, 0, 0, 0, 0, 0, 0, 0, 0x33, 0, 2], "directory 136", "nid"),
        // Symlink.
        (0x31c1, &[0], "symlink 140", "target"),
        // Chunk indexes.
        (0x30fa, &[0], "chunk indexes of inode 133", "device"),
        (0x30fa, &[2], "chunk indexes of inode 133", "device"),
        (0x30f8, &[2], "chunk indexes of inode 133", "ci_index"),
        (0x30fb, &[1], "chunk indexes of inode 133", "ci_index"),
        (0x30f8, &[1], "chunk indexes of inode 133", "start_block"),
        (0x30fc, &[1], "chunk indexes of inode 133", "start_block"),
        (0x30fc, &[0xff; 4], "chunk indexes of inode 133", "start_block"),
        (0x30a8, &[7], "chunk indexes of inode 133", "size"),
        // Chunk table.
        (0x4020, &[1], "chunk table entry 0", "blob_index"),
        (0x4024, &[2], "chunk table entry 0", "flags"),
        (0x4024, &[0x20], "chunk table entry 0", "flags"),
        (0x4024, &[4], "chunk table entry 0", "flags"),
        (0x4024, &[8], "chunk table entry 0", "flags"),
        (0x4024, &[1], "chunk table entry 0", "flags"),
        (0x4028, &[0], "chunk table entry 0", "compressed_size"),
        (0x4028, &[5], "chunk table entry 0", "compressed_size"),
        (0x402b, &[1], "chunk table entry 0", "compressed_size"),
        (0x402c, &[0], "chunk table entry 0", "uncompressed_size"),
        (0x402f, &[1], "chunk table entry 0", "uncompressed_size"),
        (0x4030, &[1], "chunk table entry 1", "compressed_offset"),
        (0x4080, &[5], "chunk table entry 1", "compressed_offset"),
        (0x4080, &[7], "chunk table entry 1", "compressed_offset"),
        (0x4080, &[0xff; 8], "chunk table entry 1", "compressed_offset"),
        (0x4088, &[1], "chunk table entry 1", "uncompressed_offset"),
        (0x4089, &[0], "chunk table entry 1", "uncompressed_offset"),
        (0x4089, &[0x20], "chunk table entry 1", "uncompressed_offset"),
        (
            0x4088,
            &[0x00, 0xf0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            "chunk table entry 1",
            "uncompressed_offset",
        ),
        (0x4098, &[2], "chunk table entry 1", "index"),
        (0x4098, &[0], "chunk table entry", "index"),
    ];
    let good = vector::bootstrap();
    assert_eq!(first_error(&good), None);
    let mut wrong = Vec::new();
    for (at, bytes, thing, field) in cases {
        let mut image = good.clone();
        image[*at..at + bytes.len()].copy_from_slice(bytes);
        match first_error(&image) {
            None => wrong.push(format!("{bytes:x?} at {at:#x} passes")),
            Some(error) => {
                let text = error.to_string();
                if error.field != *field || !text.starts_with(thing) {
                    wrong.push(format!("{bytes:x?} at {at:#x}: {text}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn messages_read_well() {
    let mut image = vector::bootstrap();
    image[0x30fc] = 9;
    assert_eq!(
        first_error(&image).unwrap().to_string(),
        "chunk indexes of inode 133: start_block at offset 0x30fc: is 0x9000, but the chunk table (as bytes in the \
         device) says 0x0"
    );
    assert_eq!(
        Image::parse(&image[..16384]).unwrap_err().to_string(),
        "extended superblock: chunk_table at offset 0x498: ends at 0x40a0, past the end of the file at 0x4000"
    );
    assert_eq!(
        Image::parse(&[0; 4096]).unwrap_err().to_string(),
        "superblock: magic at offset 0x400: is 0x0, must be 0xe0f5e1e2; this is no EROFS image"
    );
}

#[test]
fn every_truncation_is_refused() {
    let image = vector::bootstrap();
    for len in 0..image.len() {
        Image::parse(&image[..len]).unwrap_err();
    }
    let image = synthetic::rich().build();
    for len in (0..image.len()).step_by(4096).chain((0..8192).step_by(13)) {
        Image::parse(&image[..len]).unwrap_err();
    }
}

/// The kernel takes an enlarged file by its first index; all other indexes must say the same.
#[test]
fn enlarged_files_must_be_contiguous() {
    let good = synthetic::rich().build();
    let image = Image::parse(&good).unwrap();
    let enlarged = image.lookup(b"usr/enlarged").unwrap().unwrap();
    let at = usize::try_from(enlarged.offset).unwrap();
    // The second chunk becomes the first one again, which the chunk table allows.
    let mut wrong = good.clone();
    wrong.copy_within(at + 64..at + 72, at + 72);
    let error = first_error(&wrong).unwrap();
    assert_eq!((error.field, error.offset), ("start_block", enlarged.offset + 72));
    // An enlarged chunk that does not hold the whole file.
    let mut wrong = good;
    wrong[at + 16] -= 1;
    assert_eq!(first_error(&wrong).unwrap().field, "i_u");
}

/// With fine indexes a file may have small chunks of its own, and parts of chunks; without them both are refused.
#[test]
fn fine_indexes_stay_inside_their_chunks() {
    let good = synthetic::rich().build();
    let mut bytes = good.clone();
    let image = Image::parse(&good).unwrap();
    let features = usize::try_from(image.extended().blob_table_offset.get()).unwrap() + 84;
    let inode = image.lookup(b"usr/enlarged").unwrap().unwrap();
    let at = usize::try_from(inode.offset).unwrap();
    let chunk = inode.chunks().nth(1).unwrap().unwrap();
    let blocks = image.chunk(chunk.blob, chunk.index).unwrap().uncompressed_size.get() / 4096;
    assert!(blocks > 1);
    // Two pieces of a block each: the first of two chunks.
    bytes[at + 8..at + 16].copy_from_slice(&8192_u64.to_le_bytes());
    bytes[at + 16..at + 20].copy_from_slice(&0x20_u32.to_le_bytes());
    assert_eq!(first_error(&bytes).unwrap().field, "i_u");

    bytes[features + 1] |= 0x10;
    assert!(first_error(&bytes).is_none());
    let fine = Image::parse(&bytes).unwrap();
    let pieces: Vec<_> = fine.inode(inode.nid).unwrap().chunks().map(Result::unwrap).collect();
    let second = pieces[1];
    assert_eq!((pieces.len(), second.file_offset, second.size), (2, 4096, 4096));
    assert_eq!((second.index, second.device_offset), (chunk.index, chunk.device_offset));

    let start = u32::try_from(chunk.device_offset / 4096).unwrap();
    for (block, good) in
        [(start + 1, true), (start + blocks - 1, true), (start + blocks, false), (start - 1, false)]
    {
        bytes[at + 76..at + 80].copy_from_slice(&block.to_le_bytes());
        let error = first_error(&bytes);
        assert_eq!(error.as_ref().map(|error| error.field), (!good).then_some("start_block"), "{block}");
    }
}

/// Directories that share blocks could make a walk read them once per directory.
#[test]
fn shared_directory_blocks_are_refused() {
    use synthetic::{Content, Tree};
    let mut tree = Tree::new(Vec::new());
    let large = tree.directory(0, "large");
    let file = tree.add(large, "!", Content::File(vec![], None));
    for i in 0..3000 {
        tree.link(large, format!("!{i:04}"), file);
    }
    for i in 0..300 {
        tree.directory(0, format!("small{i}"));
    }
    let mut bytes = tree.build();
    let image = Image::parse(&bytes).unwrap();
    image.check().unwrap();
    let large = image.lookup(b"large").unwrap().unwrap();
    let start = usize::try_from(large.offset).unwrap();
    let blocks: [u8; 4] = bytes[start + 16..start + 20].try_into().unwrap();
    let full = large.size - large.size % 4096;
    let small: Vec<_> = (0..300)
        .map(|i| image.lookup(format!("small{i}").as_bytes()).unwrap().unwrap())
        .map(|inode| (usize::try_from(inode.offset).unwrap(), inode.size))
        .collect();
    for (at, size) in small {
        bytes[at + 8..at + 16].copy_from_slice(&(full + size).to_le_bytes());
        bytes[at + 16..at + 20].copy_from_slice(&blocks);
    }
    let image = Image::parse(&bytes).unwrap();
    let names = image.walk().unwrap().filter_map(Result::ok).count();
    assert!(names < bytes.len() / 13, "{names} names");
    let error = image.check().unwrap_err();
    assert_eq!(error.field, "content");
    assert!(dump(&bytes).is_err());
}

fn dense(image: &[u8]) -> std::ops::Range<usize> {
    // The low byte of meta_blkaddr: the images of these tests have few blobs.
    let meta = usize::from(image[1064]) * 4096 + 4096;
    meta..image.len().min(meta + 8192)
}

/// Byte mutations that are the same in every run; run in number.
#[test]
fn mutations_do_no_harm() {
    let mut random = common::Random(0x5eed);
    for (image, rounds) in [(vector::bootstrap(), 20_000), (synthetic::rich().build(), 300)] {
        for _ in 0..rounds {
            exercise(&common::mutate(&image, dense(&image), &mut random));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Any bytes at any places of the vector, in its head and its inodes most.
    #[test]
    fn any_bytes_do_no_harm(
        changes in prop::collection::vec((prop_oneof![1024usize..1536, 4096usize..4352, 12288usize..13000, 16384usize..16544], any::<u8>()), 1..8),
        len in prop_oneof![Just(20480usize), 0usize..20480],
    ) {
        let mut image = vector::bootstrap();
        for (at, byte) in changes {
            image[at] = byte;
        }
        image.truncate(len);
        exercise(&image);
    }

    /// Whole fields replaced by edge values.
    #[test]
    fn edge_values_do_no_harm(
        changes in prop::collection::vec((prop_oneof![256usize..384, 1024usize..1088, 3072usize..3250, 4096usize..4136], prop_oneof![
            Just(0u32), Just(1), Just(u32::MAX), Just(0x7fff_ffff), Just(0x8000_0000), Just(4096), Just(20480), Just(5), any::<u32>(),
        ]), 1..4),
    ) {
        let mut image = vector::bootstrap();
        for (word, value) in changes {
            image[word * 4..word * 4 + 4].copy_from_slice(&value.to_le_bytes());
        }
        exercise(&image);
    }
}
