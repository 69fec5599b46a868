//! The documented test vector: built from its rows, read, checked, dumped.

mod common;

use common::vector;
use erofs_format::{
    BlobFeatures, Compressor, DigestAlgo, FileKind, Image,
    blob_table::BlobEntry,
    compression_info::{CiEntry, CiFlags, CiHeader, CiV1},
    dump::{What, dump},
    xattr::NameIndex,
};
use sha2::{Digest, Sha256};
use zerocopy::{FromBytes, IntoBytes};

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[test]
fn has_the_documented_digests() {
    assert_eq!(sha256(&vector::bootstrap()), vector::BOOTSTRAP_SHA256);
    assert_eq!(sha256(&vector::device()), vector::DEVICE_SHA256);
}

#[test]
fn reads_as_documented() {
    let bytes = vector::bootstrap();
    let image = Image::parse(&bytes).unwrap();
    let summary = image.check().unwrap();
    assert_eq!((summary.names, summary.inodes, summary.recorded_inos), (6, 6, 6));
    assert_eq!((summary.directories, summary.files, summary.symlinks, summary.specials), (2, 3, 1, 0));
    assert_eq!((summary.xattrs, summary.file_bytes, summary.chunk_references), (1, 5012, 3));
    assert_eq!((summary.chunks, summary.depth, summary.wrong_link_counts), (2, 2, 0));

    let [blob] = image.blobs() else { panic!("one blob") };
    assert_eq!(blob.id.to_string(), vector::BLOB_ID);
    assert_eq!((blob.compressor, blob.digest), (Compressor::None, DigestAlgo::Sha256));
    assert_eq!((blob.compressed_size, blob.uncompressed_size, blob.blocks), (9134, 12288, 3));
    assert_eq!((blob.features, blob.data_size()), (BlobFeatures::PLAIN, 5006));

    let names: Vec<_> = common::listing(&image);
    let expected: [(&[u8], FileKind, u64); 6] = [
        (b"/", FileKind::Directory, 66),
        (b"/a", FileKind::Regular, 6),
        (b"/d", FileKind::Directory, 53),
        (b"/d/b", FileKind::Regular, 6),
        (b"/d/c", FileKind::Regular, 5000),
        (b"/l", FileKind::Symlink, 3),
    ];
    assert_eq!(names, expected.map(|(path, kind, size)| (path.to_vec(), kind, size)));

    let a = image.lookup(b"/a").unwrap().unwrap();
    assert_eq!((a.nid, a.mode, a.mtime, a.nlink, a.ino), (0x85, 0o100_644, 1, 1, 2));
    let xattrs: Vec<_> = a.xattrs().map(Result::unwrap).collect();
    assert_eq!(xattrs.len(), 1);
    assert_eq!(
        (xattrs[0].index, xattrs[0].name(), xattrs[0].value),
        (NameIndex::User, b"user.k".to_vec(), &b"v"[..])
    );
    let link = image.lookup(b"l").unwrap().unwrap();
    assert_eq!(link.target().unwrap(), Some(&b"d/c"[..]));
    let c = image.lookup(link.target().unwrap().unwrap()).unwrap().unwrap();
    let chunks: Vec<_> = c.chunks().map(Result::unwrap).collect();
    assert_eq!(chunks.len(), 1);
    assert_eq!(
        (chunks[0].blob, chunks[0].index, chunks[0].device_offset, chunks[0].size),
        (0, 1, 4096, 5000)
    );
    assert!(image.lookup(b"/d/../d/./b").unwrap().is_some());
    for missing in [&b"/b"[..], b"/d/a", b"/a/b", b"/d/bb", b"/zz"] {
        assert!(image.lookup(missing).unwrap().is_none());
    }
}

#[test]
fn its_chunk_map_reads_the_blob() {
    let bytes = vector::bootstrap();
    let image = Image::parse(&bytes).unwrap();
    let map = image.chunk_map(0).unwrap();
    let data = vector::chunks().concat();
    assert_eq!(map.len(), 2);
    for chunk in &map {
        let start = usize::try_from(chunk.compressed_offset).unwrap();
        let stored = &data[start..start + usize::try_from(chunk.compressed_size).unwrap()];
        assert_eq!(chunk.digest[..], Sha256::digest(stored)[..]);
        assert_eq!((chunk.compressed, chunk.crc32), (false, None));
    }
    assert_eq!((map[1].index, map[1].uncompressed_offset, map[1].uncompressed_size), (1, 4096, 5000));
    assert_eq!(image.chunk_map(1).unwrap_err().field, "index");
}

