//! The control API of `skimmerd`: its JSON types, and a client that speaks it over the daemon's unix socket.
//!
//! ```no_run
//! # async fn demo() -> Result<(), skimmer_client::ClientError> {
//! use skimmer_client::{Client, MountRequest, StartOptions};
//! let (client, _started) = Client::connect_or_start(&StartOptions::default()).await?;
//! let mount = client.mount(&MountRequest::new("oci:/srv/img", "/mnt")).await?;
//! println!("{} ({}): {}", mount.target.display(), mount.mode, mount.reason);
//! # Ok(()) }
//! ```
#![forbid(unsafe_code)]

mod client;
mod start;
mod types;

pub use client::{Client, ClientError};
pub use start::StartOptions;
pub use types::{
    ApiError, AttachMode, BlobReport, Credentials, KeeperReport, ModeReport, Mount, MountRequest,
    PrefetchReport, PrefetchRequest, PrepareRequest, Prepared, PreparedQuery, Record, RecordedFetch,
    RecordedRead, Recording, RecordingQuery, ScrubReport, ScrubRequest, ShutdownReport, ShutdownRequest,
    StatusReport, UmountQuery,
};

/// Where `skimmerd` listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/skimmer/skimmerd.sock";
