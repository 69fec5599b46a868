//! What a node can do, found out by trying.

use crate::device::{BindOptions, DEVICE_PATH, Device, DeviceError};
use rustix::io::Errno;
use rustix::mount::FsOpenFlags;
use std::io;
use std::path::{Path, PathBuf};

/// What the device turned out to be able to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSupport {
    /// A daemon that dies can be succeeded: the kernel knows `restore` (6.1.95, 6.8).
    pub restore: bool,
}

/// Why a probe says no.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The device cannot be used; [`DeviceError::Busy`] also means that it is in use, maybe by our own keeper.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// EROFS itself is missing.
    #[error("erofs: {0}: the kernel has no EROFS file system; load the module (modprobe erofs)")]
    NoErofs(#[source] io::Error),
    /// EROFS without fscache.
    #[error(
        "erofs: this kernel's EROFS has no fsid mount option (CONFIG_EROFS_FS_ONDEMAND, 5.19 to 7.1): {0}"
    )]
    NoFsid(String),
    /// The probe itself could not be carried out.
    #[error("{what}: {source}")]
    Io {
        /// Step.
        what: String,
        /// Cause.
        source: io::Error,
    },
}

/// Binds a cache in a scratch directory below `dir`, asks what there is to ask, and takes it down again. The file
/// system of `dir` is judged too. Fails while somebody uses the device.
///
/// # Errors
/// [`ProbeError`] says what is missing.
pub fn device(dir: &Path) -> Result<DeviceSupport, ProbeError> {
    device_at(Path::new(DEVICE_PATH), dir)
}

fn device_at(path: &Path, dir: &Path) -> Result<DeviceSupport, ProbeError> {
    let device = Device::open_path(path)?;
    let scratch = Scratch::new(dir)?;
    let mut options = BindOptions::new(&scratch.0);
    options.tag = "skimmer-probe".into();
    let bound = device.bind(&options);
    let restore = bound.and_then(|()| match device.restore() {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => Ok(false),
        Err(error) => Err(error),
    });
    // Closing the device withdraws the cache; only then is the directory free.
    drop(device);
    Ok(DeviceSupport { restore: restore? })
}

struct Scratch(PathBuf);

impl Scratch {
    fn new(dir: &Path) -> Result<Self, ProbeError> {
        let path = dir.join(format!(".skimmer-probe-{}", std::process::id()));
        let made = std::fs::create_dir(&path);
        made.map_err(|source| ProbeError::Io { what: format!("making {}", path.display()), source })?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!("removing {}: {error}", self.0.display());
        }
    }
}

/// Asks EROFS whether it takes `fsid=`, without mounting anything.
///
/// # Errors
/// [`ProbeError::NoErofs`], [`ProbeError::NoFsid`].
pub fn erofs_fsid() -> Result<(), ProbeError> {
    let io = |what: &str, errno: Errno| ProbeError::Io { what: what.into(), source: errno.into() };
    let context = match rustix::mount::fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(context) => context,
        Err(Errno::NODEV) => return Err(ProbeError::NoErofs(Errno::NODEV.into())),
        Err(errno) => return Err(io("fsopen erofs", errno)),
    };
    let set = rustix::mount::fsconfig_set_string(&context, "fsid", "skimmer-probe");
    // An EROFS built without the option takes it, and only says so in the context's log.
    let log = read_log(&context);
    match set {
        Ok(()) if !log.contains("not supported") => Ok(()),
        Ok(()) => Err(ProbeError::NoFsid(log)),
        Err(Errno::INVAL) if log.is_empty() => Err(ProbeError::NoFsid("unknown parameter".into())),
        Err(Errno::INVAL) => Err(ProbeError::NoFsid(log)),
        Err(errno) => Err(io("fsconfig erofs fsid", errno)),
    }
}

/// The messages of a file system context, joined.
fn read_log(context: &std::os::fd::OwnedFd) -> String {
    let mut log = Vec::new();
    // The kernel keeps the last eight.
    for _ in 0..16 {
        let mut line = [0; 512];
        match rustix::io::read(context, &mut line[..]) {
            Ok(len) => log.push(String::from_utf8_lossy(&line[..len]).trim().to_owned()),
            Err(_) => break,
        }
    }
    log.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_named_with_its_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cachefiles");
        let error = device_at(&path, dir.path()).unwrap_err();
        assert!(matches!(error, ProbeError::Device(DeviceError::Missing { .. })));
        let text = error.to_string();
        assert!(text.contains(path.to_str().unwrap()) && text.contains("modprobe cachefiles"), "{text}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn erofs_answers_yes_or_says_why_not() {
        match erofs_fsid() {
            Ok(()) => {}
            Err(error @ (ProbeError::NoErofs(_) | ProbeError::NoFsid(_))) => {
                assert!(!error.to_string().is_empty())
            }
            Err(ProbeError::Io { what, source }) if source.kind() == io::ErrorKind::PermissionDenied => {
                skimmer_test_support::skip_this(&format!("{what} needs root: {source}"));
            }
            Err(error) => panic!("{error}"),
        }
    }
}
