//! What is wrong with an image, and where.

use core::fmt;

/// Result of every checked reading function of this crate.
pub type Result<T, E = FormatError> = core::result::Result<T, E>;

/// A broken rule of the format: which structure, which field, where, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{thing}: {field} at {}offset {offset:#x}: {problem}", thing.space())]
pub struct FormatError {
    /// The structure that breaks the rule.
    pub thing: Thing,
    /// Name of the field, as in the structure's definition.
    pub field: &'static str,
    /// Byte offset of the field in the bootstrap (or in the table that [`Thing::space`] names).
    pub offset: u64,
    /// What is wrong.
    pub problem: Problem,
}

/// The structure an error is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thing {
    /// The bootstrap file as a whole.
    Bootstrap,
    /// The EROFS superblock.
    SuperBlock,
    /// The RAFS extended superblock.
    ExtSuperBlock,
    /// Device slot of the blob with this index.
    DeviceSlot(usize),
    /// Blob table entry with this index.
    BlobEntry(usize),
    /// Inode with this nid.
    Inode(u64),
    /// The extended attributes of the inode with this nid.
    Xattrs(u64),
    /// The content of the directory with this nid.
    Directory(u64),
    /// The target of the symlink with this nid.
    Symlink(u64),
    /// The chunk indexes of the file with this nid.
    ChunkIndexes(u64),
    /// Chunk table entry with this position.
    ChunkEntry(usize),
    /// The compression info header of a blob.
    CiHeader,
    /// The compression info array of a blob.
    CiArray,
    /// One entry of the compression info array.
    CiEntry(usize),
    /// One batch or zran context behind the compression info array.
    CiContext(usize),
    /// The table of contents of a blob.
    Toc,
    /// One entry of the table of contents.
    TocEntry(usize),
}

impl Thing {
    /// What the error's offset counts from: empty for the bootstrap, else a word and a space.
    pub fn space(&self) -> &'static str {
        match self {
            Self::CiHeader => "header ",
            Self::CiArray | Self::CiEntry(_) | Self::CiContext(_) => "CI ",
            Self::Toc | Self::TocEntry(_) => "ToC ",
            _ => "",
        }
    }

    pub(crate) fn error(self, field: &'static str, offset: u64, problem: Problem) -> FormatError {
        FormatError { thing: self, field, offset, problem }
    }

    /// Error for a field whose value breaks the rule `expected`.
    pub(crate) fn value(
        self,
        field: &'static str,
        offset: u64,
        found: impl Into<u64>,
        expected: &'static str,
    ) -> FormatError {
        self.error(field, offset, Problem::Value { found: found.into(), expected })
    }
}

impl fmt::Display for Thing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bootstrap => write!(f, "bootstrap"),
            Self::SuperBlock => write!(f, "superblock"),
            Self::ExtSuperBlock => write!(f, "extended superblock"),
            Self::DeviceSlot(i) => write!(f, "device slot {i}"),
            Self::BlobEntry(i) => write!(f, "blob table entry {i}"),
            Self::Inode(nid) => write!(f, "inode {nid}"),
            Self::Xattrs(nid) => write!(f, "xattrs of inode {nid}"),
            Self::Directory(nid) => write!(f, "directory {nid}"),
            Self::Symlink(nid) => write!(f, "symlink {nid}"),
            Self::ChunkIndexes(nid) => write!(f, "chunk indexes of inode {nid}"),
            Self::ChunkEntry(i) => write!(f, "chunk table entry {i}"),
            Self::CiHeader => write!(f, "compression info header"),
            Self::CiArray => write!(f, "compression info"),
            Self::CiEntry(i) => write!(f, "compression info entry {i}"),
            Self::CiContext(i) => write!(f, "compression info context {i}"),
            Self::Toc => write!(f, "table of contents"),
            Self::TocEntry(i) => write!(f, "table of contents entry {i}"),
        }
    }
}

/// What is wrong with a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The bytes end before the structure does.
    #[error(
        "needs bytes up to {need:#x}, but there are only {have:#x}; the image is truncated or its numbers are wrong"
    )]
    Truncated {
        /// End of the structure.
        need: u64,
        /// Length of what is there.
        have: u64,
    },
    /// A value that the format does not allow here.
    #[error("is {found:#x}, must be {expected}")]
    Value {
        /// The value found.
        found: u64,
        /// The rule.
        expected: &'static str,
    },
    /// Two places that must agree do not.
    #[error("is {found:#x}, but {with} says {expected:#x}")]
    Mismatch {
        /// The value found.
        found: u64,
        /// The value at the other place.
        expected: u64,
        /// The other place.
        with: &'static str,
    },
    /// Two ranges that must not share bytes do.
    #[error("overlaps {with}")]
    Overlap {
        /// The other range.
        with: &'static str,
    },
    /// A range that leaves what it lies in.
    #[error("ends at {end:#x}, past the end of {of} at {limit:#x}")]
    OutOfRange {
        /// End of the range.
        end: u64,
        /// Where it must end.
        limit: u64,
        /// What it lies in.
        of: &'static str,
    },
    /// Sum or product of fields leaves 64 bits.
    #[error("overflows")]
    Overflow,
    /// A name, id or target with bytes that may not be there, or of a wrong length.
    #[error("{0}")]
    Text(&'static str),
    /// Something that occurs twice.
    #[error("occurs a second time")]
    Duplicate,
    /// Something that must be there and is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A valid image of a kind that this program does not handle.
    #[error("{0}")]
    Unsupported(&'static str),
}
