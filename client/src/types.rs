//! What travels over the control socket, as JSON.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How the kernel asks for data that is not cached yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum AttachMode {
    /// The best mode that works on this node (a request only; a [`Mount`] never says `auto`).
    #[default]
    Auto,
    /// EROFS over fscache: READ messages on `/dev/cachefiles`.
    Fscache,
    /// A file-backed mount of sparse files under fanotify pre-content marks.
    Fanotify,
    /// A plain file-backed mount of complete files; no event ever.
    Local,
}

impl AttachMode {
    /// The name used in requests, reports and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Fscache => "fscache",
            Self::Fanotify => "fanotify",
            Self::Local => "local",
        }
    }
}

impl fmt::Display for AttachMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for AttachMode {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        [Self::Auto, Self::Fscache, Self::Fanotify, Self::Local]
            .into_iter()
            .find(|mode| mode.name() == s)
            .ok_or_else(|| format!("unknown attach mode `{s}`; use auto, fscache, fanotify or local"))
    }
}

/// A registry login. Kept by the daemon in memory and in its runtime directory (mode 0600), never in the cache.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Credentials {
    /// User name.
    pub username: String,
    /// Password or token.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

/// `POST /v1/mounts`: mount an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct MountRequest {
    /// The image as skopeo names it: `docker://host/name:tag`, `oci:DIR[:TAG]`, `host/name:tag`, or a layout directory.
    /// Paths must be absolute: the daemon has another working directory.
    pub image: String,
    /// An existing directory, absolute.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub target: PathBuf,
    /// The wanted attach mode.
    #[serde(default)]
    pub mode: AttachMode,
    /// Login for the image's registry; without it the daemon's own docker configuration is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<Credentials>,
    /// Registry hosts (`host[:port]`) that may be reached without TLS.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub insecure: Vec<String>,
    /// PEM file with additional certificate authorities, absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub ca: Option<PathBuf>,
    /// Whether reads and fetches are written down, until the mount is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<Record>,
    /// W3C trace context of what asks for the mount (`00-…-…-01`): traces of its misses go on in that trace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// The chain id that the image's layers must have (`sha256:…`), for who knows the mount by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chain_id: Option<String>,
}

impl MountRequest {
    /// A request with every option at its default.
    pub fn new(image: impl Into<String>, target: impl Into<PathBuf>) -> Self {
        Self {
            image: image.into(),
            target: target.into(),
            mode: AttachMode::Auto,
            credentials: None,
            insecure: Vec::new(),
            ca: None,
            record: None,
            traceparent: None,
            chain_id: None,
        }
    }
}

/// How the use of a mount is written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Record {
    /// As it happens: for a picture of a cold start.
    Events,
    /// With nothing fetched but what is read: for an access trace. Nothing of the image may be cached before.
    Exact,
}

impl FromStr for Record {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "events" => Ok(Self::Events),
            "exact" => Ok(Self::Exact),
            other => Err(format!("unknown kind of recording `{other}`; use events or exact")),
        }
    }
}

/// `GET /v1/recordings`: what was read and fetched of an image since it was mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct Recording {
    /// Version of this form: 1.
    pub version: u32,
    /// The image as it was named.
    pub image: String,
    /// SHA-256 of its bootstrap.
    pub bootstrap: String,
    /// The attach mode.
    pub mode: AttachMode,
    /// How it was recorded.
    pub record: Record,
    /// Whether there was more than a recording keeps.
    pub cut: bool,
    /// Ids of the blobs, in device order.
    pub blobs: Vec<String>,
    /// Kernel requests, in the order in which they came. What is cached already the kernel reads without one, but for
    /// exact recordings over fanotify, which have every read.
    pub reads: Vec<RecordedRead>,
    /// Fetches, in the order in which they began.
    pub fetches: Vec<RecordedFetch>,
}

/// One kernel request of a [`Recording`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RecordedRead {
    /// Microseconds since the recording began.
    pub at_us: u64,
    /// Position in [`Recording::blobs`].
    pub blob: usize,
    /// First byte on the blob's device.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Microseconds until its answer.
    pub took_us: u64,
    /// Whether it was refused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub failed: bool,
}

/// One fetch of a [`Recording`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RecordedFetch {
    /// Microseconds since the recording began.
    pub at_us: u64,
    /// Position in [`Recording::blobs`].
    pub blob: usize,
    /// First byte on the blob's device.
    pub offset: u64,
    /// Bytes there.
    pub length: u64,
    /// Bytes of it as it is stored.
    pub stored_bytes: u64,
    /// Microseconds until its last chunk was verified.
    pub took_us: u64,
    /// Whether a read waited for it when it was planned.
    pub demand: bool,
    /// Whether it made a request of its own; else it went on with that of the fetch before it.
    pub request: bool,
    /// Whether it failed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub failed: bool,
}

