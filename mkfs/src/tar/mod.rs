//! Layers: tar streams, read header by header.
//!
//! Headers are decoded with the `tar` crate's structs; the stream is walked here, because names and PAX values must be
//! bounded, values may hold any byte, and an error has to tell the entry's offset.

mod header;
mod pax;
mod reader;
mod sparse;

pub(crate) use reader::{TarEntry, TarFault, TarKind, TarReader};
