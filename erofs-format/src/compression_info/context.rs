//! Contexts behind the compression info: batches of small chunks, and restart points of a gzip stream.

use alloc::vec::Vec;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian as le};

use super::{CiEntry, CiFlags, CiHeader};
use crate::{
    blob_table::BlobFeatures,
    bytes,
    error::{Problem, Result, Thing},
    image::Blob,
};

/// Bytes of a context of either kind.
pub const CONTEXT_SIZE: u64 = 40;
/// Most bytes of a batch's output.
pub const MAX_BATCH: u32 = 16 << 20;
/// Most bytes of a zran dictionary: the window of deflate.
pub const MAX_DICTIONARY: u32 = 32768;
/// Most bytes that one zran context may produce or read. Builders aim at 2 MiB; one huge deflate block may be longer.
const MAX_ZRAN_OUTPUT: u32 = 64 << 20;

/// A batch context as on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BatchContext {
    /// Bytes stored; equal to the other size when stored uncompressed.
    pub compressed_size: le::U32,
    /// Bytes of all chunks of the batch.
    pub uncompressed_size: le::U32,
    /// 0.
    pub reserved: [u8; 32],
}

assert_layout!(BatchContext, 40, { compressed_size: 0, uncompressed_size: 4, reserved: 8 });

/// A zran context as on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ZranContext {
    /// Offset of the deflate block in the gzip file.
    pub in_offset: le::U64,
    /// Offset of its output in the tar file.
    pub out_offset: le::U64,
    /// Offset of the dictionary behind the contexts.
    pub dict_offset: le::U64,
    /// Bytes to read.
    pub in_len: le::U32,
    /// Bytes to produce.
    pub out_len: le::U32,
    /// Bytes of the dictionary.
    pub dict_size: le::U32,
    /// Byte that holds the first bits of the block.
    pub ctx_byte: u8,
    /// How many of its high bits.
    pub ctx_bits: u8,
    /// 0.
    pub reserved: le::U16,
}

assert_layout!(ZranContext, 40, {
    in_offset: 0, out_offset: 8, dict_offset: 16, in_len: 24, out_len: 28, dict_size: 32, ctx_byte: 36, ctx_bits: 37,
    reserved: 38,
});

/// Decodes and checks the contexts of a CI whose header has been checked.
pub(super) fn decode(
    ci: &[u8],
    header: &CiHeader,
    blob: &Blob,
) -> Result<(Vec<BatchContext>, Vec<ZranContext>)> {
    let count = u64::from(header.context_count.get());
    if count == 0 {
        return Ok((Vec::new(), Vec::new()));
    }
    let start = header.context_offset.get();
    let size = header.context_size.get();
    if blob.features.contains(BlobFeatures::ZRAN) {
        let contexts = bytes::slice::<ZranContext>(ci, Thing::CiArray, "contexts", start, count)?;
        let dictionaries = size.saturating_sub(count * CONTEXT_SIZE);
        for (i, context) in contexts.iter().enumerate() {
            check_zran(context, dictionaries, blob)
                .map_err(|(field, problem)| Thing::CiContext(i).error(field, start, problem))?;
        }
        Ok((Vec::new(), contexts.to_vec()))
    } else {
        let contexts = bytes::slice::<BatchContext>(ci, Thing::CiArray, "contexts", start, count)?;
        for (i, context) in contexts.iter().enumerate() {
            for (field, size) in [
                ("compressed_size", context.compressed_size),
                ("uncompressed_size", context.uncompressed_size),
            ] {
                if size.get() == 0 || size.get() > MAX_BATCH {
                    return Err(Thing::CiContext(i).value(field, start, size.get(), "1 to 16 MiB"));
                }
            }
        }
        Ok((contexts.to_vec(), Vec::new()))
    }
}

