//! The hard image is what it claims to be: another implementation unpacks it.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use kernel_tests::fixture::{hard_image, unpack};
use kernel_tests::skips::{not_root, skip};
use kernel_tests::tree::{Kind, list};

#[test]
fn umoci_unpacks_the_hard_image() {
    if let Some(why) = not_root() {
        return skip("umoci_unpacks_the_hard_image", &why);
    }
    skimmer_vm_images::apt::ensure(&["umoci"]).unwrap();
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let layout = scratch.path().join("image");
    hard_image(&layout).unwrap();
    let root = unpack(&layout, "gzip", &scratch.path().join("bundle")).unwrap();
    let entries = list(&root).unwrap();
    let find = |path: &str| entries.iter().find(|entry| entry.path == path);
    for gone in ["deleted", "deleted-tree", "opaque/old", "opaque/sub", "late-opaque/old", "links/pair-1"] {
        assert!(find(gone).is_none(), "{gone} is still there");
    }
    for here in ["opaque/new", "late-opaque/new", "replaced/kept", "replaced/file/inside", "app/main"] {
        assert!(find(here).is_some(), "{here} is missing");
    }
    assert_eq!(find("replaced/directory").unwrap().kind, Kind::File);
    assert_eq!(find("data/c").unwrap().nlink, 3);
    assert_eq!(find("links/from-below").unwrap().hard_link.as_deref(), Some("data/size-4096"));
    assert_eq!(find("links/pair-2").unwrap().nlink, 1);
    assert_eq!(find("dev/wide").unwrap().rdev.as_deref(), Some("259:74565"));
    assert_eq!(find("bin/far-owner").unwrap().gid, 4_000_000_000);
    assert_eq!(find("data/nanoseconds").unwrap().mtime_ns, 123_456_789);
    assert_eq!(find("data/later").unwrap().mtime, 5_000_000_000);
    assert_eq!(find("usr-gnu/sparse").unwrap().size, 40 << 20);
    assert_eq!(find("usr-gnu/sparse").unwrap().sha256, find("usr-posix/sparse").unwrap().sha256);
    assert!(find("bin/ping").unwrap().xattrs.contains_key("security.capability"));
    assert!(find("etc/acl").unwrap().xattrs.contains_key("system.posix_acl_access"));
    assert!(find("etc/acl.d").unwrap().xattrs.contains_key("system.posix_acl_default"));
    assert!(find("etc/trusted").unwrap().xattrs.contains_key("trusted.note"));
    assert!(find("names/caf\\xe9 \\\\ \\\"\\n\\x01").is_some());
    assert!(entries.iter().filter(|entry| entry.path.starts_with("many/")).count() == 700);
}
