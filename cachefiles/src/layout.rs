//! Cache files made before the mount.
//!
//! A file that the kernel makes itself is an unlinked temporary until it is unmounted, and a power cut loses it. One
//! that lies in place under its final name, with the right attribute, is used as it is (`fs/cachefiles/xattr.c`,
//! `namei.c`). A directory or file *without* the attribute makes every mount fail, so none is ever visible without it.

use crate::names::{NameError, ObjectName, Volume};
use crate::sys;
use rustix::fs::{AtFlags, Dir, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Name of the attribute that the kernel trusts.
const XATTR: &str = "user.CacheFiles.cache";
/// Its value on a volume directory.
const VOLUME_XATTR: [u8; 4] = [0; 4];
/// Backing files are whole pages.
const PAGE: u64 = 4096;
const DIR_MODE: Mode = Mode::RWXU;
const FILE_MODE: Mode = Mode::RUSR.union(Mode::WUSR);
/// Names that start with this are ours and unfinished.
const TEMPORARY: &str = ".skimmer-new-";

/// Failures of the layout.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A key that the kernel would not take.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A size that is 0 or too large for a file.
    #[error("{}: object size {size} is 0 or too large for a file", path.display())]
    Size {
        /// Cache file.
        path: PathBuf,
        /// Size asked for.
        size: u64,
    },
    /// The file is there, does not fit, and somebody writes to it.
    #[error("{}: is of another size or carries another attribute ({found}) and is in use; unmount what uses it", path.display())]
    InUse {
        /// Cache file.
        path: PathBuf,
        /// What was found.
        found: String,
    },
    /// Something that is neither file nor directory, or the wrong one of the two, lies there.
    #[error("{}: is no {expected}; remove it", path.display())]
    Kind {
        /// Path.
        path: PathBuf,
        /// What should be there.
        expected: &'static str,
    },
    /// A volume directory whose attribute is missing or different. Mounts would fail.
    #[error("{}: carries no valid {XATTR} attribute, mounts would fail; remove the directory while nothing is mounted", path.display())]
    VolumeXattr {
        /// Directory.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{}: {what}: {source}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// Step.
        what: &'static str,
        /// Cause.
        source: io::Error,
    },
}

/// How a cache file came to be in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Made, all holes.
    Created,
    /// Was there and fits.
    Reused,
    /// Was there, did not fit, was not in use: replaced by a new one, all holes.
    Replaced,
}

/// A cache file in place.
#[derive(Debug)]
pub struct CacheFile {
    /// Where it is.
    pub path: PathBuf,
    /// Open for reading and writing: to check what is in it and to sync it, since the anonymous descriptor cannot.
    pub fd: OwnedFd,
    /// How it came to be there.
    pub outcome: Outcome,
}

/// The directory that is given to the device with `dir`.
#[derive(Debug)]
pub struct Layout {
    root: PathBuf,
    cache: OwnedFd,
}

impl Layout {
    /// Opens the layout below `root`, makes `root` and `cache/` where they are missing, and removes what an
    /// interrupted run left unfinished.
    ///
    /// # Errors
    /// [`LayoutError`].
    pub fn open(root: &Path) -> Result<Self, LayoutError> {
        make_dir(rustix::fs::CWD, root.as_os_str().as_bytes(), root)?;
        let top = open_dir(rustix::fs::CWD, root.as_os_str().as_bytes(), root)?;
        let path = root.join("cache");
        make_dir(&top, b"cache", &path)?;
        let cache = open_dir(&top, b"cache", &path)?;
        let layout = Self { root: root.into(), cache };
        layout.sweep(&layout.cache, &path)?;
        Ok(layout)
    }

    /// The directory it was opened with.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes the directory of a volume, or checks the one that is there.
    ///
    /// # Errors
    /// [`LayoutError::VolumeXattr`] for a directory that would make mounts fail.
    pub fn ensure_volume(&self, volume: &Volume) -> Result<(), LayoutError> {
        self.volume_dir(volume).map(drop)
    }

    /// Puts a sparse cache file for an object of `size` bytes in place, or reuses the one that is there. To be called
    /// **before** the mount: when OPEN comes the kernel has already looked. Its directories are made too.
    ///
    /// # Errors
    /// [`LayoutError::InUse`] when a file that does not fit is in use.
    pub fn ensure_file(
        &self,
        volume: &Volume,
        cookie_key: &[u8],
        size: u64,
    ) -> Result<CacheFile, LayoutError> {
        let name = volume.object(cookie_key)?;
        let path = self.root.join(name.path());
        let length = file_length(size).ok_or_else(|| LayoutError::Size { path: path.clone(), size })?;
        let volume_dir = self.volume_dir(volume)?;
        let fanout = self.fanout_dir(&volume_dir, &name)?;
        match self.check_file(&fanout, &name, &path, size, length)? {
            Found::Fits(fd) => Ok(CacheFile { path, fd, outcome: Outcome::Reused }),
            Found::Nothing => {
                let fd = create_file(&fanout, &name, &path, size, length)?;
                Ok(CacheFile { path, fd, outcome: Outcome::Created })
            }
            Found::Misfit => {
                let fd = create_file(&fanout, &name, &path, size, length)?;
                Ok(CacheFile { path, fd, outcome: Outcome::Replaced })
            }
        }
    }

