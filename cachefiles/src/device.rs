//! The device descriptor: commands go in, requests come out.

use crate::message::{self, Body, Header, MessageError};
use crate::sys;
use crate::token::{ObjectId, OpenToken, ReadToken, reject};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Where the device is.
pub const DEVICE_PATH: &str = "/dev/cachefiles";
/// Longest command the kernel takes in one write.
const COMMAND_MAX: usize = 4095;

/// Failures of the device, with the remedy.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No such device.
    #[error("{}: {source}: the kernel offers no cachefiles device; load the module (modprobe cachefiles) or use another attach mode", path.display())]
    Missing {
        /// Device.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Not allowed.
    #[error("{}: {source}: opening the device needs root (CAP_SYS_ADMIN in the initial user namespace)", path.display())]
    Denied {
        /// Device.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Somebody else has it.
    #[error("{}: {source}: another process has the device open, and only one can; stop the other daemon (cachefilesd, nydusd, another skimmerd or skimmer-keeper), or close its leftover object descriptors", path.display())]
    Busy {
        /// Device.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Any other failure to open it.
    #[error("{}: {source}", path.display())]
    Open {
        /// Device.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// A command was refused.
    #[error("cachefiles command {command:?}: {source}{}", hint(command, source))]
    Command {
        /// The command line.
        command: String,
        /// Cause.
        source: io::Error,
    },
    /// A command that cannot be written: a path with a newline, or too long.
    #[error("cachefiles command {0:?} cannot be given: it holds a newline or NUL, or is over 4095 bytes")]
    BadCommand(String),
    /// Limits out of order.
    #[error("cache limits {name}: run {run}%, cull {cull}%, stop {stop}%: must be stop < cull < run < 100")]
    Limits {
        /// `b` or `f`.
        name: char,
        /// Run.
        run: u8,
        /// Cull.
        cull: u8,
        /// Stop.
        stop: u8,
    },
    /// Reading a request failed.
    #[error("reading a request from the cachefiles device: {0}")]
    Read(#[source] io::Error),
    /// A request that makes no sense. It has been failed where that was possible.
    #[error("{0}")]
    Message(#[from] MessageError),
    /// An OPEN came with a descriptor that is not open in this process. It has been rejected.
    #[error("cachefiles OPEN {msg_id} came with descriptor {fd}, which is not open here: {source}")]
    Descriptor {
        /// Request.
        msg_id: u32,
        /// Number.
        fd: i32,
        /// Cause.
        source: io::Error,
    },
    /// A READ of an object that is not open here. The kernel asks again after [`Device::restore`].
    #[error(
        "cachefiles READ {msg_id} is for object {object}, which is not open here; `restore` makes the kernel ask again"
    )]
    UnknownObject {
        /// Request.
        msg_id: u32,
        /// Object.
        object: ObjectId,
    },
}

impl DeviceError {
    /// The kernel's error number, where there is one.
    #[must_use]
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Missing { source, .. }
            | Self::Denied { source, .. }
            | Self::Busy { source, .. }
            | Self::Open { source, .. }
            | Self::Command { source, .. }
            | Self::Descriptor { source, .. }
            | Self::Read(source) => source.raw_os_error(),
            _ => None,
        }
    }
}

/// What the kernel means by refusing a command.
fn hint(command: &str, source: &io::Error) -> &'static str {
    let word = command.split(' ').next().unwrap_or_default();
    match (word, source.raw_os_error().map(Errno::from_raw_os_error)) {
        ("bind", Some(Errno::INVAL)) => {
            " (this kernel's cachefiles has no on-demand mode: CONFIG_CACHEFILES_ONDEMAND)"
        }
        ("bind", Some(Errno::BUSY)) => " (the device is bound already)",
        ("bind", Some(Errno::OPNOTSUPP)) => {
            " (the cache directory's file system lacks something: use ext4 or XFS)"
        }
        ("dir" | "tag", Some(Errno::EXIST)) => " (given before on this descriptor)",
        ("restore", Some(Errno::OPNOTSUPP)) => {
            " (the device is not bound on demand, or the kernel is older than 6.1.95 / 6.8)"
        }
        (_, Some(Errno::IO)) => " (the cache is dead after an I/O error on its file system; see dmesg)",
        _ => "",
    }
}

/// When the kernel asks for culling and stops to write, in percent of free space. The kernel's own defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Free blocks at which culling stops.
    pub brun: u8,
    /// Free blocks at which culling is asked for.
    pub bcull: u8,
    /// Free blocks under which nothing is written any more.
    pub bstop: u8,
    /// The same for free inodes.
    pub frun: u8,
    /// The same for free inodes.
    pub fcull: u8,
    /// The same for free inodes.
    pub fstop: u8,
}

impl Default for Limits {
    fn default() -> Self {
        Self { brun: 7, bcull: 5, bstop: 1, frun: 7, fcull: 5, fstop: 1 }
    }
}

