//! What a directory takes of its file system.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::Error;

/// Space and inodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Usage {
    /// Bytes of allocated blocks.
    pub(crate) bytes: u64,
    /// Inodes.
    pub(crate) inodes: u64,
}

/// What the files under `dir` take; a file with several names counts once. What goes meanwhile is left out.
///
/// # Errors
/// When a directory cannot be read.
pub(crate) fn of(dir: &Path) -> Result<Usage, Error> {
    let mut usage = Usage::default();
    let mut linked = HashSet::new();
    let mut left = vec![dir.to_owned()];
    let gone = |error: &std::io::Error| error.kind() == std::io::ErrorKind::NotFound;
    while let Some(path) = left.pop() {
        let metadata = match std::fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if gone(&error) => continue,
            Err(error) => return Err(Error::io("cannot look at", &path, &error)),
        };
        if metadata.nlink() > 1 && !metadata.is_dir() && !linked.insert((metadata.dev(), metadata.ino())) {
            continue;
        }
        // POSIX counts blocks of 512 bytes, whatever the file system's are.
        usage.bytes = usage.bytes.saturating_add(metadata.blocks().saturating_mul(512));
        usage.inodes += 1;
        if metadata.is_dir() {
            match std::fs::read_dir(&path) {
                Ok(entries) => left.extend(entries.flatten().map(|entry| entry.path())),
                Err(error) if gone(&error) => {}
                Err(error) => return Err(Error::io("cannot list", &path, &error)),
            }
        }
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test panics")]
    use super::*;

    #[test]
    fn a_file_with_two_names_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        let empty = of(dir.path()).unwrap();
        std::fs::write(dir.path().join("a"), vec![7; 100_000]).unwrap();
        let one = of(dir.path()).unwrap();
        std::fs::hard_link(dir.path().join("a"), dir.path().join("sub/b")).unwrap();
        let two = of(dir.path()).unwrap();
        assert_eq!((empty.inodes, one.inodes, two), (2, 3, one));
        assert!(one.bytes >= empty.bytes + 100_000);
    }
}