    fn volume_dir(&self, volume: &Volume) -> Result<OwnedFd, LayoutError> {
        let name = volume.directory();
        let path = self.root.join("cache").join(os(&name));
        match open_dir(&self.cache, &name, &path) {
            Ok(dir) => {
                if read_xattr(&dir, &path)?.as_deref() == Some(&VOLUME_XATTR) {
                    return Ok(dir);
                }
                return Err(LayoutError::VolumeXattr { path });
            }
            Err(LayoutError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let temporary = temporary_name();
        let fail = |what| fail(&path, what);
        rustix::fs::mkdirat(&self.cache, temporary.as_str(), DIR_MODE)
            .map_err(fail("making the directory"))?;
        let dir = open_dir(&self.cache, temporary.as_bytes(), &path)?;
        rustix::fs::fsetxattr(&dir, XATTR, &VOLUME_XATTR, XattrFlags::empty())
            .map_err(fail("setting its attribute"))?;
        rustix::fs::fsync(&dir).map_err(fail("syncing it"))?;
        rustix::fs::renameat(&self.cache, temporary.as_str(), &self.cache, os(&name))
            .map_err(fail("renaming it into place"))?;
        rustix::fs::fsync(&self.cache).map_err(fail("syncing its parent"))?;
        Ok(dir)
    }

    fn fanout_dir(&self, volume: &OwnedFd, name: &ObjectName) -> Result<OwnedFd, LayoutError> {
        let path = self.root.join("cache").join(os(&name.volume)).join(&name.fanout);
        make_dir(volume, name.fanout.as_bytes(), &path)?;
        let dir = open_dir(volume, name.fanout.as_bytes(), &path)?;
        self.sweep(&dir, &path)?;
        Ok(dir)
    }

    fn check_file(
        &self,
        dir: &OwnedFd,
        name: &ObjectName,
        path: &Path,
        size: u64,
        length: u64,
    ) -> Result<Found, LayoutError> {
        let fail = |what| fail(path, what);
        // For reading only, so that we are no writer ourselves when we look for others.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = match rustix::fs::openat(dir, os(&name.file), flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(Found::Nothing),
            Err(Errno::LOOP) => {
                return Err(LayoutError::Kind { path: path.into(), expected: "regular file" });
            }
            Err(errno) => return Err(fail("opening it")(errno)),
        };
        let stat = rustix::fs::fstat(&fd).map_err(fail("looking at it"))?;
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(LayoutError::Kind { path: path.into(), expected: "regular file" });
        }
        let xattr = read_xattr(&fd, path)?;
        // Longer is fine, the kernel lets its users write past the object's end.
        let long_enough = u64::try_from(stat.st_size).is_ok_and(|found| found >= length);
        if xattr.as_deref() == Some(&file_xattr(size)) && long_enough {
            let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd =
                rustix::fs::openat(dir, os(&name.file), flags, Mode::empty()).map_err(fail("opening it"))?;
            return Ok(Found::Fits(fd));
        }
        let in_use = sys::is_open_for_writing(fd.as_fd()).map_err(|source| LayoutError::Io {
            path: path.into(),
            what: "asking whether it is in use",
            source,
        })?;
        if in_use {
            let found = format!("length {}, attribute {}", stat.st_size, describe(xattr.as_deref()));
            return Err(LayoutError::InUse { path: path.into(), found });
        }
        Ok(Found::Misfit)
    }

    /// Removes unfinished files and directories of an earlier run.
    fn sweep(&self, dir: &OwnedFd, path: &Path) -> Result<(), LayoutError> {
        let entries = Dir::read_from(dir).map_err(fail(path, "listing it"))?;
        for entry in entries {
            let entry = entry.map_err(fail(path, "listing it"))?;
            let name = entry.file_name();
            if !name.to_bytes().starts_with(TEMPORARY.as_bytes()) {
                continue;
            }
            let removed = match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
                Err(Errno::ISDIR) => rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR),
                other => other,
            };
            match removed {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(fail(path, "removing an unfinished file in it")(errno)),
            }
        }
        Ok(())
    }
}

