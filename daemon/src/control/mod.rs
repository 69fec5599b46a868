//! The control API: HTTP and JSON on a unix socket that only the daemon's user can open.

mod routes;

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener as StdListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use prometheus_client::registry::Registry;
use skimmer_snapshotter::Snapshotter;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

use crate::mounts::Mounts;

pub use routes::{document, router};

/// What the routes work on.
#[derive(Clone)]
pub struct Api {
    /// The mounts.
    pub mounts: Arc<Mounts>,
    /// What `/metrics` shows.
    pub registry: Arc<Registry>,
    /// The snapshots that containerd has, when they are served.
    pub snapshotter: Option<Arc<Snapshotter>>,
    /// Says why the daemon could not start again with its configuration as it is now.
    pub check: Check,
    /// Set to end the daemon.
    pub stop: watch::Sender<Option<Stop>>,
}

/// Asks whether the daemon would start.
pub type Check = fn() -> Result<(), String>;

/// How the daemon shall end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Mounts and keeper stay.
    Daemon,
    /// Nothing is left: the keeper goes too.
    Everything,
    /// Mounts and keeper stay, and the program as it is now on disk takes this one's place.
    Again,
}

/// Why the control socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A daemon with another root answers there.
    #[error("another skimmerd answers on {}; stop it, or choose another socket", .0.display())]
    InUse(PathBuf),
    /// Something else lies there.
    #[error("{} is in the way: it is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("cannot listen on {}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// Opens the control socket, mode 0600. A stale one, on which nobody answers, is replaced.
///
/// # Errors
/// [`SocketError`].
pub fn listen(path: &Path) -> Result<UnixListener, SocketError> {
    use std::os::unix::fs::FileTypeExt;
    let failed = |source| SocketError::Io { path: path.into(), source };
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(SocketError::NotASocket(path.into()));
        }
        match UnixStream::connect(path) {
            Ok(_) => return Err(SocketError::InUse(path.into())),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        }
    }
    // Bound beside its place and renamed into it, so that nobody ever sees it with another mode.
    let temporary = path.with_extension(format!("{}.new", std::process::id()));
    let _ = std::fs::remove_file(&temporary);
    let listener = StdListener::bind(&temporary).map_err(failed)?;
    let place = || {
        std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        std::fs::rename(&temporary, path)
    };
    if let Err(error) = place() {
        let _ = std::fs::remove_file(&temporary);
        return Err(failed(error));
    }
    UnixListener::from_std(listener).map_err(failed)
}

/// Serves the metrics alone, by TCP, until `stop` is set.
///
/// # Errors
/// When accepting fails for good.
pub async fn serve_metrics(listener: TcpListener, api: Api) -> io::Result<()> {
    let mut stop = api.stop.subscribe();
    let stopped = async move {
        let _ = stop.wait_for(Option::is_some).await;
    };
    axum::serve(listener, routes::metrics_alone(api)).with_graceful_shutdown(stopped).await
}

/// Serves until `stop` is set, then finishes the requests that have begun.
///
/// # Errors
/// When accepting fails for good.
pub async fn serve(listener: UnixListener, api: Api) -> io::Result<()> {
    let mut stop = api.stop.subscribe();
    let stopped = async move {
        let _ = stop.wait_for(Option::is_some).await;
    };
    axum::serve(listener, router(api)).with_graceful_shutdown(stopped).await
}
