//! The mount system calls. Never through mount(8), which makes a loop device of a regular file without a word: through
//! a loop device no event comes and holes read as zeros.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree, unmount,
};

/// What an EROFS superblock is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Plain files: the bootstrap and one file per blob, in device order.
    Files {
        /// The bootstrap.
        bootstrap: PathBuf,
        /// The blob files.
        devices: Vec<PathBuf>,
    },
    /// Cookies of fscache.
    Fscache {
        /// The bootstrap's cookie.
        fsid: String,
        /// The domain in which blobs are shared.
        domain: String,
    },
}

/// A step of mounting that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {errno}{}", if log.is_empty() { String::new() } else { format!(" (kernel: {log})") })]
pub struct MountError {
    /// What was tried, on what.
    pub step: String,
    /// The answer.
    pub errno: Errno,
    /// What the kernel wrote about it, if anything.
    pub log: String,
}

impl MountError {
    fn new(step: impl Into<String>, errno: Errno) -> Self {
        Self { step: step.into(), errno, log: String::new() }
    }
}

/// A mounted file system that no path leads to yet. Dropping it unmounts it.
#[derive(Debug)]
pub struct Detached {
    mount: OwnedFd,
}

impl Detached {
    /// Mounts an EROFS image, read-only. Blocks until the kernel has read the superblock: for fscache that takes
    /// answers of the data path.
    ///
    /// # Errors
    /// [`MountError`] with the kernel's own words where it has some.
    pub fn mount(source: &Source) -> Result<Self, MountError> {
        let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)
            .map_err(|errno| MountError::new("erofs is not known to this kernel", errno))?;
        let set = |key: &str, value: &[u8]| {
            fsconfig_set_string(context.as_fd(), key, value).map_err(|errno| MountError {
                log: kernel_log(&context),
                ..MountError::new(format!("mount option {key}={}", String::from_utf8_lossy(value)), errno)
            })
        };
        match source {
            Source::Files { bootstrap, devices } => {
                set("source", bytes(bootstrap))?;
                for device in devices {
                    set("device", bytes(device))?;
                }
            }
            Source::Fscache { fsid, domain } => {
                set("source", b"none")?;
                set("fsid", fsid.as_bytes())?;
                set("domain_id", domain.as_bytes())?;
            }
        }
        let refused =
            |step: &str, errno| MountError { log: kernel_log(&context), ..MountError::new(step, errno) };
        fsconfig_set_flag(context.as_fd(), "ro").map_err(|errno| refused("mount option ro", errno))?;
        fsconfig_create(context.as_fd()).map_err(|errno| refused("mounting the image", errno))?;
        let mount =
            fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
                .map_err(|errno| refused("making the mount", errno))?;
        Ok(Self { mount })
    }

    /// A second mount of the file system that is mounted at `target`.
    ///
    /// # Errors
    /// [`MountError`].
    pub fn clone_of(target: &Path) -> Result<Self, MountError> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
        let mount = open_tree(CWD, target, flags)
            .map_err(|errno| MountError::new(format!("cloning the mount at {}", target.display()), errno))?;
        Ok(Self { mount })
    }

    /// A descriptor of its root, to look inside.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }

    /// Device number of its files as `/proc/self/mountinfo` writes it.
    ///
    /// # Errors
    /// [`MountError`].
    pub fn device(&self) -> Result<String, MountError> {
        device_of(self.mount.as_fd(), Path::new(""))
            .map_err(|errno| MountError::new("stat of the new mount", errno))
    }

    /// Shows the mount at `target`.
    ///
    /// # Errors
    /// [`MountError`].
    pub fn attach(&self, target: &Path) -> Result<(), MountError> {
        move_mount(self.mount.as_fd(), "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(|errno| MountError::new(format!("mounting on {}", target.display()), errno))
    }
}

/// Device number (`major:minor`) of the files at `path`, relative to `dir`.
///
/// # Errors
/// The system's answer.
pub fn device_of(dir: BorrowedFd<'_>, path: &Path) -> Result<String, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
    let stat = rustix::fs::statx(dir, path, flags, StatxFlags::BASIC_STATS)?;
    Ok(format!("{}:{}", stat.stx_dev_major, stat.stx_dev_minor))
}

/// Device number (`major:minor`) of the topmost mount at `target`. Asks no other machine for it.
///
/// # Errors
/// The system's answer.
pub fn device_at(target: &Path) -> Result<String, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(CWD, target, flags, StatxFlags::BASIC_STATS)?;
    Ok(format!("{}:{}", stat.stx_dev_major, stat.stx_dev_minor))
}

/// Unmounts the topmost mount at `target`.
///
/// # Errors
/// `EBUSY` while files on it are open, unless `detach`.
pub fn umount(target: &Path, detach: bool) -> Result<(), Errno> {
    let mut flags = UnmountFlags::NOFOLLOW;
    if detach {
        flags |= UnmountFlags::DETACH;
    }
    unmount(target, flags)
}

/// Whether this kernel knows EROFS at all.
///
/// # Errors
/// Why not, in words.
pub fn probe_erofs() -> Result<(), String> {
    fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)
        .map(drop)
        .map_err(|errno| format!("erofs is not known to this kernel: {errno}"))
}

/// The messages a file system context has collected (fsopen: reading the descriptor), joined.
fn kernel_log(context: &OwnedFd) -> String {
    let mut lines: Vec<String> = Vec::new();
    let mut buffer = [0_u8; 1024];
    while lines.len() < 8 {
        match rustix::io::read(context, &mut buffer[..]) {
            Ok(0) | Err(_) => break,
            Ok(length) => {
                let line = String::from_utf8_lossy(&buffer[..length]);
                // Each line starts with its level and a space: e, w or i.
                lines.push(line.trim_end().get(2..).unwrap_or_default().to_owned());
            }
        }
    }
    lines.join("; ")
}

fn bytes(path: &Path) -> &[u8] {
    use std::os::unix::ffi::OsStrExt;
    path.as_os_str().as_bytes()
}

impl From<MountError> for io::Error {
    fn from(error: MountError) -> Self {
        Self::new(Self::from(error.errno).kind(), error.to_string())
    }
}