enum Found {
    Nothing,
    Fits(OwnedFd),
    Misfit,
}

fn create_file(
    dir: &OwnedFd,
    name: &ObjectName,
    path: &Path,
    size: u64,
    length: u64,
) -> Result<OwnedFd, LayoutError> {
    let fail = |what| fail(path, what);
    let temporary = temporary_name();
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(dir, temporary.as_str(), flags, FILE_MODE).map_err(fail("creating it"))?;
    rustix::fs::ftruncate(&fd, length).map_err(fail("setting its length"))?;
    rustix::fs::fsetxattr(&fd, XATTR, &file_xattr(size), XattrFlags::empty())
        .map_err(fail("setting its attribute"))?;
    rustix::fs::fsync(&fd).map_err(fail("syncing it"))?;
    rustix::fs::renameat(dir, temporary.as_str(), dir, os(&name.file))
        .map_err(fail("renaming it into place"))?;
    rustix::fs::fsync(dir).map_err(fail("syncing its directory"))?;
    Ok(fd)
}

/// Rounded up to whole pages; `None` for sizes that no file can have.
fn file_length(size: u64) -> Option<u64> {
    let length = size.checked_next_multiple_of(PAGE)?;
    (size > 0 && i64::try_from(length).is_ok()).then_some(length)
}

/// `struct cachefiles_xattr`: big-endian size, zero point, type 1 (data), content 0 (nothing known).
fn file_xattr(size: u64) -> [u8; 18] {
    let mut out = [0; 18];
    out[..8].copy_from_slice(&size.to_be_bytes());
    out[16] = 1;
    out
}

fn describe(xattr: Option<&[u8]>) -> String {
    match xattr.map(<&[u8; 18]>::try_from) {
        None => "missing".into(),
        Some(Ok(bytes)) => {
            let mut size = [0; 8];
            size.copy_from_slice(&bytes[..8]);
            format!("for size {}", u64::from_be_bytes(size))
        }
        Some(Err(_)) => "of another form".into(),
    }
}

/// The attribute; `None` when it is missing or longer than any valid one.
fn read_xattr(fd: &OwnedFd, path: &Path) -> Result<Option<Vec<u8>>, LayoutError> {
    let mut value = [0; 64];
    match rustix::fs::fgetxattr(fd, XATTR, &mut value[..]) {
        Ok(len) => Ok(value.get(..len).map(Into::into)),
        Err(Errno::NODATA | Errno::RANGE) => Ok(None),
        Err(errno) => Err(fail(path, "reading its attribute")(errno)),
    }
}

fn make_dir(at: impl AsFd, name: &[u8], path: &Path) -> Result<(), LayoutError> {
    match rustix::fs::mkdirat(at, os(name), DIR_MODE) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(fail(path, "making the directory")(errno)),
    }
}

fn open_dir(at: impl AsFd, name: &[u8], path: &Path) -> Result<OwnedFd, LayoutError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, os(name), flags, Mode::empty()).map_err(|errno| match errno {
        Errno::NOTDIR | Errno::LOOP => LayoutError::Kind { path: path.into(), expected: "directory" },
        _ => fail(path, "opening the directory")(errno),
    })
}

fn os(name: &[u8]) -> &std::ffi::OsStr {
    std::ffi::OsStr::from_bytes(name)
}

fn temporary_name() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{TEMPORARY}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

