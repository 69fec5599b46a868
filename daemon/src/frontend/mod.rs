//! The kernel's ways to ask for data. Nothing outside this folder knows a kernel interface.

pub(crate) mod fanotify;
pub(crate) mod fscache;

use std::fmt;
use std::path::PathBuf;

use skimmer_cachefiles::Device;
use skimmer_keeper::client::{Keeper, Welcome};

use crate::blob::BlobId;

/// How the kernel asks for data ("attach mode").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// EROFS over fscache: READ messages on `/dev/cachefiles`.
    Fscache,
    /// File-backed EROFS: pre-content events on the sparse blob file.
    Fanotify,
}

impl Mode {
    /// The name in messages, metrics and the API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fscache => "fscache",
            Self::Fanotify => "fanotify",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What an fscache cookie stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CookieRole {
    /// A bootstrap: its cache file was filled before the mount. `path` is the same file on local disk, for ranges
    /// that turn out to be missing all the same; `size` in bytes is what the kernel is told, the same every time.
    Bootstrap {
        /// Bytes of the bootstrap.
        size: u64,
        /// The bootstrap on local disk.
        path: PathBuf,
    },
    /// A blob that is filled on demand; its size is the device size of the [`crate::blob::BlobSpec`].
    Blob(BlobId),
}

/// Where the cachefiles device comes from and how to bind it.
pub struct FscacheSetup {
    /// The cache directory (`dir`), which will hold `cache/` and `graveyard/`.
    pub dir: PathBuf,
    /// The cache's name (`tag`).
    pub tag: String,
    /// The device: `None` asks the keeper for it, which keeps its own descriptor of it; `Some` is used as it is.
    /// Either way it is bound, or restored when it was bound already.
    pub device: Option<Device>,
}

/// What connects a driver to the kernel.
#[derive(Default)]
pub struct Frontends {
    /// The keeper, connected, with what it told at that moment. Without it no blob can be watched, and the
    /// cachefiles device must be given in [`FscacheSetup::device`].
    pub keeper: Option<(Keeper, Welcome)>,
}
