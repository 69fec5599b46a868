//! Walking a tree by descriptors: paths of any length, no symlink followed, content read piece by piece.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, StatxFlags};
use sha2::{Digest, Sha256};

use super::entry::{Entry, Kind, escape};

/// How much of a file is in memory at once, in bytes.
const PIECE: usize = 1 << 20;

/// Lists the tree at `root` into memory; see [`walk`].
///
/// # Errors
/// As [`walk`].
pub fn list(root: &Path) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    walk(root, |entry| {
        entries.push(entry);
        Ok(())
    })?;
    Ok(entries)
}

/// Hands every name below and including `root` to `each`, parents first, siblings in byte order.
///
/// Memory grows with the number of names in the directories on one path and of hard-linked files, not with sizes.
///
/// # Errors
/// Anything that cannot be read: the message names the path.
pub fn walk(root: &Path, each: impl FnMut(Entry) -> Result<()>) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(root, flags, Mode::empty())
        .with_context(|| format!("cannot open the directory {}", root.display()))?;
    let mut walker = Walker { each, links: HashMap::new(), buffer: vec![0; PIECE] };
    walker.entry(&directory, c".", b".")?;
    walker.directory(&directory, b"")
}

struct Walker<F> {
    each: F,
    /// The first path of every inode that has several, by device and inode number.
    links: HashMap<(u64, u64), String>,
    buffer: Vec<u8>,
}

impl<F: FnMut(Entry) -> Result<()>> Walker<F> {
    fn directory(&mut self, directory: &OwnedFd, path: &[u8]) -> Result<()> {
        let mut names: Vec<CString> = Vec::new();
        for entry in rustix::fs::Dir::read_from(directory).with_context(|| escape(path))? {
            let entry = entry.with_context(|| format!("cannot list {}", escape(path)))?;
            if ![c".", c".."].contains(&entry.file_name()) {
                names.push(entry.file_name().to_owned());
            }
        }
        names.sort();
        for name in names {
            let mut below = path.to_vec();
            if !below.is_empty() {
                below.push(b'/');
            }
            below.extend(name.to_bytes());
            if self.entry(directory, &name, &below)? == Kind::Directory {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let child = rustix::fs::openat(directory, &name, flags, Mode::empty())
                    .with_context(|| format!("cannot open the directory {}", escape(&below)))?;
                self.directory(&child, &below)?;
            }
        }
        Ok(())
    }

    /// Makes and hands over one entry.
    fn entry(&mut self, parent: &OwnedFd, name: &CStr, path: &[u8]) -> Result<Kind> {
        let shown = escape(path);
        let entry = self.describe(parent, name, &shown).with_context(|| format!("cannot read {shown}"))?;
        let kind = entry.kind;
        (self.each)(entry)?;
        Ok(kind)
    }

    fn describe(&mut self, parent: &OwnedFd, name: &CStr, shown: &str) -> Result<Entry> {
        let stat: Stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let statx = rustix::fs::statx(parent, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)?;
        let kind = kind(FileType::from_raw_mode(stat.st_mode));
        let device = matches!(kind, Kind::Character | Kind::Block);
        let hard_link = (kind != Kind::Directory && statx.stx_nlink > 1)
            .then(|| self.links.entry((stat.st_dev, stat.st_ino)).or_insert_with(|| shown.to_owned()).clone())
            .filter(|first| first != shown);
        let target = match kind {
            Kind::Symlink => Some(escape(rustix::fs::readlinkat(parent, name, Vec::new())?.to_bytes())),
            _ => None,
        };
        let sha256 = match kind {
            Kind::File => Some(self.digest(parent, name, statx.stx_size)?),
            _ => None,
        };
        Ok(Entry {
            path: shown.to_owned(),
            kind,
            mode: format!("{:04o}", stat.st_mode & 0o7777),
            uid: statx.stx_uid,
            gid: statx.stx_gid,
            size: statx.stx_size,
            mtime: statx.stx_mtime.tv_sec,
            mtime_ns: statx.stx_mtime.tv_nsec,
            nlink: statx.stx_nlink,
            hard_link,
            rdev: device.then(|| format!("{}:{}", statx.stx_rdev_major, statx.stx_rdev_minor)),
            target,
            xattrs: xattrs(parent, name)?,
            sha256,
        })
    }

    fn digest(&mut self, parent: &OwnedFd, name: &CStr, size: u64) -> Result<String> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(parent, name, flags, Mode::empty())?;
        let mut hash = Sha256::new();
        let mut total = 0;
        loop {
            let count = rustix::io::retry_on_intr(|| rustix::io::read(&file, &mut self.buffer))
                .with_context(|| format!("at offset {total}"))?;
            if count == 0 {
                break;
            }
            hash.update(&self.buffer[..count]);
            total += u64::try_from(count)?;
        }
        anyhow::ensure!(total == size, "the size says {size} bytes, reading gave {total}");
        Ok(hex::encode(hash.finalize()))
    }
}

/// All extended attributes that the caller may see. The path through the parent's descriptor reaches symlinks and
/// special files too, which cannot be opened.
fn xattrs(parent: &OwnedFd, name: &CStr) -> Result<BTreeMap<String, String>> {
    // The kernel's own limit for a list and for a value.
    const LIMIT: usize = 64 << 10;
    let mut path = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
    path.extend(name.to_bytes());
    let path = path.as_slice();
    let mut names = vec![0_u8; LIMIT];
    let length = match rustix::fs::llistxattr(path, &mut names) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(error) => return Err(error).context("cannot list the extended attributes"),
    };
    let mut found = BTreeMap::new();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0_u8; LIMIT];
        let length = rustix::fs::lgetxattr(path, name, &mut value)
            .with_context(|| format!("cannot read the extended attribute {}", escape(name)))?;
        found.insert(escape(name), hex::encode(&value[..length]));
    }
    Ok(found)
}

fn kind(kind: FileType) -> Kind {
    match kind {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        FileType::CharacterDevice => Kind::Character,
        FileType::BlockDevice => Kind::Block,
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
        FileType::Unknown => Kind::Unknown,
    }
}