fn check_zran(context: &ZranContext, dictionaries: u64, blob: &Blob) -> Result<(), (&'static str, Problem)> {
    let in_end = context.in_offset.get().checked_add(u64::from(context.in_len.get()));
    match in_end {
        None => return Err(("in_offset", Problem::Overflow)),
        Some(end) if end > blob.compressed_size => {
            return Err((
                "in_offset",
                Problem::OutOfRange { end, limit: blob.compressed_size, of: "the original layer" },
            ));
        }
        Some(_) => {}
    }
    for (field, len) in [("in_len", context.in_len), ("out_len", context.out_len)] {
        if len.get() == 0 || len.get() > MAX_ZRAN_OUTPUT {
            return Err((field, Problem::Value { found: u64::from(len.get()), expected: "1 to 64 MiB" }));
        }
    }
    if context.dict_size.get() > MAX_DICTIONARY {
        let found = u64::from(context.dict_size.get());
        return Err(("dict_size", Problem::Value { found, expected: "at most 32768" }));
    }
    match context.dict_offset.get().checked_add(u64::from(context.dict_size.get())) {
        None => return Err(("dict_offset", Problem::Overflow)),
        Some(end) if end > dictionaries && context.dict_size.get() != 0 => {
            return Err((
                "dict_offset",
                Problem::OutOfRange { end, limit: dictionaries, of: "the dictionaries" },
            ));
        }
        Some(_) => {}
    }
    if context.ctx_bits > 7 {
        let found = u64::from(context.ctx_bits);
        return Err(("ctx_bits", Problem::Value { found, expected: "below 8" }));
    }
    Ok(())
}

/// Checks where a batch or zran chunk says it lies in its context's output.
pub(super) fn check_reference(
    entry: &CiEntry,
    batches: &[BatchContext],
    zran: &[ZranContext],
) -> Result<(), (&'static str, Problem)> {
    let index = entry.data >> 32;
    let position = usize::try_from(index).unwrap_or(usize::MAX);
    let limit = if entry.flags.contains(CiFlags::ZRAN) {
        zran.get(position).map(|context| context.out_len.get())
    } else {
        batches.get(position).map(|context| context.uncompressed_size.get())
    };
    let Some(limit) = limit else {
        return Err(("context", Problem::Value { found: index, expected: "the index of a context" }));
    };
    let end = (entry.data & 0xffff_ffff) + u64::from(entry.uncompressed_size);
    if end > u64::from(limit) {
        let of = "the context's output";
        return Err(("context offset", Problem::OutOfRange { end, limit: u64::from(limit), of }));
    }
    Ok(())
}

/// The chunks of batches seen so far: those of one batch must follow each other in its output.
#[derive(Debug, Default)]
pub(super) struct BatchRun {
    /// Context of the last batch chunk, and the end of that chunk in its output.
    last: Option<(u64, u64)>,
}

impl BatchRun {
    pub(super) fn push(
        &mut self,
        entry: &CiEntry,
        batches: &[BatchContext],
        blob: &Blob,
    ) -> Result<(), (&'static str, Problem)> {
        if !entry.flags.contains(CiFlags::BATCH) {
            return Ok(());
        }
        let (context, offset) = (entry.data >> 32, entry.data & 0xffff_ffff);
        let expected = match self.last {
            Some((last, end)) if last == context => end,
            Some((last, _)) if last > context => {
                let problem =
                    Problem::Value { found: context, expected: "not below that of the batch chunk before" };
                return Err(("context", problem));
            }
            _ => 0,
        };
        if offset != expected {
            let problem = Problem::Mismatch {
                found: offset,
                expected,
                with: "the end of the chunk before it in the batch",
            };
            return Err(("context offset", problem));
        }
        self.last = Some((context, offset + u64::from(entry.uncompressed_size)));
        let stored = usize::try_from(context).ok().and_then(|context| batches.get(context));
        let end =
            entry.compressed_offset + stored.map_or(0, |context| u64::from(context.compressed_size.get()));
        if end > blob.data_size() {
            let problem = Problem::OutOfRange { end, limit: blob.data_size(), of: "the chunk data" };
            return Err(("compressed_offset", problem));
        }
        Ok(())
    }
}
