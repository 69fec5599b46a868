//! Larger images: everything in them is found, and found by name.

mod common;

use common::synthetic::{self, BlobSpec, Content, Tree};
use erofs_format::{Compressor, FileKind, Image, dump::dump, inode::DeviceNumber};
use proptest::prelude::*;

#[test]
fn a_rich_image_passes() {
    let tree = synthetic::rich();
    let bytes = tree.build();
    let image = Image::parse(&bytes).unwrap();
    let summary = image.check().unwrap();
    assert_eq!(summary.wrong_link_counts, 0);
    assert_eq!(summary.names, summary.recorded_inos);
    assert_eq!(summary.names, summary.inodes + 2);
    assert_eq!(summary.inodes, u64::try_from(tree.nodes.len()).unwrap());
    assert_eq!((summary.xattrs, summary.depth, summary.specials), (5, 100, 4));
    let dump = dump(&bytes).unwrap();
    assert_eq!((dump.unaccounted(), dump.overlapping()), (0, 0));
    assert_eq!(image.chunk_map(0).unwrap().len(), 5);
    assert_eq!(image.chunk_map(1).unwrap().len(), 3);
    let file = image.lookup(b"usr/file").unwrap().unwrap();
    assert_eq!(image.prefetch().next(), Some(file.nid));
    assert_eq!(image.prefetch().count(), 2);
}

#[test]
fn fields_survive() {
    let bytes = synthetic::rich().build();
    let image = Image::parse(&bytes).unwrap();
    let find = |path: &[u8]| image.lookup(path).unwrap().unwrap();
    let file = find(b"usr/file");
    assert_eq!((file.nlink, file.uid, file.mtime, file.mtime_nsec), (3, 1000, 1_700_000_000, 999_999_999));
    assert_eq!(file.nid, find(b"\xff\xfe not utf-8").nid);
    assert_eq!(file.chunks().map(|c| c.unwrap().size).collect::<Vec<_>>(), [65536, 65536, 5000]);
    assert_eq!(find(b"dev/null").rdev, Some(DeviceNumber { major: 1, minor: 3 }));
    assert_eq!(find(b"dev/disk").rdev, Some(DeviceNumber { major: 259, minor: 0x12345 }));
    assert_eq!((find(b"dev/pipe").kind, find(b"dev/socket").kind), (FileKind::Fifo, FileKind::Socket));
    for len in [1, 2, 100, 4000, 4031, 4032, 4033, 4095] {
        let link = find(format!("links/to-{len}").as_bytes());
        assert_eq!(link.target().unwrap().map(<[u8]>::len), Some(len));
    }
    let old = find(b"old");
    assert_eq!((old.format.extended, old.size, old.mtime), (false, 5000, 0));
    let names: Vec<_> = find(b"xattrs").xattrs().map(|xattr| xattr.unwrap().name()).collect();
    let expected = ["user.k", "system.posix_acl_access", "trusted.t", "security.capability", "user.large"];
    assert_eq!(names, expected.map(|name| name.as_bytes().to_vec()));
}

/// Every name of every directory is found by bisection, and names that are not there are not.
#[test]
fn bisection_finds_all_names() {
    let bytes = synthetic::rich().build();
    let image = Image::parse(&bytes).unwrap();
    let mut found = 0;
    for visit in image.walk().unwrap() {
        let inode = visit.unwrap().inode;
        for entry in inode.entries() {
            let entry = entry.unwrap();
            assert_eq!(inode.lookup(entry.name).unwrap(), Some(entry));
            let mut longer = entry.name.to_vec();
            longer.push(0);
            assert_eq!(inode.lookup(&longer).unwrap(), None);
            assert_eq!(inode.lookup(&entry.name[1..]).unwrap().map(|e| e.name == &entry.name[1..]), {
                inode.entries().any(|e| e.unwrap().name == &entry.name[1..]).then_some(true)
            });
            found += 1;
        }
        for missing in [&b""[..], b"\0", b"zzzz", b"name-", b"\xff\xff"] {
            assert_eq!(inode.lookup(missing).unwrap(), None);
        }
    }
    assert!(found > 3400);
}

#[test]
fn an_image_without_blobs_passes() {
    let mut tree = Tree::new(Vec::new());
    tree.add(0, "empty", Content::File(vec![], None));
    let bytes = tree.build();
    let image = Image::parse(&bytes).unwrap();
    assert_eq!(image.check().unwrap().names, 2);
    assert!(image.blobs().is_empty());
    assert_eq!(dump(&bytes).unwrap().unaccounted(), 0);
}

#[test]
fn the_most_blobs_pass() {
    let blobs = (0..254).map(|_| BlobSpec { compressor: Compressor::None, chunks: vec![(10, 10)] }).collect();
    let mut tree = Tree::new(blobs);
    for blob in 0..254 {
        tree.add(0, format!("{blob}"), Content::File(vec![(blob, 0)], None));
    }
    let bytes = tree.build();
    let image = Image::parse(&bytes).unwrap();
    assert_eq!(image.check().unwrap().chunk_references, 254);
    assert_eq!(image.chunk_map(253).unwrap().len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Directories with any names: the packing size, the writer and the reader agree, and bisection finds all.
    #[test]
    fn directories_round_trip(names in prop::collection::btree_set(
        prop::collection::vec((1u8..=255).prop_filter("no slash", |b| *b != b'/'), 1..=255), 0..300,
    )) {
        let mut tree = Tree::new(Vec::new());
        for name in names.iter().filter(|name| ![&b"."[..], b".."].contains(&&name[..])) {
            tree.add(0, name, Content::Symlink(b"t".to_vec()));
        }
        let bytes = tree.build();
        let image = Image::parse(&bytes).unwrap();
        image.check().unwrap();
        prop_assert_eq!(dump(&bytes).unwrap().unaccounted(), 0);
        let root = image.root().unwrap();
        for name in &names {
            prop_assert!(root.lookup(name).unwrap().is_some());
        }
        let read: Vec<_> = root.entries().map(|entry| entry.unwrap()).filter(|e| !e.is_dot()).map(|e| e.name.to_vec()).collect();
        let written: Vec<_> = names.into_iter().filter(|name| ![&b"."[..], b".."].contains(&&name[..])).collect();
        prop_assert_eq!(read, written);
    }
}
