//! Builds RAFS v6 images from OCI images and directories.
//!
//! The way of the bytes: an input ([`Input`]) is read layer by layer. Names and metadata go into one tree, file data is
//! cut into chunks, hashed and compressed by a few threads, and each chunk that the image does not have yet goes into
//! the layer's blob. At the end the merged tree becomes the bootstrap, and blobs, bootstrap, config and manifest make
//! up an OCI image in the destination layout.
//!
//! Memory grows with the number of files and chunks, never with the size of a file. The same input and options give
//! the same bytes. An error leaves nothing behind in the destination but complete blobs.
#![forbid(unsafe_code)]

mod blob;
mod bootstrap;
mod convert;
pub mod device;
mod dirinput;
mod error;
mod layer;
mod ociinput;
mod optimize;
mod options;
mod pack;
mod package;
mod pool;
mod progress;
mod report;
mod tar;
mod tarinput;
mod tree;

pub use convert::{Input, convert};
pub use error::{EntryProblem, MkfsError};
pub use ociinput::Selector;
pub use optimize::{Converted, Optimized, Pieces, Touch, optimize};
pub use options::{Compression, Digest, Options, UnsupportedXattrs};
pub use progress::{Phase, Progress};
pub use report::{BlobReport, Dedup, Report, TreeCounts};
