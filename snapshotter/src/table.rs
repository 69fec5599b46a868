//! The snapshots on disk: a numbered directory each, with its record beside its files.
//!
//! The record is what makes a directory a snapshot: it is written last, in one rename, and goes first, by a rename of
//! the directory. So every change is one step on disk, and what a crash leaves of an unfinished one has no record.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::error::Kind as ErrorKind;
use crate::snapshot::{Content, Snapshot};
use crate::{Error, snapshot::Kind};

const RECORD: &str = "snapshot.json";
/// Starts the names of directories that are being deleted.
const REMOVED: &str = "removed-";
/// Largest record read, bytes: containerd limits a label to 4096.
const MAX_RECORD: u64 = 1 << 20;

/// All snapshots of a directory.
#[derive(Debug)]
pub(crate) struct Table {
    root: PathBuf,
    by_key: BTreeMap<String, Snapshot>,
    next: u64,
}

/// What [`Table::open`] found beside snapshots.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Leftovers {
    /// Directories of changes that were not finished: an image may be mounted in them still.
    pub(crate) unfinished: Vec<PathBuf>,
    /// Directories that can be deleted.
    pub(crate) removed: Vec<PathBuf>,
}

impl Table {
    /// Reads what is in `root`, which is made when it is missing.
    ///
    /// # Errors
    /// When the directory cannot be used, or a record is damaged: a snapshot that containerd counts on must not vanish.
    pub(crate) fn open(root: &Path) -> Result<(Self, Leftovers), Error> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(|error| Error::io("cannot make", root, &error))?;
        let mut table = Self { root: root.to_owned(), by_key: BTreeMap::new(), next: 1 };
        let mut leftovers = Leftovers::default();
        let entries = std::fs::read_dir(root).map_err(|error| Error::io("cannot list", root, &error))?;
        for entry in entries {
            let path = entry.map_err(|error| Error::io("cannot list", root, &error))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let removed = name.strip_prefix(REMOVED);
            let Ok(id) = removed.unwrap_or(&name).parse::<u64>() else {
                tracing::warn!(path = %path.display(), "not of the snapshotter, left alone");
                continue;
            };
            table.next = table.next.max(id.saturating_add(1));
            if removed.is_some() {
                leftovers.removed.push(path);
                continue;
            }
            match read(&path, id)? {
                None => leftovers.unfinished.push(path),
                Some(snapshot) => {
                    let twice = table.by_key.insert(snapshot.key.clone(), snapshot);
                    if let Some(twice) = twice {
                        let message = format!("{}: snapshot {} is there twice", root.display(), twice.key);
                        return Err(Error::new(ErrorKind::Internal, message));
                    }
                }
            }
        }
        leftovers.unfinished.sort();
        leftovers.removed.sort();
        Ok((table, leftovers))
    }

    /// The directory of a snapshot.
    pub(crate) fn dir(&self, id: u64) -> PathBuf {
        self.root.join(id.to_string())
    }

    /// The snapshot of that name.
    pub(crate) fn get(&self, key: &str) -> Result<&Snapshot, Error> {
        self.by_key.get(key).ok_or_else(|| Error::not_found(key))
    }

    /// All of them, by name.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Snapshot> {
        self.by_key.values()
    }

    /// The snapshot and what it stands on, from the top.
    pub(crate) fn chain(&self, key: &str) -> Result<Vec<&Snapshot>, Error> {
        let mut chain = vec![self.get(key)?];
        while let Some(parent) = chain.last().and_then(|snapshot| snapshot.parent.as_ref()) {
            let parent = self.get(parent)?;
            if chain.len() > self.by_key.len() {
                let message = format!("snapshot {key} stands on itself");
                return Err(Error::new(ErrorKind::Internal, message));
            }
            chain.push(parent);
        }
        Ok(chain)
    }

    /// Whether a snapshot of that name can be made on top of `parent`.
    ///
    /// # Errors
    /// When the name is taken or bad, or the parent is missing or not committed.
    pub(crate) fn check_new(&self, key: &str, parent: Option<&str>) -> Result<(), Error> {
        if key.is_empty() {
            return Err(Error::new(ErrorKind::InvalidArgument, "a snapshot needs a key"));
        }
        if self.by_key.contains_key(key) {
            return Err(Error::new(ErrorKind::AlreadyExists, format!("snapshot {key} exists already")));
        }
        match parent.map(|parent| self.get(parent).map_err(|error| error.context("parent"))).transpose()? {
            Some(parent) if parent.kind != Kind::Committed => {
                let message = format!("parent {} is not committed", parent.key);
                Err(Error::new(ErrorKind::InvalidArgument, message))
            }
            _ => Ok(()),
        }
    }

    /// Makes the directory of a new snapshot with what its content needs; it counts once [`Self::put`] was called.
    ///
    /// # Errors
    /// When the file system refuses.
    pub(crate) fn make(&mut self, kind: Kind, content: &Content) -> Result<(u64, PathBuf), Error> {
        let id = self.next;
        self.next = id.saturating_add(1);
        let dir = self.dir(id);
        let make = |path: &Path, mode| {
            DirBuilder::new().mode(mode).create(path).map_err(|error| Error::io("cannot make", path, &error))
        };
        make(&dir, 0o700)?;
        match content {
            // Its mode is that of the container's root directory.
            Content::Files => make(&Snapshot::files(&dir), 0o755)?,
            Content::Image { .. } => make(&Snapshot::image(&dir), 0o755)?,
            Content::Blob { .. } => {}
        }
        if kind == Kind::Active && *content == Content::Files {
            make(&Snapshot::work(&dir), 0o711)?;
        }
        Ok((id, dir))
    }

    /// Records a snapshot whose directory is there, durably; in place of the one with the same number, if any.
    ///
    /// # Errors
    /// When the file system refuses: what was recorded before holds then.
    pub(crate) fn put(&mut self, snapshot: Snapshot) -> Result<(), Error> {
        let dir = self.dir(snapshot.id);
        let path = dir.join(RECORD);
        let write = || -> std::io::Result<()> {
            let mut file = tempfile::Builder::new().prefix(".new").tempfile_in(&dir)?;
            serde_json::to_writer(&mut file, &snapshot)?;
            file.flush()?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            File::open(&dir)?.sync_all()?;
            File::open(&self.root)?.sync_all()
        };
        write().map_err(|error| Error::io("cannot write", &path, &error))?;
        self.by_key.retain(|_, other| other.id != snapshot.id);
        self.by_key.insert(snapshot.key.clone(), snapshot);
        Ok(())
    }

    /// Forgets a snapshot that nothing stands on. Returns its directory under the name that it is deleted by.
    ///
    /// # Errors
    /// When something stands on it, or the file system refuses.
    pub(crate) fn remove(&mut self, key: &str) -> Result<PathBuf, Error> {
        self.check_leaf(key)?;
        let id = self.get(key)?.id;
        let removed = self.set_aside(&self.dir(id))?;
        self.by_key.remove(key);
        Ok(removed)
    }

    /// Whether nothing stands on a snapshot.
    ///
    /// # Errors
    /// Which one does.
    pub(crate) fn check_leaf(&self, key: &str) -> Result<(), Error> {
        self.get(key)?;
        match self.all().find(|other| other.parent.as_deref() == Some(key)) {
            None => Ok(()),
            Some(child) => {
                let message = format!("snapshot {key} is in use: {} stands on it", child.key);
                Err(Error::new(ErrorKind::FailedPrecondition, message))
            }
        }
    }

    /// Renames a directory so that it is no snapshot any more.
    ///
    /// # Errors
    /// When the file system refuses.
    pub(crate) fn set_aside(&self, dir: &Path) -> Result<PathBuf, Error> {
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let removed = self.root.join(format!("{REMOVED}{name}"));
        std::fs::rename(dir, &removed)
            .and_then(|()| File::open(&self.root)?.sync_all())
            .map_err(|error| Error::io("cannot remove", dir, &error))?;
        Ok(removed)
    }
}

