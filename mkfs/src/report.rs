//! What a conversion made, in numbers.

use serde::Serialize;

/// The result of [`crate::convert`].
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// Digest of the new manifest, `sha256:…`.
    pub manifest: String,
    /// Tag of the new manifest in the destination's index, if it got one.
    pub tag: Option<String>,
    /// sha256 of the bootstrap file, 64 hex digits. It is also the image's fsid.
    pub bootstrap: String,
    /// Length of the bootstrap file in bytes.
    pub bootstrap_bytes: u64,
    /// The blobs that the image refers to, in the order of its device table.
    pub blobs: Vec<BlobReport>,
    /// Layers whose new data the merged tree does not use, since upper layers hide it. They are not in the result.
    pub hidden_blobs: usize,
    /// Number of layers read; 1 for a directory.
    pub layers: usize,
    /// What the tree consists of.
    pub tree: TreeCounts,
    /// Deduplication within the image.
    pub dedup: Dedup,
    /// Bytes of file data read, holes included.
    pub data_bytes: u64,
    /// Wall clock time in seconds.
    pub elapsed_seconds: f64,
}

/// One blob of a new image.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct BlobReport {
    /// 64 hex digits: sha256 of the blob file and digest of its layer.
    pub id: String,
    /// Length of the blob file in bytes.
    pub stored_bytes: u64,
    /// Length of its uncompressed device in bytes.
    pub device_bytes: u64,
    /// Chunks in the blob.
    pub chunks: usize,
    /// Chunks of it that the merged tree uses.
    pub referenced_chunks: usize,
}

/// Names in the merged tree by kind; a file with two names counts twice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct TreeCounts {
    /// Directories, the root included.
    pub directories: u64,
    /// Names of regular files.
    pub files: u64,
    /// Names of regular files beyond the first of each.
    pub hard_links: u64,
    /// Symlinks.
    pub symlinks: u64,
    /// Char and block devices, fifos, sockets.
    pub special: u64,
    /// Bytes of the regular files, each file counted once.
    pub file_bytes: u64,
}

/// Chunks that were not stored because the image already had them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Dedup {
    /// Chunks read in all layers.
    pub chunks_read: u64,
    /// Chunks stored in all blobs.
    pub chunks_stored: u64,
    /// Uncompressed bytes that were read and not stored again.
    pub bytes_saved: u64,
}