/// What a cache is bound with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindOptions {
    /// The cache directory, absolute; looked up in the caller's mount namespace.
    pub dir: PathBuf,
    /// Name of the cache.
    pub tag: String,
    /// Limits.
    pub limits: Limits,
}

impl BindOptions {
    /// A cache in that directory, named `skimmer`.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), tag: "skimmer".into(), limits: Limits::default() }
    }
}

/// How a READ is reported done; a stand-in for the kernel puts its own here.
pub trait CompleteRead: Send + Sync {
    /// Reports that the READ `msg_id` is done, through a descriptor of its object.
    ///
    /// # Errors
    /// As the kernel's `CACHEFILES_IOC_READ_COMPLETE`: `EINVAL` for a request that does not wait.
    fn complete(&self, anon: BorrowedFd<'_>, msg_id: u32) -> io::Result<()>;
}

struct Kernel;

impl CompleteRead for Kernel {
    fn complete(&self, anon: BorrowedFd<'_>, msg_id: u32) -> io::Result<()> {
        sys::read_complete(anon, msg_id)
    }
}

/// What device, tokens and objects share.
pub(crate) struct Shared {
    fd: OwnedFd,
    complete: Box<dyn CompleteRead>,
    /// Descriptors of the open objects, owned elsewhere.
    objects: Mutex<HashMap<ObjectId, Weak<OwnedFd>>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("fd", &self.fd).finish_non_exhaustive()
    }
}

impl Shared {
    /// Writes one command; the kernel takes it whole or not at all.
    pub(crate) fn command(&self, command: &[u8]) -> io::Result<()> {
        let written = rustix::io::retry_on_intr(|| rustix::io::write(&self.fd, command))?;
        if written == command.len() { Ok(()) } else { Err(Errno::IO.into()) }
    }

    pub(crate) fn read_complete(&self, anon: BorrowedFd<'_>, msg_id: u32) -> io::Result<()> {
        self.complete.complete(anon, msg_id)
    }

    pub(crate) fn remember(&self, object: ObjectId, fd: &Arc<OwnedFd>) {
        self.objects().insert(object, Arc::downgrade(fd));
    }

    /// Forgets the object unless its number has come to mean another descriptor since.
    pub(crate) fn forget(&self, object: ObjectId, fd: &Arc<OwnedFd>) {
        let mut objects = self.objects();
        if objects.get(&object).is_some_and(|known| known.as_ptr() == Arc::as_ptr(fd)) {
            objects.remove(&object);
        }
    }

    fn objects(&self) -> MutexGuard<'_, HashMap<ObjectId, Weak<OwnedFd>>> {
        // A map of weak references has no state that a panic elsewhere could have left half done.
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request of the kernel.
#[derive(Debug)]
pub enum Request {
    /// An object is opened: answer at once, the mount waits unkillably.
    Open(OpenToken),
    /// A range is missing.
    Read(ReadToken),
    /// The object is done with: drop its [`Object`](crate::Object) and everything else that holds its descriptor.
    Close {
        /// Which object.
        object: ObjectId,
    },
}

/// Opens the device for a process that only holds it, see [`Device::open_path`].
///
/// # Errors
/// [`DeviceError`] names the device and the remedy.
pub fn open_fd(path: &Path) -> Result<OwnedFd, DeviceError> {
    let opened = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    opened.map_err(|errno| {
        let (path, source) = (path.to_owned(), errno.into());
        match errno {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => DeviceError::Missing { path, source },
            Errno::ACCESS | Errno::PERM => DeviceError::Denied { path, source },
            Errno::BUSY => DeviceError::Busy { path, source },
            _ => DeviceError::Open { path, source },
        }
    })
}

/// The device, open. The cache lives as long as some process has it open.
#[derive(Debug)]
pub struct Device {
    shared: Arc<Shared>,
    buffer: Box<[u8; message::MAX_LEN]>,
}

impl Device {
    /// Opens `/dev/cachefiles`.
    ///
    /// # Errors
    /// [`DeviceError`] names the device and the remedy.
    pub fn open() -> Result<Self, DeviceError> {
        Self::open_path(Path::new(DEVICE_PATH))
    }

    /// Opens the device at another path.
    ///
    /// # Errors
    /// [`DeviceError`] names the device and the remedy.
    pub fn open_path(path: &Path) -> Result<Self, DeviceError> {
        open_fd(path).map(Self::from_fd)
    }

    /// Takes over a device that another process, the keeper, opened.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self::with_completion(fd, Box::new(Kernel))
    }

    /// A device on any descriptor that yields one message per `read` and takes one command per `write`: for tests.
    #[must_use]
    pub fn with_completion(fd: OwnedFd, complete: Box<dyn CompleteRead>) -> Self {
        let shared = Shared { fd, complete, objects: Mutex::new(HashMap::new()) };
        Self { shared: Arc::new(shared), buffer: Box::new([0; message::MAX_LEN]) }
    }

