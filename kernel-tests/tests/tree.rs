//! The lister and the comparison: every kind of difference is found, and no other.

#![allow(clippy::unwrap_used, reason = "a test panics")]

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::path::Path;

use kernel_tests::skips::{not_root, skip};
use kernel_tests::tree::{Difference, compare, list, report};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

/// A name of no encoding.
const RAW_NAME: &[u8] = b"caf\xe9\\ \n";

/// A tree with one of everything, the same each time.
fn plant(root: &Path) {
    fs::create_dir_all(root.join("dir/sub")).unwrap();
    fs::write(root.join("dir/file"), vec![7; 3 << 20]).unwrap();
    fs::write(root.join("dir/empty"), b"").unwrap();
    fs::write(root.join("dir/a"), b"linked").unwrap();
    fs::hard_link(root.join("dir/a"), root.join("dir/b")).unwrap();
    fs::write(root.join("dir/c"), b"linked").unwrap();
    fs::write(root.join(std::ffi::OsStr::from_bytes(RAW_NAME)), b"raw").unwrap();
    symlink("target", root.join("link")).unwrap();
    node(&root.join("fifo"), FileType::Fifo, 0);
    if not_root().is_none() {
        node(&root.join("device"), FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    }
    rustix::fs::setxattr(root.join("dir/file"), "user.note", b"\x00\xff", XattrFlags::empty()).unwrap();
    settle(root);
}

fn node(path: &Path, kind: FileType, device: u64) {
    rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(0o644), device).unwrap();
}

/// Gives every name the same time, innermost first.
fn settle(path: &Path) {
    if !path.is_symlink() && path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            settle(&entry.unwrap().path());
        }
    }
    stamp(path, 1_700_000_000, 123_456_789);
}

