//! What containerd's snapshots need of our mounts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use async_trait::async_trait;
use skimmer_client::{Credentials, MountRequest};
use skimmer_config::Config;
use skimmer_fetcher::reference::RegistryRef;
use skimmer_snapshotter::{
    Containerd, Error, ImageName, Images, Kind as ErrorKind, Login, Pull, Snapshotter,
};

use crate::control::SocketError;
use crate::mounts::{Failure, Kind, Mounts};
use crate::pulls::Pulls;
use crate::service::{Socket, Sockets};

/// Opens the snapshotter's socket; `None` when the configuration turns it off.
///
/// # Errors
/// As [`Sockets::listen`].
pub fn listen(config: &Config, sockets: &mut Sockets) -> Result<Option<Socket>, SocketError> {
    config.containerd.enable.then(|| sockets.listen(&config.containerd_socket())).transpose()
}

/// Opens the snapshots, whose images earlier daemons may have left mounted.
///
/// # Errors
/// When their directory cannot be used or is damaged.
pub async fn snapshotter(
    config: &Config,
    mounts: &Arc<Mounts>,
    pulls: Arc<Pulls>,
) -> anyhow::Result<Arc<Snapshotter>> {
    // Mounts are known by the names that the kernel gives.
    let root = config.root.canonicalize().with_context(|| config.root.display().to_string())?;
    let containerd = Containerd::new(config.containerd.address.clone());
    let images = Arc::new(Lazily(Arc::clone(mounts), pulls));
    let snapshotter = Snapshotter::open(&root.join("snapshots"), images, containerd).await;
    Ok(Arc::new(snapshotter.context("the snapshots for containerd")?))
}

struct Lazily(Arc<Mounts>, Arc<Pulls>);

fn refused(failure: Failure) -> Error {
    let kind = match failure.kind {
        Kind::BadRequest => ErrorKind::InvalidArgument,
        // To containerd "not found" would mean a snapshot.
        Kind::NotFound | Kind::Conflict | Kind::BadImage => ErrorKind::FailedPrecondition,
        Kind::Unavailable | Kind::Source => ErrorKind::Unavailable,
        Kind::Internal => ErrorKind::Internal,
    };
    let remedy = failure.remedy.map(|remedy| format!("; {remedy}")).unwrap_or_default();
    Error::new(kind, format!("skimmer: {}{remedy}", failure.message))
}

fn credentials(Login { username, password }: &Login) -> Credentials {
    Credentials { username: username.clone(), password: password.clone() }
}

#[async_trait]
impl Images for Lazily {
    async fn mount(&self, image: &ImageName, pull: Pull, target: PathBuf) -> Result<(), Error> {
        let mut request = MountRequest::new(format!("docker://{}", image.reference), target);
        request.traceparent = pull.traceparent;
        request.credentials = pull.login.as_ref().map(credentials);
        request.chain_id = pull.chain_id;
        let mount = self.0.mount(request).await.map_err(refused)?;
        // A pull that succeeds means that the image is there; its data is first asked for when containers run.
        if let Err(failure) = self.0.find_blobs(&mount.target).await {
            // The pull's end is told all the same.
            if let Err(error) = self.umount(mount.target.clone()).await {
                tracing::warn!(target = %mount.target.display(), "an image with a missing blob stays mounted: {error}");
            }
            return Err(refused(failure));
        }
        tracing::info!(image = %mount.image, target = %mount.target.display(), mode = %mount.mode, "mounted");
        Ok(())
    }

    async fn pulling(&self, name: &str, login: &Login) {
        // What is no name of an image, containerd says.
        if let Ok(image) = RegistryRef::parse(name) {
            self.1.offer(&image, credentials(login));
        }
    }

    async fn pulled(&self, name: &str, login: &Login, succeeded: bool) {
        let Ok(image) = RegistryRef::parse(name) else { return };
        if let Err(error) = self.1.settle(&image, credentials(login), succeeded) {
            tracing::warn!(image = name, "the login of a pull is known to this daemon only: {error}");
        }
    }

    async fn umount(&self, target: PathBuf) -> Result<(), Error> {
        match self.0.umount(&target, false).await {
            Err(failure) if failure.kind != Kind::NotFound => Err(refused(failure)),
            _ => Ok(()),
        }
    }

    fn is_mounted(&self, target: &Path) -> bool {
        self.0.list().iter().any(|mount| mount.target == target)
    }

    async fn cached_bytes(&self, digest: &str) -> u64 {
        let Ok(status) = self.0.status().await else { return 0 };
        let id = digest.strip_prefix("sha256:").unwrap_or(digest);
        status.blobs.iter().find(|blob| blob.id == id).map_or(0, |blob| blob.ready_bytes)
    }
}
