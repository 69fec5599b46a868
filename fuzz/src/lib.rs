//! The bodies of the fuzz targets: one module per reader of bytes that come from outside.
//!
//! Each `run` takes any bytes and must return; it panics when the code under test breaks a promise. The fuzzing engine
//! calls it from `targets/` (feature `libfuzzer`, `cargo xtask fuzz`); `tests/fuzz_corpus.rs` calls it with every file of the
//! corpus on any compiler.
#![forbid(unsafe_code)]

pub mod blob_tail;
pub mod cachefiles_message;
pub mod chunk;
pub mod chunk_fetch;
pub mod engine_ops;
pub mod fanotify_event;
pub mod image;
pub mod image_rows;
pub mod keeper_packet;
pub mod layer_tar;
pub mod manifest;
pub mod reference;
pub mod signature;
mod tar;

/// A target's body.
pub type Run = fn(&[u8]);

/// Every target by name; `corpus/` has a folder for each.
pub const TARGETS: &[(&str, Run)] = &[
    ("blob_tail", blob_tail::run),
    ("cachefiles_message", cachefiles_message::run),
    ("chunk", chunk::run),
    ("chunk_fetch", chunk_fetch::run),
    ("engine_ops", engine_ops::run),
    ("fanotify_event", fanotify_event::run),
    ("image", image::run),
    ("image_rows", image_rows::run),
    ("keeper_packet", keeper_packet::run),
    ("layer_tar", layer_tar::run),
    ("manifest", manifest::run),
    ("reference", reference::run),
    ("signature", signature::run),
];
