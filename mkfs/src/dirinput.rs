//! Reads a directory tree of the host. Nothing is opened by a path that could have changed its meaning: every step goes
//! through the descriptor of the parent, and symlinks are never followed.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RawDir, Stat};
use rustix::io::Errno;

use crate::error::EntryProblem;
use crate::options::UnsupportedXattrs;
use crate::pack::{DataError, Packer};
use crate::progress::Progress;
use crate::tree::{Body, Inode, InodeId, Meta, RawXattr, Tree, check_name, device_number, make_xattrs};
use crate::{MkfsError, Options};

/// A directory whose content is still to be read.
struct Todo {
    id: InodeId,
    parent: Rc<OwnedFd>,
    name: CString,
    path: PathBuf,
    stat: Stat,
}

struct Reader<'r, 'a> {
    tree: &'r mut Tree,
    packer: &'r mut Packer<'a>,
    progress: &'r dyn Progress,
    xattrs: UnsupportedXattrs,
    /// Device and inode number of the destination.
    destination: Option<(u64, u64)>,
    /// Regular files with several names.
    links: HashMap<(u64, u64), InodeId>,
}

/// Reads everything below `root` into the (empty) tree. `destination` must not lie inside.
///
/// Files are packed directory by directory, each directory's files in byte order of their names, then its
/// subdirectories. The root's time becomes 0: it changes whenever somebody touches the directory's own entries.
pub(crate) fn read_directory(
    root: &Path,
    destination: Option<&Path>,
    tree: &mut Tree,
    packer: &mut Packer<'_>,
    options: &Options,
    progress: &dyn Progress,
) -> Result<(), MkfsError> {
    let open = |path: &Path| {
        // The root itself may be given as a symlink.
        fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| MkfsError::io("open directory", path, e))
    };
    let fd = open(root)?;
    let stat = fs::fstat(&fd).map_err(|e| MkfsError::io("read the attributes of", root, e))?;
    let destination = match destination {
        Some(path) => {
            let fd = open(path)?;
            let stat = fs::fstat(&fd).map_err(|e| MkfsError::io("read the attributes of", path, e))?;
            Some((stat.st_dev, stat.st_ino))
        }
        None => None,
    };
    let mut reader = Reader {
        tree,
        packer,
        progress,
        xattrs: options.unsupported_xattrs,
        destination,
        links: HashMap::new(),
    };
    reader.check_destination(&stat, root)?;
    let mut meta = reader.meta(&fd, c".", root, &stat)?;
    (meta.mtime, meta.mtime_nsec) = (0, 0);
    let id = reader.tree.root();
    reader.tree.get_mut(id).meta = meta;
    let parent = Rc::new(fd);
    let mut todo = vec![Todo { id, parent, name: c".".to_owned(), path: root.to_owned(), stat }];
    // Depth first, in order: the last pushed comes first.
    while let Some(directory) = todo.pop() {
        let first = todo.len();
        reader.directory(directory, &mut todo)?;
        todo[first..].reverse();
    }
    Ok(())
}

/// What differs when a file was touched while it was read.
fn identity(stat: &Stat) -> (u64, u64, i64, i64, u64, i64, u64) {
    (
        stat.st_dev,
        stat.st_ino,
        stat.st_size,
        stat.st_mtime,
        stat.st_mtime_nsec,
        stat.st_ctime,
        stat.st_ctime_nsec,
    )
}

impl Reader<'_, '_> {
    fn check_destination(&self, stat: &Stat, path: &Path) -> Result<(), MkfsError> {
        if self.destination == Some((stat.st_dev, stat.st_ino)) {
            return Err(file_error(path, EntryProblem::DestinationInside));
        }
        Ok(())
    }

