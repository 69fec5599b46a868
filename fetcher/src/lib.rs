//! Sources of blob bytes, and the verification of every chunk.
//!
//! A [`source::Source`] yields ranges of blobs: a [`registry::Registry`], an OCI layout on disk
//! ([`layout::Layout`]) or an archive of one ([`archive::Archive`]). [`chunk::fetch`] reads one range,
//! decodes and checks each chunk and hands over [`chunk::Verified`] buffers only. [`image::open`] resolves a
//! converted image to its bootstrap and blobs; [`copy`] moves images between registries and layouts.
//!
//! Nothing here trusts a server: sizes come from the manifest, every reply is judged, every byte that is
//! handed on has matched a digest.
#![forbid(unsafe_code)]

pub mod archive;
mod bucket;
pub mod chunk;
pub mod copy;
mod cpu;
pub mod credentials;
pub mod digest;
mod duration;
pub mod http;
pub mod image;
pub mod layout;
mod local;
pub mod oci;
pub mod origin;
mod place;
pub mod reference;
pub mod registry;
mod retry;
pub mod signature;
pub mod source;
pub mod sources;
#[cfg(feature = "testing")]
pub mod testing;
pub mod traffic;

pub use digest::Digest;
pub use reference::Reference;
pub use source::{BlobRef, Body, ErrorClass, Source, SourceError};
