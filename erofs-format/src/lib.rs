//! RAFS v6 (EROFS) on-disk structures and their checked navigation.
//!
//! One module per on-disk structure, each with raw little-endian structs whose sizes and offsets are asserted at
//! compile time. The writer (`mkfs`) fills them, [`Image`] reads them out of untrusted bytes, [`dump()`]
//! names every byte of a bootstrap.
//!
//! Nothing here does I/O, and nothing here computes digests: whoever reads the bytes has checked their digest.
//! Every number is checked before it is used, and no input makes this crate panic, loop, or allocate more than a
//! small multiple of the input's own length (see [`Image::check`], [`dump()`]).

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

/// Asserts at compile time the size of an on-disk struct and the offset of every field.
macro_rules! assert_layout {
    ($type:ty, $size:literal, { $($field:ident: $offset:literal),+ $(,)? }) => {
        const _: () = {
            assert!(core::mem::size_of::<$type>() == $size);
            assert!(core::mem::align_of::<$type>() == 1);
            $(assert!(core::mem::offset_of!($type, $field) == $offset);)+
        };
    };
}

pub mod blob_table;
pub mod chunk;
pub mod chunk_table;
pub mod compression_info;
pub mod device;
pub mod dirent;
pub mod dump;
pub mod error;
pub mod extended;
pub mod image;
pub mod inode;
pub mod kind;
pub mod layout;
pub mod prefetch;
pub mod superblock;
pub mod toc;
pub mod xattr;

mod bytes;

pub use blob_table::{BlobFeatures, BlobId, Compressor, DigestAlgo};
pub use dump::{Dump, dump};
pub use error::{FormatError, Problem, Result, Thing};
pub use image::{Blob, Chunk, ChunkInfo, DirEntry, Image, Inode, Summary, Xattr};
pub use kind::FileKind;
pub use layout::BLOCK_SIZE;
