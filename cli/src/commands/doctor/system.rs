//! The kernel, its limits, and the file system of the cache.

use std::path::Path;

use rustix::process::{Resource, getrlimit};

use super::{Finding, existing};
use crate::output;

/// Descriptors that a node with hundreds of images needs.
const DESCRIPTORS: u64 = 65_536;
/// Free space below which a cache cannot do much.
const ROOM: u64 = 1 << 30;
/// Free inodes, the same.
const INODES: u64 = 10_000;

/// What holds for every way of working.
pub(super) fn examine(root: &Path) -> Vec<Finding> {
    let uname = rustix::system::uname();
    vec![
        Finding::note("kernel", uname.release().to_string_lossy()),
        page_size(),
        erofs(),
        io_uring(),
        descriptors(),
        file_system(root),
    ]
}

fn page_size() -> Finding {
    let page = rustix::param::page_size();
    if page == 4096 {
        return Finding::ok("page size", "4096 bytes");
    }
    let found = format!("{page} bytes: images have 4096-byte blocks, and fscache needs both to be the same");
    Finding::missing("page size", found, "use the fanotify attach mode, or a kernel with 4 KiB pages")
}

fn erofs() -> Finding {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|line| line.trim_start_matches("nodev").trim() == "erofs") {
        Finding::ok("erofs", "the kernel has it")
    } else {
        Finding::missing("erofs", "not in /proc/filesystems", "load it: modprobe erofs")
    }
}

fn io_uring() -> Finding {
    let path = "/proc/sys/kernel/io_uring_disabled";
    match std::fs::read_to_string(path).as_deref().map(str::trim) {
        Ok("2") => Finding::missing(
            "io_uring",
            format!("{path} is 2: nobody may use it, and skimmerd writes its cache with it"),
            "set it to 0: sysctl kernel.io_uring_disabled=0",
        ),
        Ok("1") => Finding::ok("io_uring", format!("{path} is 1: for privileged processes")),
        // Kernels before 6.6 have no such switch.
        _ => Finding::ok("io_uring", "not switched off"),
    }
}

fn descriptors() -> Finding {
    let limit = getrlimit(Resource::Nofile).maximum;
    match limit {
        Some(limit) if limit < DESCRIPTORS => Finding::hint(
            "open files",
            format!("at most {limit} for a daemon that is started here; every blob takes a few"),
            format!("raise the hard limit to {DESCRIPTORS} or more; the systemd unit sets its own"),
        ),
        Some(limit) => Finding::ok("open files", format!("up to {limit}")),
        None => Finding::ok("open files", "no limit"),
    }
}

fn file_system(root: &Path) -> Finding {
    let dir = existing(root);
    let (kind, space) = match (rustix::fs::statfs(dir), rustix::fs::statvfs(dir)) {
        (Ok(kind), Ok(space)) => (kind.f_type, space),
        (Err(error), _) | (_, Err(error)) => {
            return Finding::missing("cache", format!("{}: {error}", dir.display()), "choose another root");
        }
    };
    // linux/magic.h
    let kind = match i128::from(kind) {
        0xEF53 => "ext4",
        0x5846_5342 => "XFS",
        0x9123_683E => "btrfs",
        other => {
            return Finding::missing(
                "cache",
                format!("{} is on a file system of type {other:#x}", dir.display()),
                "put `root` on ext4, XFS or btrfs: others lack pre-content events or what fscache asks for",
            );
        }
    };
    let room = space.f_bavail.saturating_mul(space.f_frsize);
    let found = format!("{} is on {kind}, {} free", dir.display(), output::bytes(room));
    // btrfs has no fixed number of inodes.
    let inodes_short = space.f_files > 0 && space.f_favail < INODES;
    if room < ROOM || inodes_short {
        let found = if inodes_short { format!("{found}, {} inodes free", space.f_favail) } else { found };
        return Finding::missing("cache", found, "make room, or put `root` elsewhere");
    }
    Finding::ok("cache", found)
}
