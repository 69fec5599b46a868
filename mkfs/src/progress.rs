//! How a caller follows a conversion.

/// The part of the work that begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// Reading one layer, packing its file data.
    Layer {
        /// Which, from 0, lowest first.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// Reading a directory, packing its file data.
    Directory,
    /// Writing the bootstrap.
    Bootstrap,
    /// Writing config, manifest and index.
    Package,
}

/// Is told how far a conversion is. All calls come from the thread that called [`crate::convert`].
pub trait Progress {
    /// A phase begins.
    fn phase(&self, phase: Phase) {
        let _ = phase;
    }
    /// How many input bytes there will be in all, when that is known: for an image the stored size of its layers.
    fn total(&self, bytes: u64) {
        let _ = bytes;
    }
    /// So many more input bytes (counted as in [`Progress::total`]) and files were read.
    fn advance(&self, bytes: u64, files: u64) {
        let _ = (bytes, files);
    }
}

/// Nobody looks.
impl Progress for () {}
