//! What can go wrong while an image is built. Every message names the input, the place in it and the reason.

use std::io;
use std::path::{Path, PathBuf};

/// An error of [`crate::convert`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MkfsError {
    /// An option does not make sense.
    #[error("option {option}: {reason}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// Why it is refused and what is allowed.
        reason: String,
    },
    /// A system call on a file of the input or the output failed.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A layer's tar holds something that cannot become part of an image.
    #[error("layer {layer}: entry \"{path}\" at tar offset {offset}: {problem}")]
    Entry {
        /// Digest of the layer, or its name.
        layer: String,
        /// Name of the entry as the tar gives it, escaped; empty when the header could not be read.
        path: String,
        /// Byte offset of the entry's first header in the uncompressed tar.
        offset: u64,
        /// What is wrong with it.
        problem: EntryProblem,
    },
    /// A layer could not be read to its end.
    #[error("layer {layer}: cannot read the tar stream at offset {offset}: {source}")]
    LayerRead {
        /// Digest of the layer, or its name.
        layer: String,
        /// Byte offset in the uncompressed tar.
        offset: u64,
        /// The decoder's or the system's answer.
        source: io::Error,
    },
    /// A layer's bytes are not those its descriptor promises.
    #[error(
        "layer {layer}: {what} is {found}, but {expected} is expected: the layer is damaged or was replaced"
    )]
    LayerDigest {
        /// Digest of the layer.
        layer: String,
        /// Which digest or size differs.
        what: &'static str,
        /// What the image says.
        expected: String,
        /// What the bytes are.
        found: String,
    },
    /// A file of an input directory cannot be packed.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: EntryProblem,
    },
    /// The input image's manifest, index or config cannot be used.
    #[error("image {image}: {reason}")]
    Image {
        /// Where the image comes from.
        image: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The OCI layout could not be read or written.
    #[error(transparent)]
    Layout(#[from] skimmer_fetcher::layout::LayoutError),
    /// The image passes a limit of the format.
    #[error("the image has {found} {what}, but RAFS v6 allows {limit}: {remedy}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How many there are.
        found: u64,
        /// How many the format allows.
        limit: u64,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A path of the prefetch list is not in the image.
    #[error("prefetch list: \"{path}\" is not in the image")]
    Prefetch {
        /// The path as given.
        path: String,
    },
    /// A chunk could not be compressed.
    #[error("cannot compress a chunk: {reason}")]
    Compress {
        /// The codec's answer.
        reason: String,
    },
    /// A blob could not be expanded to its device form.
    #[error("blob {blob}: {reason}")]
    Device {
        /// Blob id.
        blob: String,
        /// What is wrong, with the chunk and the offset.
        reason: String,
    },
}

impl MkfsError {
    pub(crate) fn io(doing: &'static str, path: impl AsRef<Path>, source: impl Into<io::Error>) -> Self {
        Self::Io { doing, path: path.as_ref().to_owned(), source: source.into() }
    }

    pub(crate) fn image(image: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Image { image: image.into(), reason: reason.into() }
    }
}

/// Why one file or tar entry cannot be packed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EntryProblem {
    /// The name climbs above the root.
    #[error("the path leaves the root of the image")]
    LeavesRoot,
    /// A parent is a symlink with an absolute target, and the options refuse that.
    #[error(
        "the path goes through the symlink \"{link}\" -> \"{target}\", whose target is absolute, which this conversion \
         refuses; when followed, it is taken from the root of the image"
    )]
    AbsoluteSymlink {
        /// The symlink.
        link: String,
        /// Where it points.
        target: String,
    },
    /// Following the parents' symlinks does not end.
    #[error("the path goes through more than {0} symlinks")]
    TooManySymlinks(usize),
    /// A parent exists and is neither a directory nor a symlink.
    #[error("its parent \"{0}\" is not a directory")]
    ParentNotDirectory(String),
    /// A name is empty, too long, or has a byte that no file name can have.
    #[error("the file name {0}")]
    BadName(String),
    /// The root is described as something else than a directory.
    #[error("the root of the image must be a directory")]
    RootNotDirectory,
    /// A hard link's target is nowhere to be found.
    #[error("hard link to \"{0}\", which neither this layer (before the link) nor a lower layer has")]
    LinkTargetMissing(String),
    /// A hard link's target lies outside of the image.
    #[error("hard link to \"{0}\", which leaves the root of the image")]
    LinkTargetOutside(String),
    /// A hard link's target is a directory.
    #[error("hard link to the directory \"{0}\"")]
    LinkTargetDirectory(String),
    /// A symlink's target is empty, too long, or holds a NUL.
    #[error("the symlink's target {0}")]
    BadTarget(String),
    /// A whiteout that names nothing that could be removed.
    #[error("the whiteout names no file")]
    BadWhiteout,
    /// An extended attribute that the format cannot hold.
    #[error("extended attribute \"{name}\" {reason}")]
    Xattr {
        /// Full name.
        name: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A field of the tar header is not what it should be.
    #[error("tar header: {0}")]
    Header(String),
    /// An entry of a kind that a file system does not have.
    #[error("unknown tar entry type {0:?}")]
    UnknownType(char),
    /// The map of a sparse file makes no sense.
    #[error("sparse map: {0}")]
    Sparse(String),
    /// A number is larger than the format can hold.
    #[error("{what} {found} is larger than {limit}")]
    TooLarge {
        /// Which number.
        what: &'static str,
        /// Its value.
        found: u64,
        /// The largest allowed.
        limit: u64,
    },
    /// The file was written to while it was packed.
    #[error("the file changed while it was read; pack a tree that nobody writes to")]
    Changed,
    /// The output lies inside the input.
    #[error("this is the destination; it must not lie inside of the source directory")]
    DestinationInside,
}

/// Shows bytes of a file name in a message: printable, quotes and control bytes escaped.
pub(crate) fn show(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}
