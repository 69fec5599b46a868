//! Files that are either the old or the new one, never half of one.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::StoreError;

/// Ends the names of files under construction; [`sweep`] removes what a crash left of them.
const TEMPORARY: &str = ".tmp";

/// Writes `bytes` to `path` durably: temporary file, fsync, rename, fsync of the directory. Mode 0600.
///
/// # Errors
/// [`StoreError::Io`]; `path` is then as it was.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    create(path, |file| file.write_all(bytes))
}

/// Makes `path` durably with what `fill` writes.
///
/// # Errors
/// [`StoreError::Io`]; `path` is then as it was.
pub fn create(path: &Path, fill: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<(), StoreError> {
    let temporary = temporary(path);
    let make = || -> std::io::Result<()> {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        fill(&mut file)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    make().map_err(|error| {
        let _ = std::fs::remove_file(&temporary);
        StoreError::io("cannot write", path, error)
    })?;
    sync_parent(path)
}

/// Removes `path` durably; a missing one is a success.
///
/// # Errors
/// [`StoreError::Io`].
pub fn remove(path: &Path) -> Result<(), StoreError> {
    match std::fs::remove_file(path) {
        Ok(()) => sync_parent(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(StoreError::io("cannot remove", path, error)),
    }
}

/// Makes the directory entry of `path` durable.
///
/// # Errors
/// [`StoreError::Io`].
pub fn sync_parent(path: &Path) -> Result<(), StoreError> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|error| StoreError::io("cannot sync", dir, error))
}

/// Removes temporary files that a crash left in `dir`.
///
/// # Errors
/// [`StoreError::Io`].
pub fn sweep(dir: &Path) -> Result<(), StoreError> {
    let read = |error| StoreError::io("cannot list", dir, error);
    for entry in std::fs::read_dir(dir).map_err(read)? {
        let path = entry.map_err(read)?.path();
        if path.to_string_lossy().ends_with(TEMPORARY) && path.is_file() {
            remove(&path)?;
        }
    }
    Ok(())
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(TEMPORARY);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        write(&path, b"old").unwrap();
        let error = create(&path, |file| {
            file.write_all(b"half")?;
            Err(std::io::Error::other("disk on fire"))
        });
        assert!(error.unwrap_err().to_string().contains("disk on fire"));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_crash_left_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.tmp"), b"half").unwrap();
        std::fs::write(dir.path().join("a"), b"whole").unwrap();
        sweep(dir.path()).unwrap();
        assert!(!dir.path().join("a.tmp").exists() && dir.path().join("a").exists());
    }
}
