//! What the cache holds, with its size and when it was last used; and letting go of it.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Store, StoreError, atomic};
use crate::blob::BlobId;

/// Bytes of a unit of `st_blocks` (stat(2)).
pub(super) const UNIT: u64 = 512;

/// Something that the cache can do without, if nothing mounted needs it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Item {
    /// A blob: its files of both modes, maps and claims.
    Blob(BlobId),
    /// A bootstrap, and its cache file.
    Bootstrap(String),
}

/// An item on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Which.
    pub item: Item,
    /// Disk space that it takes.
    pub bytes: u64,
    /// When it was last part of a mounted image, as far as is known.
    pub used: SystemTime,
}

impl Store {
    /// Everything that takes space, the least recently used first.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn held(&self) -> Result<Vec<Held>, StoreError> {
        let mut found: HashMap<Item, Held> = HashMap::new();
        let mut add = |item: Item, metadata: &Metadata, dates: bool| {
            let entry = || Held { item: item.clone(), bytes: 0, used: UNIX_EPOCH };
            let held = found.entry(item.clone()).or_insert_with(entry);
            held.bytes += metadata.blocks().saturating_mul(UNIT);
            if dates {
                held.used = metadata.modified().unwrap_or(UNIX_EPOCH);
            }
        };
        each(&self.root().join("blobs"), &mut |name, metadata| {
            let (hex, suffix) = name.split_once('.').unwrap_or((name, ""));
            if let Ok(blob) = hex.parse() {
                // Claims are what a mount begins with: their date is that of the last use.
                add(Item::Blob(blob), metadata, suffix == "chunks");
            }
        })?;
        each(&self.root().join("bootstraps"), &mut |name, metadata| {
            // Others are under construction.
            if name.len() == 64 {
                add(Item::Bootstrap(name.to_owned()), metadata, true);
            }
        })?;
        // The kernel's names have the cookie behind a letter for the kind (Documentation/filesystems/caching).
        each(&self.fscache_dir(), &mut |name, metadata| {
            let Some(cookie) = name.get(1..).filter(|cookie| cookie.len() == 64) else { return };
            let blob = cookie.parse().map(Item::Blob).ok();
            let bootstrap = Item::Bootstrap(cookie.to_owned());
            let item = blob.filter(|_| !self.bootstrap_path(cookie).exists()).unwrap_or(bootstrap);
            add(item, metadata, false);
        })?;
        let mut held: Vec<Held> = found.into_values().collect();
        held.sort_by(|a, b| a.used.cmp(&b.used).then_with(|| a.item.cmp(&b.item)));
        Ok(held)
    }

    /// Notes that an item is in use now.
    pub fn touch(&self, item: &Item) {
        let path = match item {
            Item::Blob(blob) => self.claims_path(*blob),
            Item::Bootstrap(name) => self.bootstrap_path(name),
        };
        let touched = File::open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        match touched {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::debug!("the last use of {} is not noted: {error}", path.display());
            }
            _ => {}
        }
    }

    /// Lets go of an item that nothing mounted needs.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn evict(&self, item: &Item) -> Result<(), StoreError> {
        match item {
            Item::Blob(blob) => self.reset_blob(*blob),
            Item::Bootstrap(name) => {
                self.remove_cache_file(name)?;
                atomic::remove(&self.bootstrap_path(name))
            }
        }
    }
}

/// Calls `visit` for each file below a directory; what goes away meanwhile is passed over.
fn each(dir: &Path, visit: &mut impl FnMut(&str, &Metadata)) -> Result<(), StoreError> {
    let list = |error| StoreError::io("cannot list", dir, error);
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(list(error)),
    };
    for entry in entries {
        let entry = entry.map_err(list)?;
        let Ok(metadata) = entry.metadata() else { continue };
        if metadata.is_dir() {
            each(&entry.path(), visit)?;
        } else if let Some(name) = entry.file_name().to_str() {
            visit(name, &metadata);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_least_recently_used_comes_first_and_goes_whole() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let blob = |n: u8| BlobId::new([n; 32]);
        for n in [1, 2, 3] {
            std::fs::write(store.blob_path(blob(n)), vec![n; 100_000]).unwrap();
            std::fs::write(store.claims_path(blob(n)), b"x").unwrap();
        }
        let name = "c".repeat(64);
        std::fs::write(store.bootstrap_path(&name), vec![0; 50_000]).unwrap();
        let cached = store.precreate_cache_file(&name, 8192).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&cached, &[1; 8192], 0).unwrap();
        let old = SystemTime::now() - Duration::from_secs(1000);
        for (n, age) in [(1, 20), (2, 30), (3, 10)] {
            let file = File::open(store.claims_path(blob(n))).unwrap();
            file.set_modified(old - Duration::from_secs(age)).unwrap();
        }
        File::open(store.bootstrap_path(&name)).unwrap().set_modified(old).unwrap();
        store.touch(&Item::Blob(blob(2)));
        let held = store.held().unwrap();
        let order: Vec<&Item> = held.iter().map(|held| &held.item).collect();
        let bootstrap = Item::Bootstrap(name.clone());
        assert_eq!(order, [&Item::Blob(blob(1)), &Item::Blob(blob(3)), &bootstrap, &Item::Blob(blob(2))]);
        assert!(held.iter().all(|held| held.bytes >= 50_000), "{held:#?}");
        assert!(held[2].bytes >= 50_000 + 8192, "{held:#?}");

        store.evict(&Item::Blob(blob(1))).unwrap();
        store.evict(&bootstrap).unwrap();
        assert_eq!(store.held().unwrap().len(), 2);
        assert!(!store.blob_path(blob(1)).exists() && !store.claims_path(blob(1)).exists());
    }
}