/// `GET /v1/recordings`: which mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::IntoParams))]
#[cfg_attr(feature = "schema", into_params(parameter_in = Query))]
#[serde(deny_unknown_fields)]
pub struct RecordingQuery {
    /// Where it is mounted.
    #[cfg_attr(feature = "schema", param(value_type = String))]
    pub target: PathBuf,
}

/// `POST /v1/prefetch`: fetch of a mounted image before it is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct PrefetchRequest {
    /// Where it is mounted.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub target: PathBuf,
    /// Paths from the image's root; directories with all that is in them. Empty: the whole image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schema(value_type = Vec<String>))]
    pub paths: Vec<PathBuf>,
    /// Only when nobody reads, at the pace of the configuration.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub background: bool,
    /// Answer when it is all there, not when it is ordered.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub wait: bool,
}

/// The answer to [`PrefetchRequest`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct PrefetchReport {
    /// Files named or found.
    pub files: u64,
    /// Bytes of chunks (uncompressed, whole blocks) that they need.
    pub bytes: u64,
    /// Of those, bytes that were not cached at the time of the answer.
    pub missing_bytes: u64,
}

/// `POST /v1/scrub`: a look at everything that is cached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ScrubRequest {
    /// MiB to read each second at most, 0 for no limit.
    #[serde(default)]
    pub mib_per_second: u64,
    /// Leave what is bad as it is.
    #[serde(default)]
    pub check_only: bool,
}

/// What a scrub came to so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct ScrubReport {
    /// It goes on.
    pub running: bool,
    /// Blobs in the cache.
    pub blobs: u64,
    /// Of those, looked at.
    pub blobs_done: u64,
    /// Bootstraps read.
    #[serde(default)]
    pub bootstraps: u64,
    /// Chunks read.
    pub chunks: u64,
    /// The bytes of both, uncompressed.
    pub bytes: u64,
    /// Chunks and bootstraps that were not what was verified when they were written.
    pub bad: u64,
    /// Of those, written anew, or dropped because nothing mounted needs them.
    pub repaired: u64,
    /// Things that could not be read or repaired.
    pub failed: u64,
    /// The first of them: where, and why.
    pub failures: Vec<String>,
    /// How long it took, milliseconds; 0 while it runs.
    pub took_ms: u64,
}

/// One live mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Mount {
    /// Where it is mounted.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub target: PathBuf,
    /// The image as it was named in the request.
    pub image: String,
    /// Digest of the manifest that the name meant at the time (`sha256:…`).
    pub manifest: String,
    /// The mode in use; never `auto`.
    pub mode: AttachMode,
    /// Why this mode.
    pub reason: String,
    /// SHA-256 of the bootstrap, which is also the fsid.
    pub bootstrap: String,
    /// Blob ids in device order.
    pub blobs: Vec<String>,
    /// Seconds since the epoch when it was mounted.
    pub mounted_at: u64,
    /// The trace context of the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// Why the daemon cannot serve it, if so: reads of what is not cached fail or wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

/// `POST /v1/prepared`: make an image ready to be mounted by others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct PrepareRequest {
    /// The image, as in [`MountRequest`].
    pub image: String,
    /// The wanted attach mode.
    #[serde(default)]
    pub mode: AttachMode,
    /// Login for the image's registry; without it the daemon's own docker configuration is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<Credentials>,
    /// Registry hosts (`host[:port]`) that may be reached without TLS.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub insecure: Vec<String>,
    /// PEM file with additional certificate authorities, absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub ca: Option<PathBuf>,
}

/// An image that others can mount, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Prepared {
    /// The image as it was named in the request.
    pub image: String,
    /// Digest of the manifest that the name meant at the time (`sha256:…`).
    pub manifest: String,
    /// The mode in use; never `auto`.
    pub mode: AttachMode,
    /// Why this mode.
    pub reason: String,
    /// SHA-256 of the bootstrap, which is also the fsid.
    pub bootstrap: String,
    /// Blob ids in device order.
    pub blobs: Vec<String>,
    /// Type of the mount: `erofs`.
    pub fstype: String,
    /// Its source: `none` over fscache, else a file. mount(8) would make a loop device of a file, through which holes
    /// read as zeros: use mount(2) or fsopen(2).
    pub source: String,
    /// Its options, in this order; all but `ro` are the file system's own.
    pub options: Vec<String>,
    /// Whether it has been seen mounted: it is released when its last mount goes.
    pub mounted: bool,
    /// Seconds since the epoch when it was prepared.
    pub prepared_at: u64,
}

/// `DELETE /v1/prepared`: which image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::IntoParams))]
#[cfg_attr(feature = "schema", into_params(parameter_in = Query))]
#[serde(deny_unknown_fields)]
pub struct PreparedQuery {
    /// As it was named, or its bootstrap.
    pub image: String,
}