    fn directory(&mut self, directory: Todo, todo: &mut Vec<Todo>) -> Result<(), MkfsError> {
        let Todo { id, parent, name, path, stat } = directory;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = fs::openat(&*parent, &*name, flags, Mode::empty())
            .map_err(|e| gone_or("open directory", &path, e))?;
        let now = fs::fstat(&fd).map_err(|e| MkfsError::io("read the attributes of", &path, e))?;
        if identity(&now) != identity(&stat) {
            return Err(file_error(&path, EntryProblem::Changed));
        }
        let fd = Rc::new(fd);
        let mut children = BTreeMap::new();
        for name in list(&fd, &path)? {
            let child_path = path.join(std::ffi::OsStr::from_bytes(name.as_bytes()));
            check_name(name.as_bytes()).map_err(|problem| file_error(&child_path, problem))?;
            let stat = fs::statat(&*fd, &*name, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|e| gone_or("read the attributes of", &child_path, e))?;
            let id = self.file(&fd, &name, &child_path, &stat)?;
            children.insert(name.as_bytes().to_vec(), id);
            if self.tree.children(id).is_some() {
                todo.push(Todo { id, parent: Rc::clone(&fd), name, path: child_path, stat });
            }
            self.progress.advance(0, 1);
        }
        *self.tree.children_mut(id).expect("only directories are on the list") = children;
        let after = fs::fstat(&*fd).map_err(|e| MkfsError::io("read the attributes of", &path, e))?;
        if identity(&after) != identity(&stat) {
            return Err(file_error(&path, EntryProblem::Changed));
        }
        Ok(())
    }

    fn file(&mut self, dir: &OwnedFd, name: &CStr, path: &Path, stat: &Stat) -> Result<InodeId, MkfsError> {
        let problem = |problem| file_error(path, problem);
        let kind = FileType::from_raw_mode(stat.st_mode);
        let key = (stat.st_dev, stat.st_ino);
        if kind == FileType::RegularFile
            && let Some(&id) = self.links.get(&key)
        {
            return Ok(id);
        }
        let rdev = || {
            let (major, minor) = (fs::major(stat.st_rdev), fs::minor(stat.st_rdev));
            device_number(major, minor).map_err(problem)
        };
        let body = match kind {
            FileType::Directory => {
                self.check_destination(stat, path)?;
                Body::Directory(BTreeMap::new())
            }
            FileType::RegularFile => self.data(dir, name, path, stat)?,
            FileType::Symlink => {
                let target = fs::readlinkat(dir, name, Vec::new())
                    .map_err(|e| gone_or("read the symlink", path, e))?;
                Body::symlink(target.into_bytes()).map_err(problem)?
            }
            FileType::CharacterDevice => Body::Char(rdev()?),
            FileType::BlockDevice => Body::Block(rdev()?),
            FileType::Fifo => Body::Fifo,
            FileType::Socket => Body::Socket,
            FileType::Unknown => {
                return Err(problem(EntryProblem::Header(format!("unknown file type {:o}", stat.st_mode))));
            }
        };
        let meta = self.meta(dir, name, path, stat)?;
        let id = self.tree.add(Inode { meta, body });
        if kind == FileType::RegularFile && stat.st_nlink > 1 {
            self.links.insert(key, id);
        }
        Ok(id)
    }

    fn data(&mut self, dir: &OwnedFd, name: &CStr, path: &Path, stat: &Stat) -> Result<Body, MkfsError> {
        // Not to wait if a fifo has taken the name, and not to follow a symlink that has.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = fs::openat(dir, name, flags, Mode::empty()).map_err(|e| gone_or("open", path, e))?;
        let changed = || file_error(path, EntryProblem::Changed);
        let same = |fd: &File| match fs::fstat(fd) {
            Ok(now) if identity(&now) == identity(stat) => Ok(()),
            Ok(_) => Err(changed()),
            Err(e) => Err(MkfsError::io("read the attributes of", path, e)),
        };
        let mut file = File::from(fd);
        same(&file)?;
        let size = u64::try_from(stat.st_size).map_err(|_| changed())?;
        let mut data = self.packer.file(size)?;
        let progress = self.progress;
        let fault = |error| match error {
            DataError::Pack(error) => error,
            DataError::Read(source) => MkfsError::io("read", path, source),
            DataError::Short => changed(),
        };
        let is_sparse = u64::try_from(stat.st_blocks).is_ok_and(|blocks| blocks.saturating_mul(512) < size);
        let mut at = 0;
        while at < size {
            let (start, end) = if is_sparse { next_data(&file, at, size) } else { Ok((at, size)) }
                .map_err(|e| MkfsError::io("look for holes in", path, e))?;
            data.zeros(start - at).map_err(fault)?;
            progress.advance(start - at, 0);
            if is_sparse {
                file.seek(SeekFrom::Start(start)).map_err(|e| MkfsError::io("read", path, e))?;
            }
            let mut counted = Counted { file: &mut file, progress };
            data.read(&mut counted, end - start).map_err(fault)?;
            at = end;
        }
        let data = data.finish().map_err(fault)?;
        same(&file)?;
        Ok(Body::Regular { size, data })
    }

