//! containerd's snapshots service (`containerd.services.snapshots.v1`) as a proxy plugin.
//!
//! Layers of RAFS images are not unpacked: those with data become empty snapshots at once, and the one with the
//! bootstrap a mounted image that has the files of all. Other layers are unpacked by containerd as with its own overlay
//! snapshotter. Whoever mounts images stands behind the trait [`Images`].
#![forbid(unsafe_code)]

mod containerd;
mod error;
mod filter;
mod image_service;
mod images;
mod labels;
mod mounts;
mod service;
mod snapshot;
mod snapshotter;
mod table;
#[cfg(test)]
mod tests;
mod turns;
mod usage;

pub use containerd::Containerd;
pub use error::{Error, Kind};
pub use images::{ImageName, Images, Login, Pull};
pub use service::serve;
pub use snapshotter::Snapshotter;

/// Names the namespace in the metadata of a request.
const NAMESPACE: &str = "containerd-namespace";

/// The messages of the gRPC services, as generated.
mod api {
    #![allow(
        missing_docs,
        unreachable_pub,
        unused_qualifications,
        clippy::allow_attributes_without_reason,
        reason = "generated"
    )]

    include!(concat!(env!("OUT_DIR"), "/api.rs"));

    pub use containerd::services::content::v1 as content;
    pub use containerd::services::images::v1 as images;
    pub use containerd::services::snapshots::v1 as snapshots;
    pub use containerd::types::Mount;
    pub use runtime::v1 as cri;
}
