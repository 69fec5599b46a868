//! What lies on disk: bootstraps, blob files, what of them is ready, and the records that a restart needs.
//!
//! ```text
//! ROOT/lock                    who owns the root
//! ROOT/bootstraps/<hex>        whole bootstraps, named by their SHA-256
//! ROOT/blobs/<hex>             sparse blob files (fanotify)
//! ROOT/blobs/<hex>.chunks      the chunks that mounted images claimed, and their digests
//! ROOT/blobs/<hex>.ready       which chunks are durable and verified
//! ROOT/blobs/<hex>.cached      the same for the cache file of fscache
//! ROOT/fscache/                the directory of cachefiles
//! ROOT/images/<hex>.json       where an image's blobs come from
//! ROOT/mounts.json             live mounts
//! ```
//!
//! Rule of the whole folder: data is durable before anything says that it is there.

pub mod atomic;
pub mod blobs;
pub mod bootstraps;
pub mod claims;
pub mod fscache;
pub mod held;
pub mod journal;
pub mod lock;
pub mod ranges;
pub mod ready;
pub mod records;
pub mod scrub;

use std::io;
use std::path::{Path, PathBuf};

use crate::blob::BlobId;
use crate::frontend::Mode;

/// Why the store cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The system refused.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried, as in `cannot write`.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Another daemon owns the root.
    #[error("{} is in use by another skimmerd (pid {pid})", root.display())]
    Locked {
        /// The root.
        root: PathBuf,
        /// The other daemon, as it wrote itself down; `unknown` when it did not get to it.
        pid: String,
    },
    /// A file is not what its name says.
    #[error("{}: {what}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

impl StoreError {
    pub(crate) fn io(what: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io { what, path: path.into(), source: source.into() }
    }

    pub(crate) fn corrupt(path: &Path, what: impl Into<String>) -> Self {
        Self::Corrupt { path: path.into(), what: what.into() }
    }
}

/// The root directory, locked for this process.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    _lock: lock::RootLock,
}

impl Store {
    /// Makes the folders that are missing and takes the lock.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another daemon has it.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        for dir in ["", "bootstraps", "blobs", "images", "fscache"] {
            let path = root.join(dir);
            make_dir(&path)?;
        }
        let lock = lock::RootLock::take(root)?;
        let store = Self { root: root.into(), _lock: lock };
        for dir in ["bootstraps", "blobs", "images"] {
            atomic::sweep(&store.root.join(dir))?;
        }
        atomic::sweep(&store.root)?;
        Ok(store)
    }

    /// The root directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes everything on the root's file system durable, whoever wrote it.
    ///
    /// # Errors
    /// [`StoreError::Io`]; also when an earlier write back of some file there failed.
    pub fn sync_all(&self) -> Result<(), StoreError> {
        let sync = || rustix::fs::syncfs(std::fs::File::open(&self.root)?).map_err(io::Error::from);
        sync().map_err(|error| StoreError::io("cannot write back", &self.root, error))
    }

    /// The sparse file of a blob.
    pub fn blob_path(&self, blob: BlobId) -> PathBuf {
        self.root.join("blobs").join(blob.hex())
    }

    /// The file that a mode keeps a blob's data in.
    ///
    /// # Errors
    /// [`StoreError::Io`]: the kernel takes no such name.
    pub fn data_path(&self, mode: Mode, blob: BlobId) -> Result<PathBuf, StoreError> {
        match mode {
            Mode::Fanotify => Ok(self.blob_path(blob)),
            Mode::Fscache => self.cache_path(&blob.hex()),
        }
    }

    /// The chunk claims of a blob.
    pub fn claims_path(&self, blob: BlobId) -> PathBuf {
        self.root.join("blobs").join(format!("{blob}.chunks"))
    }

    /// The bootstrap with this SHA-256, in hex.
    pub fn bootstrap_path(&self, bootstrap: &str) -> PathBuf {
        self.root.join("bootstraps").join(bootstrap)
    }

    /// The directory that cachefiles binds.
    pub fn fscache_dir(&self) -> PathBuf {
        self.root.join("fscache")
    }
}

fn make_dir(path: &Path) -> Result<(), StoreError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| StoreError::io("cannot create the directory", path, error))
}
