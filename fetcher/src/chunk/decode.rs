//! Bounded decoders: the output slice is the only place they write to, and it must be filled exactly.

use std::cell::RefCell;
use std::io::Read as _;

use super::{ChunkError, ChunkSpec, Codec};

thread_local! {
    // A context is worth keeping: making one costs more than decoding a small chunk.
    static ZSTD: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

pub(super) fn decode(spec: &ChunkSpec, stored: &[u8], out: &mut [u8]) -> Result<(), ChunkError> {
    if u64::try_from(stored.len()) != Ok(u64::from(spec.stored_len)) {
        let detail = format!("{} stored bytes, the chunk map says {}", stored.len(), spec.stored_len);
        return Err(ChunkError::Decode { codec: spec.codec, detail });
    }
    let written = match spec.codec {
        Codec::None => {
            out.copy_from_slice(stored);
            out.len()
        }
        Codec::Lz4Block => lz4_flex::block::decompress_into(stored, out)
            .map_err(|error| ChunkError::Decode { codec: spec.codec, detail: error.to_string() })?,
        Codec::Gzip => gunzip(stored, out)
            .map_err(|error| ChunkError::Decode { codec: spec.codec, detail: error.to_string() })?,
        Codec::Zstd => unzstd(stored, out)
            .map_err(|error| ChunkError::Decode { codec: spec.codec, detail: error.to_string() })?,
    };
    if written != out.len() {
        return Err(ChunkError::Size { got: u64::try_from(written).unwrap_or(u64::MAX), expected: spec.len });
    }
    Ok(())
}

fn unzstd(stored: &[u8], out: &mut [u8]) -> std::io::Result<usize> {
    ZSTD.with_borrow_mut(|slot| {
        let decoder = match slot {
            Some(decoder) => decoder,
            None => slot.insert(zstd::bulk::Decompressor::new()?),
        };
        decoder.decompress_to_buffer(stored, out)
    })
}

fn gunzip(stored: &[u8], out: &mut [u8]) -> std::io::Result<usize> {
    let mut decoder = flate2::bufread::GzDecoder::new(stored);
    let mut filled = 0;
    while filled < out.len() {
        match decoder.read(&mut out[filled..])? {
            0 => return Ok(filled),
            count => filled += count,
        }
    }
    // The member must end here: its trailer is checked by this read.
    if decoder.read(&mut [0; 1])? != 0 {
        return Err(std::io::Error::other("more bytes than the chunk map says"));
    }
    if !decoder.into_inner().is_empty() {
        return Err(std::io::Error::other("bytes after the end of the gzip member"));
    }
    Ok(filled)
}
