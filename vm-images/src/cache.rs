//! The cache on disk: directories named by a content key, made aside and renamed into place when complete.
//!
//! It lives under `$XDG_CACHE_HOME/skimmer/vm` (else `~/.cache/skimmer/vm`); deleting it costs only time.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// The cache directory; made when absent.
///
/// # Errors
/// Neither `XDG_CACHE_HOME` nor `HOME` is set, or the directory cannot be made.
pub fn root() -> Result<PathBuf> {
    let base = match (std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")) {
        (Some(cache), _) if Path::new(&cache).is_absolute() => PathBuf::from(cache),
        (_, Some(home)) if !home.is_empty() => Path::new(&home).join(".cache"),
        _ => bail!("neither XDG_CACHE_HOME nor HOME is set: no place for the cache of guest kernels"),
    };
    let root = base.join("skimmer").join("vm");
    fs::create_dir_all(&root)
        .with_context(|| format!("cannot make the cache directory {}", root.display()))?;
    Ok(root)
}

/// A content key over length-prefixed parts.
pub struct Key(Sha256);

impl Key {
    /// A key of its own kind: equal parts under another `kind` give another key.
    #[must_use]
    pub fn new(kind: &str) -> Self {
        let mut key = Key(Sha256::new());
        key.add(kind.as_bytes());
        key
    }

    /// Adds a part.
    pub fn add(&mut self, part: &[u8]) {
        self.0.update(u64::try_from(part.len()).unwrap_or(u64::MAX).to_le_bytes());
        self.0.update(part);
    }

    /// 32 hex digits.
    #[must_use]
    pub fn finish(self) -> String {
        hex::encode(&self.0.finalize()[..16])
    }
}

/// One directory of the cache: there and complete, or not there.
pub struct Entry {
    directory: PathBuf,
}

impl Entry {
    /// The entry `key` among those of a `kind`.
    ///
    /// # Errors
    /// There is no place for the cache.
    pub fn new(kind: &str, key: &str) -> Result<Self> {
        Ok(Entry { directory: root()?.join(kind).join(key) })
    }

    /// The finished directory; `make` fills a fresh one first when it is not there. Other processes that want the
    /// same entry wait.
    ///
    /// # Errors
    /// `make` fails, or the directory cannot be put in its place.
    pub fn get_or_make(self, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        if self.directory.is_dir() {
            return Ok(self.directory);
        }
        let parent = self.directory.parent().context("a cache entry has a parent")?;
        fs::create_dir_all(parent)?;
        let _lock = lock(&self.directory.with_extension("lock"))?;
        if self.directory.is_dir() {
            return Ok(self.directory);
        }
        let aside = TempDir::with_prefix_in(".making-", parent)?;
        make(aside.path())?;
        fs::rename(aside.path(), &self.directory)
            .with_context(|| format!("cannot move the new entry to {}", self.directory.display()))?;
        // Renamed away: nothing is left for the guard to delete.
        drop(aside.keep());
        Ok(self.directory)
    }
}

/// Holds an exclusive lock on the file `path` until the result is dropped.
pub(crate) fn lock(path: &Path) -> Result<File> {
    let file = File::options().create(true).append(true).open(path);
    let file = file.with_context(|| format!("cannot open the lock file {}", path.display()))?;
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// Keeps the `keep` entries of a kind that were used last, and deletes the others.
///
/// # Errors
/// The cache cannot be listed.
pub fn prune(kind: &str, keep: usize) -> Result<()> {
    let directory = root()?.join(kind);
    let mut entries = Vec::new();
    for entry in fs::read_dir(&directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() && !entry.file_name().to_string_lossy().starts_with('.') {
            entries.push((metadata.modified()?, entry.path()));
        }
    }
    entries.sort();
    let surplus = entries.len().saturating_sub(keep);
    for (_, path) in entries.drain(..surplus) {
        // Another process may be deleting it too.
        let _ = fs::remove_dir_all(&path);
        let _ = fs::remove_file(path.with_extension("lock"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(directory: &TempDir) -> Entry {
        Entry { directory: directory.path().join("kind").join("key") }
    }

    #[test]
    fn an_entry_is_made_once_and_only_when_complete() {
        let directory = tempfile::tempdir().unwrap();
        assert!(entry(&directory).get_or_make(|_| bail!("half way")).is_err());
        let left: Vec<_> = fs::read_dir(directory.path().join("kind")).unwrap().collect();
        assert_eq!(left.len(), 1, "only the lock file stays: {left:?}");
        let made = entry(&directory)
            .get_or_make(|aside| {
                fs::write(aside.join("file"), b"x")?;
                Ok(())
            })
            .unwrap();
        assert_eq!(fs::read(made.join("file")).unwrap(), b"x");
        entry(&directory).get_or_make(|_| bail!("made twice")).unwrap();
    }

    #[test]
    fn parts_of_a_key_do_not_run_together() {
        let key = |parts: &[&[u8]]| {
            let mut key = Key::new("test");
            parts.iter().for_each(|part| key.add(part));
            key.finish()
        };
        assert_ne!(key(&[b"ab", b"c"]), key(&[b"a", b"bc"]));
        assert_eq!(key(&[b"ab", b"c"]).len(), 32);
    }
}
