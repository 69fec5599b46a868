//! What the snapshotter needs of whoever mounts images.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::Error;

/// Which image: a reference as containerd names it, pinned by its manifest's digest when that is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageName {
    /// `host/name:tag` or `host/name@digest`.
    pub reference: String,
}

impl ImageName {
    /// The image `reference`, which a pull resolved to the manifest `digest`.
    pub fn pinned(reference: &str, digest: Option<&str>) -> Self {
        let reference = match digest.filter(|digest| !digest.is_empty()) {
            None => reference.to_owned(),
            Some(digest) => {
                let name = reference.split_once('@').map_or(reference, |(name, _)| name);
                // A colon after the last slash starts a tag; one before it, a port.
                let slash = name.rfind('/').map_or(0, |at| at + 1);
                let tag = name[slash..].find(':').map_or(name.len(), |at| slash + at);
                format!("{}@{digest}", &name[..tag])
            }
        };
        Self { reference }
    }
}

/// A registry login that came with a pull.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// User name; empty when the password is an identity token.
    pub username: String,
    /// Password or token.
    pub password: String,
}

/// What came with a pull besides the name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pull {
    /// The login for the image's registry.
    pub login: Option<Login>,
    /// Its W3C trace context.
    pub traceparent: Option<String>,
    /// The chain id by which containerd knows the image's snapshot from then on, whatever image asks for it: the mount
    /// must be of layers that have it.
    pub chain_id: Option<String>,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login").field("username", &self.username).finish_non_exhaustive()
    }
}

/// Mounts images so that their data comes when it is read.
#[async_trait]
pub trait Images: Send + Sync + 'static {
    /// A pull of the image `name` begins, with this login for the image's repository.
    async fn pulling(&self, name: &str, login: &Login);

    /// The pull has ended. When it succeeded, the login is to be used for the repository from now on.
    async fn pulled(&self, name: &str, login: &Login, succeeded: bool);

    /// Mounts an image on an existing directory; returns when it can be read.
    async fn mount(&self, image: &ImageName, pull: Pull, target: PathBuf) -> Result<(), Error>;

    /// Takes the mount on `target` away; nothing there is a success.
    async fn umount(&self, target: PathBuf) -> Result<(), Error>;

    /// Whether an image is mounted on `target`.
    fn is_mounted(&self, target: &Path) -> bool;

    /// Bytes that are cached of the blob with this digest (`sha256:HEX`).
    async fn cached_bytes(&self, digest: &str) -> u64;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_takes_the_place_of_the_tag() {
        let pinned = |reference| ImageName::pinned(reference, Some("sha256:aa")).reference;
        assert_eq!(pinned("host:5000/a/b:tag"), "host:5000/a/b@sha256:aa");
        assert_eq!(pinned("host:5000/b"), "host:5000/b@sha256:aa");
        assert_eq!(pinned("host/b:t@sha256:bb"), "host/b@sha256:aa");
        assert_eq!(ImageName::pinned("host/b:t", None).reference, "host/b:t");
        assert_eq!(ImageName::pinned("host/b:t", Some("")).reference, "host/b:t");
    }
}