/// The whole blob, written with our encoders, has the documented digest and passes the blob's check.
#[test]
fn its_blob_is_written_and_checked() {
    let bytes = vector::bootstrap();
    let image = Image::parse(&bytes).unwrap();
    let entry = BlobEntry::ref_from_bytes(&bytes[0x1000..0x1100]).unwrap();
    let header = CiHeader::for_entry(entry);
    let mut ci = Vec::new();
    for chunk in image.chunk_map(0).unwrap() {
        let entry = CiEntry {
            uncompressed_offset: chunk.uncompressed_offset,
            uncompressed_size: chunk.uncompressed_size,
            compressed_offset: chunk.compressed_offset,
            compressed_size: chunk.compressed_size,
            flags: CiFlags::empty(),
            data: 0,
        };
        ci.extend_from_slice(CiV1::encode(&entry).unwrap().as_bytes());
    }
    let mut blob = vector::chunks().concat();
    blob.extend_from_slice(&ci);
    blob.extend_from_slice(header.as_bytes());
    assert_eq!(blob.len(), 9134);
    assert_eq!(sha256(&blob), vector::BLOB_ID);

    let summary = image.check_blob(0, &header, &ci).unwrap();
    assert_eq!((summary.chunks, summary.referenced), (2, 2));
    // Any other bit in the sizes and offsets is seen.
    for bit in 0..ci.len() * 8 {
        let mut wrong = ci.clone();
        wrong[bit / 8] ^= 1 << (bit % 8);
        assert!(image.check_blob(0, &header, &wrong).is_err(), "bit {bit}");
    }
    for (offset, field) in [
        (0, "magic"),
        (4, "features"),
        (8, "ci_compressor"),
        (12, "entries"),
        (16, "ci_offset"),
        (24, "ci_compressed_size"),
        (32, "ci_uncompressed_size"),
        (56, "context_count"),
        (48, "context_size"),
        (4092, "magic2"),
    ] {
        let mut wrong = header.as_bytes().to_vec();
        wrong[offset] ^= 4;
        let wrong = CiHeader::read_from_bytes(&wrong).unwrap();
        assert_eq!(image.check_blob(0, &wrong, &ci).unwrap_err().field, field);
    }
    assert_eq!(image.check_blob(0, &header, &ci[1..]).unwrap_err().field, "length");
}

#[test]
fn every_byte_is_accounted_for() {
    let bytes = vector::bootstrap();
    let dump = dump(&bytes).unwrap();
    assert_eq!((dump.unaccounted(), dump.overlapping()), (0, 0));
    let mut end = 0;
    for region in dump.regions() {
        assert_eq!(region.start, end);
        assert!(region.end > region.start);
        end = region.end;
    }
    assert_eq!(end, 20480);
    let count = |wanted: fn(&What<'_>) -> bool| dump.regions().filter(|region| wanted(&region.what)).count();
    assert_eq!(count(|what| matches!(what, What::Inode { .. })), 6);
    assert_eq!(count(|what| matches!(what, What::Xattrs { .. })), 1);
    assert_eq!(count(|what| matches!(what, What::InlineData { .. })), 3);
    assert_eq!(count(|what| matches!(what, What::ChunkIndexes { .. })), 3);
    let text = dump.to_string();
    assert!(text.contains("target of 140, inline: d/c"), "{text}");
    assert!(text.contains("20480 bytes, 0 unaccounted, 0 overlapping"), "{text}");
}

/// A byte where nothing should be is reported, wherever it is.
#[test]
fn a_stray_byte_is_reported() {
    let bytes = vector::bootstrap();
    let gaps: Vec<_> = dump(&bytes)
        .unwrap()
        .regions()
        .filter(|region| region.what == What::Padding)
        .map(|r| (r.start, r.end))
        .collect();
    assert!(gaps.len() > 5);
    for (start, end) in gaps {
        for at in [start, end - 1] {
            let mut bytes = bytes.clone();
            bytes[usize::try_from(at).unwrap()] = 1;
            assert_eq!(dump(&bytes).unwrap().unaccounted(), 1, "at {at:#x}");
        }
    }
}
