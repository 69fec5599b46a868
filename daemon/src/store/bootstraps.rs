//! Whole bootstraps, named by their SHA-256: a file here can never mean two things.

use std::io::Read;

use sha2::{Digest, Sha256};

use super::{Store, StoreError, atomic};

/// The largest bootstrap taken: what the fetcher unpacks at most, bytes.
pub const MAX_BYTES: u64 = 1 << 30;

/// The SHA-256 of a bootstrap in lower-case hex: its name here, and its fsid.
pub fn name(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

impl Store {
    /// Stores a bootstrap and returns its name. One that is there already is checked and kept.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn put_bootstrap(&self, bytes: &[u8]) -> Result<String, StoreError> {
        let name = name(bytes);
        let path = self.bootstrap_path(&name);
        if path.exists() && self.load_bootstrap(&name).is_ok() {
            return Ok(name);
        }
        atomic::write(&path, bytes)?;
        Ok(name)
    }

    /// Loads a bootstrap and checks it against its name.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when the file is not what its name says.
    pub fn load_bootstrap(&self, bootstrap: &str) -> Result<Vec<u8>, StoreError> {
        let path = self.bootstrap_path(bootstrap);
        let read = |error| StoreError::io("cannot read the bootstrap", &path, error);
        let file = std::fs::File::open(&path).map_err(read)?;
        let size = file.metadata().map_err(read)?.len();
        if size > MAX_BYTES {
            return Err(StoreError::corrupt(&path, format!("{size} bytes is too large for a bootstrap")));
        }
        let mut bytes = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(read)?;
        if name(&bytes) != bootstrap {
            return Err(StoreError::corrupt(&path, "its content does not have the digest it is named by"));
        }
        Ok(bytes)
    }

    /// Removes a bootstrap; nothing may be mounted from it.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn remove_bootstrap(&self, bootstrap: &str) -> Result<(), StoreError> {
        atomic::remove(&self.bootstrap_path(bootstrap))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_bootstrap_is_not_loaded_and_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let name = store.put_bootstrap(b"bootstrap").unwrap();
        assert_eq!(store.load_bootstrap(&name).unwrap(), b"bootstrap");
        std::fs::write(store.bootstrap_path(&name), b"bootstrab").unwrap();
        assert!(matches!(store.load_bootstrap(&name), Err(StoreError::Corrupt { .. })));
        assert_eq!(store.put_bootstrap(b"bootstrap").unwrap(), name);
        assert_eq!(store.load_bootstrap(&name).unwrap(), b"bootstrap");
    }
}