    /// Sets directory, name and limits and binds the cache in on-demand mode. Before this a mount fails.
    ///
    /// # Errors
    /// [`DeviceError::Command`] names the command that was refused.
    pub fn bind(&self, options: &BindOptions) -> Result<(), DeviceError> {
        let limits = &options.limits;
        check_limits('b', limits.brun, limits.bcull, limits.bstop)?;
        check_limits('f', limits.frun, limits.fcull, limits.fstop)?;
        self.command(&[b"dir ", options.dir.as_os_str().as_bytes()].concat())?;
        self.command(format!("tag {}", options.tag).as_bytes())?;
        let commands = [
            ("brun", limits.brun),
            ("bcull", limits.bcull),
            ("bstop", limits.bstop),
            ("frun", limits.frun),
            ("fcull", limits.fcull),
            ("fstop", limits.fstop),
        ];
        for (word, percent) in commands {
            self.command(format!("{word} {percent}%").as_bytes())?;
        }
        self.command(b"bind ondemand")
    }

    /// Makes the kernel deliver all pending requests again: the first thing to do with a device taken over from a
    /// daemon that died. On a device that is not bound yet this is `EOPNOTSUPP`.
    ///
    /// # Errors
    /// [`DeviceError::Command`].
    pub fn restore(&self) -> Result<(), DeviceError> {
        self.command(b"restore")
    }

    /// Brings a device that was taken over into service: restores it when it is bound, binds it when not. True when
    /// it was bound already.
    ///
    /// # Errors
    /// [`DeviceError::Command`].
    pub fn restore_or_bind(&self, options: &BindOptions) -> Result<bool, DeviceError> {
        match self.restore() {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => {
                self.bind(options).map(|()| false)
            }
            Err(error) => Err(error),
        }
    }

    /// Writes one command.
    fn command(&self, command: &[u8]) -> Result<(), DeviceError> {
        let text = || String::from_utf8_lossy(command).into_owned();
        if command.len() > COMMAND_MAX || command.iter().any(|&byte| byte == b'\n' || byte == 0) {
            return Err(DeviceError::BadCommand(text()));
        }
        self.shared.command(command).map_err(|source| DeviceError::Command { command: text(), source })
    }

    /// The next request, or `None` when nothing waits. Never blocks; poll the descriptor for readability.
    ///
    /// # Errors
    /// [`DeviceError`]; all but [`DeviceError::Read`] concern one request only, so go on after them.
    pub fn next_request(&mut self) -> Result<Option<Request>, DeviceError> {
        let read = rustix::io::retry_on_intr(|| rustix::io::read(&self.shared.fd, &mut self.buffer[..]));
        let len = match read {
            // The kernel says 0 when nothing waits, a stand-in may say EAGAIN.
            Ok(0) | Err(Errno::AGAIN) => return Ok(None),
            Ok(len) => len,
            Err(errno) => return Err(DeviceError::Read(errno.into())),
        };
        let message = match message::decode(&self.buffer[..len]) {
            Ok(message) => message,
            Err(error) => {
                self.fail_malformed(&error);
                return Err(error.into());
            }
        };
        let (msg_id, object) = (message.msg_id, ObjectId(message.object_id));
        match message.body {
            Body::Open(open) => match sys::adopt(open.fd) {
                Ok(fd) => {
                    let token = OpenToken::new(Arc::clone(&self.shared), msg_id, object, open, fd);
                    Ok(Some(Request::Open(token)))
                }
                Err(errno) => {
                    let _ = reject(&self.shared, msg_id, Errno::BADF);
                    Err(DeviceError::Descriptor { msg_id, fd: open.fd, source: errno.into() })
                }
            },
            Body::Read { offset, len } => match self.shared.objects().get(&object) {
                Some(fd) => {
                    let fd = Weak::clone(fd);
                    let token = ReadToken::new(Arc::clone(&self.shared), msg_id, object, offset, len, fd);
                    Ok(Some(Request::Read(token)))
                }
                None => Err(DeviceError::UnknownObject { msg_id, object }),
            },
            Body::Close => Ok(Some(Request::Close { object })),
        }
    }

    /// Answers a request that could not be understood, as far as its header tells how.
    fn fail_malformed(&self, error: &MessageError) {
        let Some(header) = error.header else { return };
        match header.opcode {
            Header::OPEN => {
                let fd = error.fd.map(sys::adopt);
                let _ = reject(&self.shared, header.msg_id, Errno::INVAL);
                drop(fd);
            }
            Header::READ => {
                let fd = self.shared.objects().get(&ObjectId(header.object_id)).and_then(Weak::upgrade);
                if let Some(fd) = fd {
                    let _ = self.shared.read_complete(fd.as_fd(), header.msg_id);
                }
            }
            _ => {}
        }
    }
}

impl AsFd for Device {
    /// Readable when a request waits, writable when the kernel wants culling.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.fd.as_fd()
    }
}

fn check_limits(name: char, run: u8, cull: u8, stop: u8) -> Result<(), DeviceError> {
    if stop < cull && cull < run && run < 100 {
        Ok(())
    } else {
        Err(DeviceError::Limits { name, run, cull, stop })
    }
}
