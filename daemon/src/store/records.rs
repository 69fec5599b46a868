//! The records that a restarted daemon works from.
//!
//! `images/<hex>.json` says where an image's blobs come from; `mounts.json` which mounts are alive. Logins are not
//! among them: they lie in the runtime directory ([`Secrets`]), which a reboot empties, as it does the mounts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use skimmer_client::{AttachMode, Credentials, Mount, Prepared};

use super::{Store, StoreError, atomic};
use crate::blob::BlobId;

/// An image, named by its bootstrap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// SHA-256 of the bootstrap, hex.
    pub bootstrap: String,
    /// The names it was mounted by: each is a source of its blobs.
    pub sources: Vec<SourceRecord>,
    /// Its blobs in device order.
    pub blobs: Vec<BlobRecord>,
}

/// One name of an image and how to reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// As in the request.
    pub image: String,
    /// Digest of its manifest, `sha256:…`.
    pub manifest: String,
    /// Hosts that may be reached without TLS.
    #[serde(default)]
    pub insecure: Vec<String>,
    /// Additional certificate authorities.
    #[serde(default)]
    pub ca: Option<PathBuf>,
}

/// One blob of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobRecord {
    /// Its id, hex.
    pub id: String,
    /// Its size at the source, bytes.
    pub stored_bytes: u64,
}

/// One live superblock and where it is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentRecord {
    /// SHA-256 of the bootstrap, hex.
    pub bootstrap: String,
    /// The mode in use.
    pub mode: AttachMode,
    /// Device number of its files, as in `/proc/self/mountinfo`.
    pub device: String,
    /// Its name in `/sys/class/bdi`, which is there for as long as the superblock is.
    pub bdi: Option<String>,
    /// Its mounts; none left when it was detached and files on it are still open.
    pub mounts: Vec<Mount>,
    /// Set when others mount it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepared: Option<Prepared>,
}

/// `mounts.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountsRecord {
    /// The boot in which it was written: mounts do not outlive it.
    pub boot: String,
    /// Whether the daemon that wrote it had recorded everything before it ended.
    pub clean: bool,
    /// Live superblocks.
    pub attachments: Vec<AttachmentRecord>,
}

impl Store {
    /// Writes an image's record.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn save_image(&self, image: &ImageRecord) -> Result<(), StoreError> {
        save(&self.image_path(&image.bootstrap), image)
    }

    /// Reads an image's record; `None` when there is none.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] when it cannot be understood.
    pub fn load_image(&self, bootstrap: &str) -> Result<Option<ImageRecord>, StoreError> {
        let path = self.image_path(bootstrap);
        let Some(image) = load::<ImageRecord>(&path)? else { return Ok(None) };
        if image.bootstrap != bootstrap {
            return Err(StoreError::corrupt(&path, "speaks of another image than its name"));
        }
        for blob in &image.blobs {
            blob.id.parse::<BlobId>().map_err(|error| StoreError::corrupt(&path, error.to_string()))?;
        }
        Ok(Some(image))
    }

    /// Removes an image's record.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn remove_image(&self, bootstrap: &str) -> Result<(), StoreError> {
        atomic::remove(&self.image_path(bootstrap))
    }

    /// Writes `mounts.json`.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn save_mounts(&self, mounts: &MountsRecord) -> Result<(), StoreError> {
        save(&self.mounts_path(), mounts)
    }

    /// Reads `mounts.json`; an absent one is an empty one.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`], with what to do, when it cannot be understood: mounts that it names may be alive.
    pub fn load_mounts(&self) -> Result<MountsRecord, StoreError> {
        let remedy = "it names the mounts to be served, so skimmerd does not start over it: unmount what \
            `findmnt -t erofs` shows of this root directory, then move the file away and start again";
        load(&self.mounts_path()).map(Option::unwrap_or_default).map_err(|error| match error {
            StoreError::Corrupt { path, what } => {
                StoreError::Corrupt { path, what: format!("{what}; {remedy}") }
            }
            other => other,
        })
    }

    fn image_path(&self, bootstrap: &str) -> PathBuf {
        self.root.join("images").join(format!("{bootstrap}.json"))
    }

    fn mounts_path(&self) -> PathBuf {
        self.root.join("mounts.json")
    }
}

