//! One snapshot: what is recorded of it, and where its parts lie.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::images::ImageName;
use crate::labels::Labels;
use crate::usage::Usage;

/// What a snapshot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// Read only, on top of its parent.
    View,
    /// Writable, on top of its parent.
    Active,
    /// Done: others can stand on it.
    Committed,
}

/// Where the files of a snapshot are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum Content {
    /// In its own directory, above those of its parents.
    Files,
    /// Nowhere: the bootstrap above it names what it holds.
    Blob {
        /// Its digest, `sha256:HEX`, when containerd told it.
        digest: Option<String>,
    },
    /// In a mounted image, which has the files of its parents too.
    Image {
        /// Which image.
        name: ImageName,
    },
}

/// What is recorded of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Snapshot {
    /// The number of its directory.
    #[serde(skip)]
    pub(crate) id: u64,
    /// Its name in requests; a commit gives it another.
    pub(crate) key: String,
    /// The name of what it stands on.
    pub(crate) parent: Option<String>,
    /// What it is for.
    pub(crate) kind: Kind,
    /// Where its files are.
    pub(crate) content: Content,
    /// Whatever containerd attached to it.
    pub(crate) labels: Labels,
    /// When it was made.
    pub(crate) created: SystemTime,
    /// When it was last changed.
    pub(crate) updated: SystemTime,
    /// What it took when it was committed.
    pub(crate) usage: Usage,
}

impl Snapshot {
    /// Its own files: the writable layer of an active snapshot, the unpacked layer of a committed one.
    pub(crate) fn files(dir: &Path) -> PathBuf {
        dir.join("fs")
    }

    /// What overlayfs needs beside them.
    pub(crate) fn work(dir: &Path) -> PathBuf {
        dir.join("work")
    }

    /// Where its image is mounted.
    pub(crate) fn image(dir: &Path) -> PathBuf {
        dir.join("image")
    }
}
