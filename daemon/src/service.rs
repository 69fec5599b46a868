//! What a service manager gives and wants: sockets that outlive us, word when we are ready, a sign of life.
//!
//! Nothing of it is needed: without a manager every call does nothing.

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use listenfd::ListenFd;
use sd_notify::NotifyState;
use tokio::net::UnixListener;

use crate::control::{self, SocketError};
use crate::driver::Handle;

/// Sockets that the manager opened for this process: callers wait at them while we are restarted.
#[derive(Debug, Default)]
pub struct Inherited {
    /// In their places among the descriptors, from the third on; `None` where something else was given.
    sockets: Vec<Option<StdListener>>,
}

/// The same sockets, to listen on.
#[derive(Debug, Default)]
pub struct Sockets(Vec<StdListener>);

/// A socket that is listened on.
#[derive(Debug)]
pub struct Socket {
    /// Where callers come in.
    pub listener: UnixListener,
    path: PathBuf,
    own: bool,
}

impl Inherited {
    /// Takes those that came with our start (`LISTEN_FDS`).
    #[must_use]
    pub fn take() -> Self {
        let mut given = ListenFd::from_env();
        let count = given.len();
        let take = |number| {
            let socket = given.take_unix_listener(number);
            socket
                .inspect_err(|error| {
                    eprintln!("skimmerd: socket {number} of the service manager is not used: {error}")
                })
                .ok()
                .flatten()
        };
        Self { sockets: (0..count).map(take).collect() }
    }

    /// Them, to listen on.
    ///
    /// # Errors
    /// When there are too many open files.
    pub fn sockets(&self) -> io::Result<Sockets> {
        self.sockets.iter().flatten().map(StdListener::try_clone).collect::<io::Result<_>>().map(Sockets)
    }

    /// Leaves them to a program that takes the place of this one in the same process.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn pass_on(&self, to: &mut Command) -> io::Result<()> {
        if self.sockets.is_empty() {
            return Ok(());
        }
        for socket in self.sockets.iter().flatten() {
            rustix::io::fcntl_setfd(socket, rustix::io::FdFlags::empty())?;
        }
        to.env("LISTEN_FDS", self.sockets.len().to_string())
            .env("LISTEN_PID", std::process::id().to_string());
        Ok(())
    }
}

impl Sockets {
    /// The one at `path`, or a new one.
    ///
    /// # Errors
    /// As [`control::listen`].
    pub fn listen(&mut self, path: &Path) -> Result<Socket, SocketError> {
        let is_it =
            |given: &StdListener| given.local_addr().is_ok_and(|address| address.as_pathname() == Some(path));
        let Some(index) = self.0.iter().position(is_it) else {
            let listener = control::listen(path)?;
            return Ok(Socket { listener, path: path.into(), own: true });
        };
        let given = self.0.swap_remove(index);
        let listener = given.set_nonblocking(true).and_then(|()| UnixListener::from_std(given));
        let listener = listener.map_err(|source| SocketError::Io { path: path.into(), source })?;
        Ok(Socket { listener, path: path.into(), own: false })
    }
}

impl Socket {
    /// Where it is, if it goes with us.
    pub fn ours(&self) -> Option<PathBuf> {
        self.own.then(|| self.path.clone())
    }
}

/// Tells that requests are answered from now on.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// Tells that a new program takes our place and will say when it is ready.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!("the service manager is not told of the reload: {error}"),
    }
}

/// Tells that we end.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Gives a sign of life as often as it is wanted, as long as the data path answers. Never ends.
pub async fn stay_watched(driver: Handle) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    loop {
        if driver.status().await.is_ok() {
            tell(&[NotifyState::Watchdog]);
        }
        tokio::time::sleep(limit / 3).await;
    }
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!("the service manager does not listen: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_given_socket_is_used_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (given, other) = (dir.path().join("given"), dir.path().join("other"));
        let mut sockets = Sockets(vec![StdListener::bind(&given).unwrap()]);
        let waiting = std::os::unix::net::UnixStream::connect(&given).unwrap();
        let socket = sockets.listen(&given).unwrap();
        assert_eq!(socket.ours(), None);
        socket.listener.accept().await.unwrap();
        drop(waiting);
        assert_eq!(sockets.listen(&other).unwrap().ours(), Some(other));
    }
}