/// Whether an attach mode can be used on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct ModeReport {
    /// The mode.
    pub mode: AttachMode,
    /// Whether it can be used.
    pub usable: bool,
    /// What was found, or what is missing.
    pub reason: String,
}

/// State of one blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct BlobReport {
    /// Blob id: SHA-256 of the blob as stored at the registry.
    pub id: String,
    /// Size of the uncompressed device, bytes.
    pub device_bytes: u64,
    /// Bytes of the chunks that mounted images refer to.
    pub referenced_bytes: u64,
    /// Of those, bytes on disk and verified.
    pub ready_bytes: u64,
    /// Fetches of it under way.
    pub fetches: u64,
    /// Kernel requests waiting for data of this blob.
    pub pending_reads: u64,
    /// Kernel requests seen for this blob since the daemon started.
    pub reads: u64,
    /// Whether the kernel still asks us before reading it (a fanotify mark, or an open cachefiles object).
    pub watched: bool,
    /// The last failure, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

/// State of the process that holds the kernel's descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct KeeperReport {
    /// Its socket.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub socket: PathBuf,
    /// Whether the daemon is connected to it.
    pub connected: bool,
    /// Files it held when this daemon started.
    pub inherited_files: u64,
}

/// `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct StatusReport {
    /// Version of the daemon.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// When it started: milliseconds since 1970, UTC.
    #[serde(default)]
    pub started_at_ms: u64,
    /// Its root directory (cache and state).
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub root: PathBuf,
    /// The attach modes of this node.
    pub modes: Vec<ModeReport>,
    /// The keeper.
    pub keeper: KeeperReport,
    /// Size of the buffer memory, bytes.
    pub buffer_bytes: u64,
    /// Bytes of it in use: being fetched, verified or written.
    pub buffer_used_bytes: u64,
    /// Disk space that the cache takes, bytes.
    #[serde(default)]
    pub cache_bytes: u64,
    /// What it may take; 0 for no limit.
    #[serde(default)]
    pub cache_budget_bytes: u64,
    /// Live mounts, by target.
    pub mounts: Vec<Mount>,
    /// Images that others mount, by name.
    #[serde(default)]
    pub prepared: Vec<Prepared>,
    /// Blobs of live mounts, by id.
    pub blobs: Vec<BlobReport>,
}

/// Query of `DELETE /v1/mounts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::IntoParams))]
#[cfg_attr(feature = "schema", into_params(parameter_in = Query))]
#[serde(deny_unknown_fields)]
pub struct UmountQuery {
    /// The mount's target.
    #[cfg_attr(feature = "schema", param(value_type = String))]
    pub target: PathBuf,
    /// Detach although files are open (MNT_DETACH).
    #[serde(default)]
    pub detach: bool,
}

/// `POST /v1/shutdown`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct ShutdownRequest {
    /// Unmount everything first and stop the keeper too. Without it mounts and keeper stay, and reads of data that is
    /// not cached wait for the next daemon.
    #[serde(default)]
    pub umount: bool,
}

/// Answer to `POST /v1/shutdown`; the daemon exits after sending it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct ShutdownReport {
    /// Mounts taken down.
    #[cfg_attr(feature = "schema", schema(value_type = Vec<String>))]
    pub unmounted: Vec<PathBuf>,
    /// Mounts that stay.
    #[cfg_attr(feature = "schema", schema(value_type = Vec<String>))]
    pub remaining: Vec<PathBuf>,
    /// Whether nothing uses an image any more; known when everything was to be unmounted.
    #[serde(default)]
    pub idle: bool,
    /// Whether the keeper, which then holds nothing, is told to exit too.
    pub keeper_stopped: bool,
}

/// Every reply that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[error("{error}")]
pub struct ApiError {
    /// What went wrong, and where.
    pub error: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_read_back_by_name() {
        for mode in [AttachMode::Auto, AttachMode::Fscache, AttachMode::Fanotify, AttachMode::Local] {
            assert_eq!(mode.name().parse::<AttachMode>(), Ok(mode));
            assert_eq!(serde_json::to_string(&mode).unwrap(), format!("\"{mode}\""));
        }
        assert!("loop".parse::<AttachMode>().unwrap_err().contains("loop"));
    }

    #[test]
    fn a_request_needs_only_image_and_target() {
        let request: MountRequest = serde_json::from_str(r#"{"image":"oci:/a","target":"/mnt"}"#).unwrap();
        assert_eq!(request, MountRequest::new("oci:/a", "/mnt"));
        let typo = serde_json::from_str::<MountRequest>(r#"{"image":"a","target":"/m","mod":"auto"}"#);
        assert!(typo.unwrap_err().to_string().contains("mod"));
    }

    #[test]
    fn debug_hides_the_password() {
        let text = format!("{:?}", Credentials { username: "me".into(), password: "hunter2".into() });
        assert!(text.contains("me") && !text.contains("hunter2"));
    }
}