fn fail(path: &Path, what: &'static str) -> impl Fn(Errno) -> LayoutError {
    move |errno| LayoutError::Io { path: path.into(), what, source: errno.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

    const SIZE: u64 = 32_346_112;

    fn set_xattr(path: &Path, value: &[u8]) {
        rustix::fs::setxattr(path, XATTR, value, XattrFlags::empty()).unwrap();
    }

    fn get_xattr(path: &Path) -> Option<Vec<u8>> {
        let mut value = [0; 64];
        let len = rustix::fs::getxattr(path, XATTR, &mut value[..]).ok()?;
        Some(value[..len].to_vec())
    }

    #[test]
    fn attribute_as_the_kernel_writes_it() {
        let expected = [0, 0, 0, 0, 1, 0xed, 0x90, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        assert_eq!(file_xattr(SIZE), expected);
        assert_eq!(file_length(1), Some(4096));
        assert_eq!(file_length(4096), Some(4096));
        assert_eq!(file_length(0), None);
        assert_eq!(file_length(u64::MAX), None);
        assert_eq!(file_length(i64::MAX.unsigned_abs()), None);
    }

    #[test]
    fn files_are_made_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::erofs("dom1").unwrap();
        let layout = Layout::open(&dir.path().join("fscache")).unwrap();
        let made = layout.ensure_file(&volume, b"blob.img", SIZE - 1).unwrap();
        assert_eq!(made.outcome, Outcome::Created);
        assert_eq!(made.path, dir.path().join("fscache/cache/Ierofs,dom1/@9b/Dblob.img"));
        let meta = fs::metadata(&made.path).unwrap();
        assert_eq!((meta.len(), meta.blocks(), meta.mode() & 0o7777), (SIZE, 0, 0o600));
        assert_eq!(get_xattr(&made.path).unwrap(), file_xattr(SIZE - 1));
        let volume_dir = dir.path().join("fscache/cache/Ierofs,dom1");
        assert_eq!(get_xattr(&volume_dir).unwrap(), [0; 4]);
        assert_eq!(fs::metadata(&volume_dir).unwrap().permissions().mode() & 0o7777, 0o700);

        File::from(made.fd).write_all_at(&[7; 4096], 8192).unwrap();
        let again = Layout::open(&dir.path().join("fscache")).unwrap();
        let kept = again.ensure_file(&volume, b"blob.img", SIZE - 1).unwrap();
        assert_eq!(kept.outcome, Outcome::Reused);
        let mut byte = [0];
        File::from(kept.fd).read_exact_at(&mut byte, 8192).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn misfits_are_replaced_unless_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::erofs("d1").unwrap();
        let layout = Layout::open(dir.path()).unwrap();
        let path = layout.ensure_file(&volume, b"x", 8192).unwrap().path;
        let spoilers: [(&str, &dyn Fn()); 4] = [
            ("size in the attribute", &|| set_xattr(&path, &file_xattr(4096))),
            ("form of the attribute", &|| set_xattr(&path, &[0; 4])),
            ("no attribute", &|| rustix::fs::removexattr(&path, XATTR).unwrap()),
            ("length", &|| File::options().write(true).open(&path).unwrap().set_len(4096).unwrap()),
        ];
        for (what, spoil) in spoilers {
            spoil();
            let holder = File::options().write(true).open(&path).unwrap();
            let error = layout.ensure_file(&volume, b"x", 8192).unwrap_err();
            assert!(matches!(error, LayoutError::InUse { .. }), "{what}: {error}");
            drop(holder);
            let file = layout.ensure_file(&volume, b"x", 8192).unwrap();
            assert_eq!(file.outcome, Outcome::Replaced, "{what}");
            assert_eq!(get_xattr(&path).unwrap(), file_xattr(8192));
            drop(file);
            assert_eq!(layout.ensure_file(&volume, b"x", 8192).unwrap().outcome, Outcome::Reused);
        }
    }

    #[test]
    fn what_would_make_mounts_fail_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::open(dir.path()).unwrap();
        fs::create_dir(dir.path().join("cache/Ierofs,d1")).unwrap();
        let volume = Volume::erofs("d1").unwrap();
        assert!(matches!(layout.ensure_volume(&volume), Err(LayoutError::VolumeXattr { .. })));
        fs::write(dir.path().join("cache/Ierofs,d2"), b"").unwrap();
        let error = layout.ensure_volume(&Volume::erofs("d2").unwrap()).unwrap_err();
        assert!(matches!(error, LayoutError::Kind { expected: "directory", .. }), "{error}");
        let volume = Volume::erofs("d3").unwrap();
        let name = volume.object("x").unwrap();
        layout.ensure_file(&volume, b"x", 1).unwrap();
        fs::remove_file(dir.path().join(name.path())).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join(name.path())).unwrap();
        let error = layout.ensure_file(&volume, b"x", 1).unwrap_err();
        assert!(matches!(error, LayoutError::Kind { expected: "regular file", .. }), "{error}");
        assert!(matches!(layout.ensure_file(&volume, b"y", 0), Err(LayoutError::Size { .. })));
        assert!(matches!(layout.ensure_file(&volume, &[b'a'; 253], 1), Err(LayoutError::Name(_))));
    }

    #[test]
    fn unfinished_work_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::erofs("d1").unwrap();
        let layout = Layout::open(dir.path()).unwrap();
        let path = layout.ensure_file(&volume, b"x", 1).unwrap().path;
        let file = path.with_file_name(format!("{TEMPORARY}1-1"));
        fs::write(&file, b"half").unwrap();
        let directory = dir.path().join("cache").join(format!("{TEMPORARY}1-2"));
        fs::create_dir(&directory).unwrap();
        Layout::open(dir.path()).unwrap().ensure_file(&volume, b"x", 1).unwrap();
        assert!(!file.exists() && !directory.exists() && path.exists());
    }
}