    fn meta(&self, dir: &OwnedFd, name: &CStr, path: &Path, stat: &Stat) -> Result<Meta, MkfsError> {
        let raw = read_xattrs(dir, name).map_err(|e| gone_or("read the extended attributes of", path, e))?;
        Ok(Meta {
            permissions: u16::try_from(stat.st_mode & 0o7777).expect("masked to 12 bits"),
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: stat.st_mtime,
            mtime_nsec: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
            xattrs: make_xattrs(raw, self.xattrs).map_err(|problem| file_error(path, problem))?,
        })
    }
}

/// Tells the progress about every read.
struct Counted<'c> {
    file: &'c mut File,
    progress: &'c dyn Progress,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.progress.advance(u64::try_from(n).unwrap_or(0), 0);
        Ok(n)
    }
}

/// The next range with data at or behind `at`; an empty one at `size` when only a hole is left.
fn next_data(file: &File, at: u64, size: u64) -> Result<(u64, u64), Errno> {
    let start = match fs::seek(file, fs::SeekFrom::Data(at)) {
        Ok(start) => start.clamp(at, size),
        Err(Errno::NXIO) => return Ok((size, size)),
        // No such thing on this file system: all of it is data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok((at, size)),
        Err(e) => return Err(e),
    };
    let end = match fs::seek(file, fs::SeekFrom::Hole(start)) {
        Ok(end) => end.clamp(start, size),
        Err(Errno::NXIO) => size,
        Err(e) => return Err(e),
    };
    // A file that shrinks meanwhile gives no progress; the data is then found to be too short.
    if start == at && end == at { Ok((at, size)) } else { Ok((start, end)) }
}

fn file_error(path: &Path, problem: EntryProblem) -> MkfsError {
    MkfsError::File { path: path.to_owned(), problem }
}

/// A name that was there a moment ago and is not, or is something else now, means that somebody writes to the tree.
fn gone_or(doing: &'static str, path: &Path, error: Errno) -> MkfsError {
    match error {
        Errno::NOENT | Errno::LOOP | Errno::NOTDIR => file_error(path, EntryProblem::Changed),
        error => MkfsError::io(doing, path, error),
    }
}

/// All names of a directory but `.` and `..`, in byte order.
fn list(fd: &OwnedFd, path: &Path) -> Result<Vec<CString>, MkfsError> {
    let fail = |e: Errno| MkfsError::io("list directory", path, e);
    let mut buffer = Box::new([const { MaybeUninit::uninit() }; 32 << 10]);
    let mut names = Vec::new();
    let mut entries = RawDir::new(fd.as_fd(), &mut buffer[..]);
    while let Some(entry) = entries.next() {
        let entry = entry.map_err(fail)?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// All extended attributes of a file of any kind. There is no such call relative to a directory before Linux 6.13, so
/// the path goes through the directory's descriptor; the last name is not followed.
fn read_xattrs(dir: &OwnedFd, name: &CStr) -> Result<Vec<RawXattr>, Errno> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend_from_slice(name.to_bytes());
    let path = path.as_slice();
    let names = grow(|buffer| fs::llistxattr(path, buffer));
    let names = match names {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(Vec::new()),
        names => names?,
    };
    let mut xattrs = Vec::new();
    for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        match grow(|buffer| fs::lgetxattr(path, name, buffer)) {
            Ok(value) => xattrs.push((name.to_vec(), value)),
            // Listed, but not readable by us or not there any more: `security.*` names that a module makes up.
            Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(xattrs)
}

/// Calls with a larger buffer until the answer fits.
fn grow(call: impl Fn(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0; 256];
    loop {
        match call(&mut buffer) {
            Ok(len) => {
                buffer.truncate(len);
                return Ok(buffer);
            }
            // The kernel's limit for lists and values is 64 KiB.
            Err(Errno::RANGE) if buffer.len() < 1 << 20 => buffer.resize(buffer.len() * 4, 0),
            Err(e) => return Err(e),
        }
    }
}
