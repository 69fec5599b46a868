//! Why a request of the control API could not be fulfilled, in words for the person who made it.

use std::{fmt, io};

/// What helps where a file cannot be made for want of room.
pub(super) const MAKE_ROOM: &str =
    "free space or inodes on the file system of the root directory (see df and df -i)";

/// Whether there was no room for it.
pub(super) fn is_full(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::NOSPC, Errno::DQUOT].iter().any(|e| error.raw_os_error() == Some(e.raw_os_error()))
}

/// What kind of failure it is; the control API makes an HTTP status of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request makes no sense.
    BadRequest,
    /// What it names is not there.
    NotFound,
    /// It is at odds with what is mounted.
    Conflict,
    /// The image is not what it has to be.
    BadImage,
    /// This node cannot do it.
    Unavailable,
    /// The image's source failed.
    Source,
    /// Anything else.
    Internal,
}

/// A failure and its remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What kind.
    pub kind: Kind,
    /// What and where.
    pub message: String,
    /// What to do.
    pub remedy: Option<String>,
}

impl Failure {
    /// Nothing of ours is mounted there.
    pub(super) fn not_mounted(target: &std::path::Path) -> Self {
        Self::new(Kind::NotFound, format!("no image is mounted on {}", target.display()))
            .remedy("`skimmer status` lists the mounts")
    }

    /// A failure without a remedy.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), remedy: None }
    }

    /// Adds a remedy.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<crate::store::StoreError> for Failure {
    fn from(error: crate::store::StoreError) -> Self {
        let full = matches!(&error, crate::store::StoreError::Io { source, .. } if is_full(source));
        let failure = Self::new(Kind::Internal, error.to_string());
        if full { failure.remedy(MAKE_ROOM) } else { failure }
    }
}

impl From<crate::driver::DriverError> for Failure {
    fn from(error: crate::driver::DriverError) -> Self {
        use crate::driver::DriverError as E;
        let kind = match &error {
            E::Spec(_) => Kind::BadImage,
            E::Busy { .. } => Kind::Conflict,
            E::Unavailable { .. } | E::Stopped => Kind::Unavailable,
            _ => Kind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<super::kernel::MountError> for Failure {
    fn from(error: super::kernel::MountError) -> Self {
        use rustix::io::Errno;
        let failure = Self::new(Kind::Internal, error.to_string());
        match error.errno {
            Errno::PERM | Errno::ACCESS => failure.remedy("run skimmerd as root, in the initial user namespace"),
            Errno::NODEV => failure.remedy("load the erofs module: modprobe erofs"),
            Errno::NOTBLK => failure.remedy(
                "file-backed mounts need Linux 6.12 and a root directory on a plain file system (not overlayfs)",
            ),
            Errno::NOBUFS => failure.remedy("see the kernel log; the cache directory may be full"),
            _ => failure.remedy("see the kernel log (dmesg)"),
        }
    }
}

/// A blocking task that panicked or was cancelled.
impl From<tokio::task::JoinError> for Failure {
    fn from(error: tokio::task::JoinError) -> Self {
        Self::new(Kind::Internal, format!("a task of the daemon ended early: {error}"))
    }
}