fn read(dir: &Path, id: u64) -> Result<Option<Snapshot>, Error> {
    let path = dir.join(RECORD);
    let damaged = |why: String| {
        let message = format!(
            "{}: the record is damaged: {why}; remove {} and the snapshot in containerd",
            path.display(),
            dir.display()
        );
        Error::new(ErrorKind::Internal, message)
    };
    match std::fs::symlink_metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("cannot read", &path, &error)),
        Ok(metadata) if !metadata.is_file() || metadata.len() > MAX_RECORD => {
            return Err(damaged(format!("it has {} bytes", metadata.len())));
        }
        Ok(_) => {}
    }
    let bytes = std::fs::read(&path).map_err(|error| Error::io("cannot read", &path, &error))?;
    let snapshot: Snapshot = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    Ok(Some(Snapshot { id, ..snapshot }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test panics")]
    use std::time::SystemTime;

    use super::*;
    use crate::usage::Usage;

    fn add(table: &mut Table, key: &str, parent: Option<&str>, kind: Kind) -> u64 {
        table.check_new(key, parent).unwrap();
        let (id, _) = table.make(kind, &Content::Files).unwrap();
        let (created, updated) = (SystemTime::now(), SystemTime::now());
        let (key, parent) = (key.to_owned(), parent.map(str::to_owned));
        let (labels, usage) = (BTreeMap::from([("a".into(), "b".into())]), Usage::default());
        let content = Content::Files;
        table.put(Snapshot { id, key, parent, kind, content, labels, created, updated, usage }).unwrap();
        id
    }

    #[test]
    fn what_was_put_is_there_after_a_restart_and_what_was_not_is_left_over() {
        let dir = tempfile::tempdir().unwrap();
        let (mut table, none) = Table::open(dir.path()).unwrap();
        assert_eq!(none, Leftovers::default());
        add(&mut table, "base", None, Kind::Committed);
        let top = add(&mut table, "top", Some("base"), Kind::Active);
        let unfinished = table.make(Kind::Active, &Content::Files).unwrap().1;
        let gone = add(&mut table, "gone", Some("base"), Kind::Active);
        let removed = table.remove("gone").unwrap();
        assert!(removed.ends_with(format!("removed-{gone}")) && removed.exists());

        let before: Vec<Snapshot> = table.all().cloned().collect();
        let (table, leftovers) = Table::open(dir.path()).unwrap();
        assert_eq!(table.all().cloned().collect::<Vec<_>>(), before);
        assert_eq!(leftovers, Leftovers { unfinished: vec![unfinished], removed: vec![removed] });
        assert!(table.next > gone);
        assert_eq!(
            table.chain("top").unwrap().iter().map(|s| s.key.as_str()).collect::<Vec<_>>(),
            ["top", "base"]
        );
        assert!(Snapshot::work(&table.dir(top)).is_dir());
    }

    #[test]
    fn rules_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (mut table, _) = Table::open(dir.path()).unwrap();
        add(&mut table, "base", None, Kind::Committed);
        add(&mut table, "top", Some("base"), Kind::Active);
        let kind = |result: Result<(), Error>| result.unwrap_err().kind;
        assert_eq!(kind(table.check_new("top", None)), ErrorKind::AlreadyExists);
        assert_eq!(kind(table.check_new("x", Some("y"))), ErrorKind::NotFound);
        assert_eq!(kind(table.check_new("x", Some("top"))), ErrorKind::InvalidArgument);
        assert_eq!(kind(table.check_new("", None)), ErrorKind::InvalidArgument);
        assert_eq!(table.remove("base").unwrap_err().kind, ErrorKind::FailedPrecondition);
        assert_eq!(table.remove("x").unwrap_err().kind, ErrorKind::NotFound);
        table.remove("top").unwrap();
        table.remove("base").unwrap();
    }

    #[test]
    fn a_damaged_record_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (mut table, _) = Table::open(dir.path()).unwrap();
        let id = add(&mut table, "base", None, Kind::Committed);
        std::fs::write(table.dir(id).join(RECORD), b"{\"key\": 1").unwrap();
        let error = Table::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(RECORD) && error.contains("damaged"), "{error}");
    }
}