fn stamp(path: &Path, seconds: i64, nanoseconds: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// What a change should be reported as: (path, field), or a name on one side.
enum Expected {
    Fields(&'static [(&'static str, &'static str)]),
    OnlyLeft(&'static str),
    OnlyRight(&'static str),
}

/// (name, needs root, what to do to the second tree, what must be found)
type Case = (&'static str, bool, fn(&Path), Expected);

fn cases() -> Vec<Case> {
    use Expected::{Fields, OnlyLeft, OnlyRight};
    vec![
        ("nothing", false, |_| {}, Fields(&[])),
        (
            "a name is missing",
            false,
            |root| fs::remove_file(root.join("dir/empty")).unwrap(),
            OnlyLeft("dir/empty"),
        ),
        (
            "a name is added",
            false,
            |root| fs::write(root.join("dir/new"), b"").unwrap(),
            OnlyRight("dir/new"),
        ),
        (
            "a directory is a file",
            false,
            |root| {
                fs::remove_dir(root.join("dir/sub")).unwrap();
                fs::write(root.join("dir/sub"), b"").unwrap();
                fs::set_permissions(root.join("dir/sub"), fs::Permissions::from_mode(0o755)).unwrap();
            },
            Fields(&[
                ("dir", "link count"),
                ("dir/sub", "type"),
                ("dir/sub", "link count"),
                ("dir/sub", "content"),
            ]),
        ),
        (
            "mode",
            false,
            |root| fs::set_permissions(root.join("dir/empty"), fs::Permissions::from_mode(0o600)).unwrap(),
            Fields(&[("dir/empty", "mode")]),
        ),
        (
            "sticky bit of a directory",
            false,
            |root| fs::set_permissions(root.join("dir/sub"), fs::Permissions::from_mode(0o1755)).unwrap(),
            Fields(&[("dir/sub", "mode")]),
        ),
        (
            "owner",
            true,
            |root| chown(root.join("dir/empty"), Some(4_000_000), None).unwrap(),
            Fields(&[("dir/empty", "uid")]),
        ),
        (
            "group of a symlink",
            true,
            |root| lchown(root.join("link"), None, Some(9)).unwrap(),
            Fields(&[("link", "gid")]),
        ),
        (
            "one byte of content",
            false,
            |root| {
                let mut content = fs::read(root.join("dir/file")).unwrap();
                content[(2 << 20) + 5] ^= 1;
                fs::write(root.join("dir/file"), content).unwrap();
            },
            Fields(&[("dir/file", "content")]),
        ),
        (
            "one byte more of zeros",
            false,
            |root| File::options().write(true).open(root.join("dir/empty")).unwrap().set_len(1).unwrap(),
            Fields(&[("dir/empty", "size"), ("dir/empty", "content")]),
        ),
        (
            "seconds",
            false,
            |root| stamp(&root.join("link"), 1_700_000_001, 123_456_789),
            Fields(&[("link", "mtime")]),
        ),
        (
            "nanoseconds of a directory",
            false,
            |root| stamp(&root.join("dir/sub"), 1_700_000_000, 123_456_788),
            Fields(&[("dir/sub", "mtime")]),
        ),
        (
            "a link too few",
            false,
            |root| {
                fs::remove_file(root.join("dir/b")).unwrap();
                fs::write(root.join("dir/b"), b"linked").unwrap();
            },
            Fields(&[("dir/a", "link count"), ("dir/b", "link count"), ("dir/b", "hard link to")]),
        ),
        (
            "linked to another file with the same content",
            false,
            |root| {
                // The counts stay {2, 2, 1}; only who shares with whom tells.
                fs::remove_file(root.join("dir/c")).unwrap();
                fs::rename(root.join("dir/b"), root.join("dir/c")).unwrap();
                fs::write(root.join("dir/b"), b"linked").unwrap();
            },
            Fields(&[
                ("dir/b", "link count"),
                ("dir/b", "hard link to"),
                ("dir/c", "link count"),
                ("dir/c", "hard link to"),
            ]),
        ),
        (
            "device number",
            true,
            |root| {
                fs::remove_file(root.join("device")).unwrap();
                node(&root.join("device"), FileType::CharacterDevice, rustix::fs::makedev(1, 5));
            },
            Fields(&[("device", "device")]),
        ),
        (
            "block for character device",
            true,
            |root| {
                fs::remove_file(root.join("device")).unwrap();
                node(&root.join("device"), FileType::BlockDevice, rustix::fs::makedev(1, 3));
            },
            Fields(&[("device", "type")]),
        ),
        (
            "symlink target",
            false,
            |root| {
                fs::remove_file(root.join("link")).unwrap();
                symlink("tarGet", root.join("link")).unwrap();
            },
            Fields(&[("link", "target")]),
        ),
        (
            "xattr value",
            false,
            |root| {
                rustix::fs::setxattr(root.join("dir/file"), "user.note", b"\x00\xfe", XattrFlags::empty())
                    .unwrap();
            },
            Fields(&[("dir/file", "xattr user.note")]),
        ),
        (
            "xattr added to a directory",
            false,
            |root| rustix::fs::setxattr(root.join("dir"), "user.x", b"", XattrFlags::empty()).unwrap(),
            Fields(&[("dir", "xattr user.x")]),
        ),
        (
            "xattr gone",
            false,
            |root| rustix::fs::removexattr(root.join("dir/file"), "user.note").unwrap(),
            Fields(&[("dir/file", "xattr user.note")]),
        ),
        (
            "xattr of a special file",
            true,
            |root| {
                rustix::fs::lsetxattr(root.join("fifo"), "trusted.x", b"1", XattrFlags::empty()).unwrap();
            },
            Fields(&[("fifo", "xattr trusted.x")]),
        ),
    ]
}

#[test]
fn every_kind_of_difference_is_found_and_no_other() {
    // Not in /tmp: that may be a tmpfs, which before Linux 6.6 has no user xattrs.
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for (index, (name, needs_root, change, expected)) in cases().into_iter().enumerate() {
        if needs_root && let Some(why) = not_root() {
            skip(&format!("tree difference: {name}"), &why);
            continue;
        }
        let (left, right) =
            (scratch.path().join(format!("{index}l")), scratch.path().join(format!("{index}r")));
        plant(&left);
        plant(&right);
        change(&right);
        // A change touches its file and its directory; cases about times set them last and alone.
        let stamped = ["seconds", "nanoseconds of a directory"].contains(&name);
        if !stamped {
            settle(&right);
        }
        let found = compare(&list(&left).unwrap(), &list(&right).unwrap());
        let text = report(&found);
        match expected {
            Expected::OnlyLeft(path) => {
                assert_eq!(found, [Difference::OnlyLeft(path.into())], "{name}: {text}")
            }
            Expected::OnlyRight(path) => {
                assert_eq!(found, [Difference::OnlyRight(path.into())], "{name}: {text}")
            }
            Expected::Fields(expected) => {
                let found: Vec<(&str, &str)> = found
                    .iter()
                    .map(|difference| match difference {
                        Difference::Field { path, field, .. } => (path.as_str(), field.as_str()),
                        other => panic!("{name}: {other}"),
                    })
                    .collect();
                assert_eq!(found, expected, "{name}: {text}");
            }
        }
    }
}

#[test]
fn names_of_no_encoding_are_listed() {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    plant(scratch.path());
    let entries = list(scratch.path()).unwrap();
    assert!(entries.iter().any(|entry| entry.path == "caf\\xe9\\\\ \\n"), "{entries:?}");
    assert_eq!(entries[0].path, ".");
}

#[test]
fn paths_longer_than_the_kernel_takes_are_listed() {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let name = "n".repeat(255);
    let mut directory = rustix::fs::open(scratch.path(), rustix::fs::OFlags::RDONLY, Mode::empty()).unwrap();
    for _ in 0..20 {
        rustix::fs::mkdirat(&directory, &name, Mode::RWXU).unwrap();
        directory = rustix::fs::openat(&directory, &name, rustix::fs::OFlags::RDONLY, Mode::empty()).unwrap();
    }
    let entries = list(scratch.path()).unwrap();
    assert_eq!(entries.len(), 21);
    assert_eq!(entries[20].path.len(), 20 * 256 - 1);
    // The standard remover works by descriptors as well.
    fs::remove_dir_all(scratch.path().join(&name)).unwrap();
}

#[test]
fn what_cannot_be_read_is_an_error_that_names_it() {
    let missing = list(Path::new("/skimmer-no-such-directory")).unwrap_err();
    assert!(format!("{missing:#}").contains("skimmer-no-such-directory"), "{missing:#}");
}
