//! The client: one HTTP connection over the daemon's unix socket.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use reqwest::{Method, RequestBuilder, Response};
use serde::de::DeserializeOwned;

use crate::types::{
    ApiError, Mount, MountRequest, PrefetchReport, PrefetchRequest, PrepareRequest, Prepared, PreparedQuery,
    Recording, RecordingQuery, ScrubReport, ScrubRequest, ShutdownReport, ShutdownRequest, StatusReport,
    UmountQuery,
};

/// The host part of the request URLs; a unix socket has none, HTTP wants one.
const AUTHORITY: &str = "http://skimmerd";

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing answers on the socket.
    #[error("skimmerd does not answer on {}: {reason}", socket.display())]
    Unreachable {
        /// The socket that was tried.
        socket: PathBuf,
        /// What the attempt ended with.
        reason: String,
    },
    /// `skimmerd` was started and did not become ready.
    #[error("skimmerd ({}) did not start: {reason}{}", program.display(), log_tail(log))]
    Start {
        /// The program that was run.
        program: PathBuf,
        /// What happened.
        reason: String,
        /// The last lines of its log.
        log: String,
    },
    /// The daemon refused; its own words.
    #[error("{error}")]
    Api {
        /// The daemon's message and remedy.
        error: ApiError,
        /// HTTP status of the reply.
        status: u16,
    },
    /// The daemon's reply could not be read.
    #[error("skimmerd's reply to {request} cannot be read: {reason}")]
    BadReply {
        /// Method and path.
        request: String,
        /// What was wrong with it.
        reason: String,
    },
}

impl ClientError {
    /// What the user can do about it, if anything is known.
    pub fn remedy(&self) -> Option<&str> {
        match self {
            Self::Api { error, .. } => error.remedy.as_deref(),
            Self::Unreachable { .. } => Some("start skimmerd, or name its socket with --socket"),
            Self::Start { .. } => Some("run skimmerd in a terminal to see what stops it"),
            Self::BadReply { .. } => Some("use the skimmer and skimmerd of one version"),
        }
    }
}

fn log_tail(log: &str) -> String {
    if log.is_empty() { String::new() } else { format!("\nits log ends with:\n{log}") }
}

/// A connection to a running daemon.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    socket: Arc<Path>,
}

impl Client {
    /// Connects to the daemon at `socket` and makes sure it answers.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`] when nothing answers there.
    pub async fn connect(socket: impl AsRef<Path>) -> Result<Self, ClientError> {
        let client = Self::new(socket.as_ref())?;
        client.status().await?;
        Ok(client)
    }

    /// A client that has not talked to the daemon yet.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`] when the HTTP client cannot be set up.
    pub fn new(socket: &Path) -> Result<Self, ClientError> {
        // reqwest wants a TLS provider even where no TLS is spoken. Someone else may have installed one: just as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .unix_socket(socket)
            // Without this the system's roots would be loaded, and their absence would be an error.
            .tls_certs_only([])
            .no_proxy()
            .connect_timeout(Duration::from_secs(5))
            .build()
            .map_err(|error| ClientError::Unreachable { socket: socket.into(), reason: chain(&error) })?;
        Ok(Self { http, socket: socket.into() })
    }

    /// The socket this client talks to.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `GET /v1/status`.
    ///
    /// # Errors
    /// As for every call: [`ClientError`].
    pub async fn status(&self) -> Result<StatusReport, ClientError> {
        self.json(Method::GET, "/v1/status", |request| request).await
    }

    /// `GET /v1/mounts`.
    ///
    /// # Errors
    /// As for every call: [`ClientError`].
    pub async fn mounts(&self) -> Result<Vec<Mount>, ClientError> {
        self.json(Method::GET, "/v1/mounts", |request| request).await
    }

    /// `POST /v1/mounts`: returns when the mount is usable.
    ///
    /// # Errors
    /// [`ClientError::Api`] with the daemon's reason and remedy; nothing is left mounted then.
    pub async fn mount(&self, request: &MountRequest) -> Result<Mount, ClientError> {
        self.json(Method::POST, "/v1/mounts", |builder| builder.json(request)).await
    }

    /// `DELETE /v1/mounts`: returns the mount that was taken down.
    ///
    /// # Errors
    /// [`ClientError::Api`] with status 409 while files on it are open, 404 when nothing of ours is mounted there.
    pub async fn umount(&self, target: impl AsRef<Path>, detach: bool) -> Result<Mount, ClientError> {
        let query = UmountQuery { target: target.as_ref().into(), detach };
        self.json(Method::DELETE, "/v1/mounts", |builder| builder.query(&query)).await
    }

    /// `POST /v1/prepared`: returns when the image can be mounted by others.
    ///
    /// # Errors
    /// [`ClientError::Api`] with the daemon's reason and remedy.
    pub async fn prepare(&self, request: &PrepareRequest) -> Result<Prepared, ClientError> {
        self.json(Method::POST, "/v1/prepared", |builder| builder.json(request)).await
    }

    /// `GET /v1/prepared`.
    ///
    /// # Errors
    /// As for every call: [`ClientError`].
    pub async fn prepared(&self) -> Result<Vec<Prepared>, ClientError> {
        self.json(Method::GET, "/v1/prepared", |request| request).await
    }

