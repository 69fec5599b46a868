//! What a caller can choose about a conversion.

use std::num::NonZeroUsize;

use skimmer_fetcher::oci::Platform;

use crate::MkfsError;

/// How chunks are stored in blobs. A chunk that does not shrink is stored as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compression {
    /// Chunks are stored as they are.
    None,
    /// One zstd frame per chunk.
    Zstd {
        /// zstd's level, 1 to 22; 3 is zstd's own default.
        level: i32,
    },
}

/// The hash that names chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Digest {
    /// SHA-256.
    Sha256,
    /// BLAKE3, 32 bytes.
    Blake3,
}

/// What happens to extended attributes outside of the namespaces that EROFS has
/// (`user.`, `trusted.`, `security.`, `system.posix_acl_access`, `system.posix_acl_default`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnsupportedXattrs {
    /// The build ends with an error that names the file and the attribute.
    Refuse,
    /// They are left out.
    Drop,
}

/// Choices of a conversion. The same input and the same options give the same bytes, whatever `threads` is.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// How chunks are stored.
    pub compression: Compression,
    /// Bytes per chunk: a power of two, 4 KiB to 16 MiB.
    pub chunk_size: u32,
    /// The hash that names chunks.
    pub digest: Digest,
    /// Whether chunk table entries carry a CRC-32C beside the digest.
    pub crc32: bool,
    /// Number of threads that hash and compress; `None`: one per processor.
    pub threads: Option<NonZeroUsize>,
    /// Paths, from the root of the image, to list in the prefetch table, most wanted first. "/" alone means everything.
    pub prefetch: Vec<Vec<u8>>,
    /// What happens to extended attributes that EROFS has no namespace for.
    pub unsupported_xattrs: UnsupportedXattrs,
    /// Whether an entry of a layer may pass through a symlink with an absolute target (such as `var/run -> /run`). The
    /// target is then taken from the root of the image, as container runtimes do when they unpack a layer; no target
    /// leads out of it. When false such an entry is an error.
    pub follow_absolute_symlinks: bool,
    /// The platform that the config of a directory's image names. An image keeps its own.
    pub platform: Platform,
    /// Tag of the result in the destination's index.
    pub tag: Option<String>,
    /// Whether the platform in the index says `os.features: ["nydus.remoteimage.v1"]`.
    pub mark_platform: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            compression: Compression::Zstd { level: 3 },
            chunk_size: 1 << 20,
            digest: Digest::Sha256,
            crc32: true,
            threads: None,
            prefetch: Vec::new(),
            unsupported_xattrs: UnsupportedXattrs::Refuse,
            follow_absolute_symlinks: true,
            platform: Platform::host(),
            tag: None,
            mark_platform: false,
        }
    }
}

impl Options {
    pub(crate) fn check(&self) -> Result<(), MkfsError> {
        if !self.chunk_size.is_power_of_two() || !(1 << 12..=1 << 24).contains(&self.chunk_size) {
            return Err(MkfsError::Option {
                option: "chunk size",
                reason: format!("{} is not a power of two from 4096 to 16777216", self.chunk_size),
            });
        }
        if let Compression::Zstd { level } = self.compression
            && !(1..=22).contains(&level)
        {
            return Err(MkfsError::Option {
                option: "zstd level",
                reason: format!("{level} is outside of 1 to 22"),
            });
        }
        Ok(())
    }
}