/// Logins given with mount requests, by image name; mode 0600 in the runtime directory.
#[derive(Debug)]
pub struct Secrets {
    path: PathBuf,
    by_image: BTreeMap<String, Credentials>,
}

impl Secrets {
    /// Reads what an earlier daemon of this boot kept; a file that cannot be understood is dropped with a log line.
    pub fn open(path: PathBuf) -> Self {
        let by_image = load(&path).unwrap_or_else(|error| {
            tracing::warn!("{error}; logins of present mounts have to be given again");
            None
        });
        Self { path, by_image: by_image.unwrap_or_default() }
    }

    /// The login for an image.
    pub fn get(&self, image: &str) -> Option<&Credentials> {
        self.by_image.get(image)
    }

    /// Keeps a login.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn put(&mut self, image: &str, credentials: Credentials) -> Result<(), StoreError> {
        self.by_image.insert(image.into(), credentials);
        save(&self.path, &self.by_image)
    }

    /// Forgets the logins of all images but these.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) -> Result<(), StoreError> {
        let before = self.by_image.len();
        self.by_image.retain(|image, _| keep(image));
        if self.by_image.len() == before { Ok(()) } else { save(&self.path, &self.by_image) }
    }
}

/// Writes a file of the runtime directory, mode 0600.
///
/// # Errors
/// [`StoreError::Io`].
pub fn save<T: Serialize>(path: &Path, value: &T) -> Result<(), StoreError> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|error| StoreError::io("cannot encode", path, std::io::Error::other(error)))?;
    text.push(b'\n');
    atomic::write(path, &text)
}

/// Reads such a file; none when it is not there.
///
/// # Errors
/// [`StoreError`].
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StoreError> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::io("cannot read", path, error)),
    };
    serde_json::from_slice(&text).map(Some).map_err(|error| StoreError::corrupt(path, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.load_mounts().unwrap(), MountsRecord::default());
        let bootstrap = "a".repeat(64);
        let image = ImageRecord {
            bootstrap: bootstrap.clone(),
            sources: vec![SourceRecord {
                image: "oci:/x".into(),
                manifest: "sha256:1".into(),
                insecure: vec![],
                ca: None,
            }],
            blobs: vec![BlobRecord { id: "b".repeat(64), stored_bytes: 5 }],
        };
        store.save_image(&image).unwrap();
        assert_eq!(store.load_image(&bootstrap).unwrap(), Some(image));
        let mounts = MountsRecord {
            boot: "x".into(),
            clean: true,
            attachments: vec![AttachmentRecord {
                bootstrap,
                mode: AttachMode::Fanotify,
                device: "0:55".into(),
                bdi: Some("erofs-1".into()),
                prepared: None,
                mounts: vec![],
            }],
        };
        store.save_mounts(&mounts).unwrap();
        assert_eq!(store.load_mounts().unwrap(), mounts);
    }

    #[test]
    fn a_record_that_names_no_blob_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let bootstrap = "a".repeat(64);
        let blobs = vec![BlobRecord { id: "../../etc/passwd".into(), stored_bytes: 5 }];
        store.save_image(&ImageRecord { bootstrap: bootstrap.clone(), sources: vec![], blobs }).unwrap();
        let error = store.load_image(&bootstrap).unwrap_err().to_string();
        assert!(error.contains(".json") && error.contains("passwd"), "{error}");
        std::fs::write(dir.path().join("mounts.json"), b"{").unwrap();
        assert!(matches!(store.load_mounts(), Err(StoreError::Corrupt { .. })));
    }

    #[test]
    fn logins_are_private_and_forgotten() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials.json");
        let login = Credentials { username: "u".into(), password: "p".into() };
        Secrets::open(path.clone()).put("a", login.clone()).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut secrets = Secrets::open(path.clone());
        assert_eq!(secrets.get("a"), Some(&login));
        secrets.retain(|image| image != "a").unwrap();
        assert_eq!(Secrets::open(path).get("a"), None);
    }
}