    /// `DELETE /v1/prepared`: gives up a prepared image, named as it was or by its bootstrap.
    ///
    /// # Errors
    /// [`ClientError::Api`] with status 409 while it is mounted, 404 when it is not prepared.
    pub async fn release(&self, image: &str) -> Result<Prepared, ClientError> {
        let query = PreparedQuery { image: image.into() };
        self.json(Method::DELETE, "/v1/prepared", |builder| builder.query(&query)).await
    }

    /// `GET /v1/recordings`: what was read and fetched since the mount, when that is recorded.
    ///
    /// # Errors
    /// [`ClientError::Api`] with status 404 when nothing of ours is mounted there, or it is not recorded.
    pub async fn recording(&self, target: impl AsRef<Path>) -> Result<Recording, ClientError> {
        let query = RecordingQuery { target: target.as_ref().into() };
        self.json(Method::GET, "/v1/recordings", |builder| builder.query(&query)).await
    }

    /// `POST /v1/scrub`: reads the cache again, compares and repairs it; answers at its end.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn scrub(&self, request: &ScrubRequest) -> Result<ScrubReport, ClientError> {
        self.json(Method::POST, "/v1/scrub", |builder| builder.json(request)).await
    }

    /// `GET /v1/scrub`: how far the scrub is, or what the last one came to.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn scrubbed(&self) -> Result<ScrubReport, ClientError> {
        self.json(Method::GET, "/v1/scrub", |builder| builder).await
    }

    /// `DELETE /v1/scrub`: ends it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn stop_scrub(&self) -> Result<ScrubReport, ClientError> {
        self.json(Method::DELETE, "/v1/scrub", |builder| builder).await
    }

    /// `POST /v1/prefetch`: fetches of a mounted image before it is read.
    ///
    /// # Errors
    /// [`ClientError::Api`] with status 404 when nothing of ours is mounted there, or a path is not in the image.
    pub async fn prefetch(&self, request: &PrefetchRequest) -> Result<PrefetchReport, ClientError> {
        self.json(Method::POST, "/v1/prefetch", |builder| builder.json(request)).await
    }

    /// `POST /v1/shutdown`: the daemon exits after its answer.
    ///
    /// # Errors
    /// As for every call: [`ClientError`].
    pub async fn shutdown(&self, umount: bool) -> Result<ShutdownReport, ClientError> {
        self.json(Method::POST, "/v1/shutdown", |builder| builder.json(&ShutdownRequest { umount })).await
    }

    /// `POST /v1/reload`: the daemon's program, as it is on disk now, takes the place of the one that runs.
    ///
    /// # Errors
    /// [`ClientError::Api`] with status 400 when it would not start: then nothing changes.
    pub async fn reload(&self) -> Result<(), ClientError> {
        self.send(Method::POST, "/v1/reload", |request| request).await.map(drop)
    }

    /// `GET /metrics`: the text that Prometheus reads.
    ///
    /// # Errors
    /// As for every call: [`ClientError`].
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let reply = self.send(Method::GET, "/metrics", |request| request).await?;
        reply.text().await.map_err(|error| bad_reply("GET /metrics", &error))
    }

    async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        fill: impl FnOnce(RequestBuilder) -> RequestBuilder,
    ) -> Result<T, ClientError> {
        let name = format!("{method} {path}");
        let reply = self.send(method, path, fill).await?;
        reply.json().await.map_err(|error| bad_reply(&name, &error))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        fill: impl FnOnce(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response, ClientError> {
        let name = format!("{method} {path}");
        let request = fill(self.http.request(method, format!("{AUTHORITY}{path}")));
        let reply = request.send().await.map_err(|error| {
            if error.is_connect() || error.is_request() {
                ClientError::Unreachable { socket: self.socket.to_path_buf(), reason: root_cause(&error) }
            } else {
                bad_reply(&name, &error)
            }
        })?;
        let status = reply.status();
        if status.is_success() {
            return Ok(reply);
        }
        let text = reply.text().await.map_err(|error| bad_reply(&name, &error))?;
        let error = serde_json::from_str(&text).unwrap_or_else(|_| ApiError {
            error: format!("{name}: HTTP status {status}: {}", text.trim()),
            remedy: None,
        });
        Err(ClientError::Api { error, status: status.as_u16() })
    }
}

fn bad_reply(request: &str, error: &reqwest::Error) -> ClientError {
    ClientError::BadReply { request: request.into(), reason: chain(error) }
}

/// The whole chain of causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

/// The last cause: "Connection refused" says more than reqwest's three layers above it.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_socket_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("none.sock");
        let error = Client::connect(&socket).await.unwrap_err();
        assert!(matches!(error, ClientError::Unreachable { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("none.sock") && text.contains("No such file"), "{text}");
        assert!(error.remedy().is_some());
    }

    #[test]
    fn no_certificates_are_needed() {
        const INSIDE: &str = "SKIMMER_CLIENT_TEST_WITHOUT_CERTIFICATES";
        if std::env::var_os(INSIDE).is_some() {
            Client::new(Path::new("/nonexistent.sock")).unwrap();
            return;
        }
        // A process of its own, whose system has no certificate authorities.
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "client::tests::no_certificates_are_needed", "--nocapture"])
            .envs([(INSIDE, "1"), ("SSL_CERT_FILE", "/dev/null"), ("SSL_CERT_DIR", "/nonexistent")])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains("1 passed"), "the child did not run the test: {text}");
    }
}
