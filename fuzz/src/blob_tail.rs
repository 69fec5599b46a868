//! What a blob carries behind its chunks: compression info, its header, the table of contents.

use arbitrary::{Result, Unstructured};
use erofs_format::blob_table::BlobId;
use erofs_format::compression_info::{CiArray, CiHeader, MAGIC};
use erofs_format::{Blob, BlobFeatures, Compressor, DigestAlgo, toc};
use zerocopy::{FromZeros as _, little_endian as le};

use crate::tar::{BLOCK, put_checksum};

/// Reads `data` as compression info of a blob that it describes itself, and as a table of contents.
pub fn run(data: &[u8]) {
    if let Some((size, tail)) = data.split_first_chunk::<8>() {
        contents(tail, u64::from_le_bytes(*size));
    }
    // Not enough bytes for a blob: nothing to do.
    let _ = compression_info(Unstructured::new(data));
}

fn contents(tail: &[u8], blob_size: u64) {
    let mut tail = tail.to_vec();
    let header = tail.len().saturating_sub(BLOCK);
    put_checksum(&mut tail[header..]);
    let Ok(sections) = toc::parse(&tail, blob_size) else { return };
    for (at, (section, entry)) in sections.iter().enumerate() {
        let end = entry.compressed_offset.get().checked_add(entry.compressed_size.get());
        assert!(end.is_some_and(|end| end <= blob_size));
        assert!(sections[..at].iter().all(|(other, _)| other != section), "a section twice");
    }
}

fn compression_info(mut u: Unstructured<'_>) -> Result<()> {
    let chunks = u.int_in_range(0..=64u32)?;
    let blocks = u.arbitrary::<u32>()?;
    let contexts = u.int_in_range(0..=3u32)?;
    let context_size = u64::from(u.arbitrary::<u16>()?);
    let features = BlobFeatures::from_bits_truncate(u.arbitrary()?);
    let compressor =
        *u.choose(&[Compressor::None, Compressor::Lz4Block, Compressor::Gzip, Compressor::Zstd])?;
    let mut blob = Blob {
        id: BlobId([7; 32]),
        index: 0,
        chunk_size: 1 << u.int_in_range(12..=24u32)?,
        chunk_count: chunks,
        compressor,
        digest: DigestAlgo::Sha256,
        features,
        compressed_size: u.arbitrary::<u32>()?.into(),
        uncompressed_size: u64::from(blocks) * 4096,
        blocks,
        mapped_blkaddr: 0,
        toc_size: 0,
        ci_compressor: Compressor::None,
        ci_offset: u.arbitrary::<u32>()?.into(),
        ci_compressed_size: 0,
        ci_uncompressed_size: 0,
    };
    let mut header = CiHeader::new_zeroed();
    header.magic = le::U32::new(MAGIC);
    header.magic2 = le::U32::new(MAGIC);
    // Features agree unless the fuzzer wants otherwise.
    header.features = le::U32::new(features.bits() ^ u32::from(u.ratio(1, 16u8)?));
    header.entries = le::U32::new(chunks);
    header.context_count = le::U32::new(contexts);
    header.context_size = le::U64::new(context_size);
    header.context_offset = le::U64::new(match u.arbitrary::<u8>()? {
        0 => u.arbitrary()?,
        _ => features.ci_entry_size() * u64::from(chunks),
    });
    header.ci_offset = le::U64::new(blob.ci_offset);
    let info = u.take_rest();
    let len = u64::try_from(info.len()).unwrap_or(u64::MAX);
    (blob.ci_uncompressed_size, blob.ci_compressed_size) = (len, len);
    header.ci_uncompressed_size = le::U64::new(len);
    header.ci_compressed_size = le::U64::new(len);

    let checked = header.check(&blob).is_ok();
    // Also with a header that failed its check: decoding must do no harm.
    let Ok(array) = CiArray::decode(info, &header, &blob) else { return Ok(()) };
    assert_eq!(u32::try_from(array.entries.len()), Ok(chunks));
    let mut end = 0;
    for entry in &array.entries {
        assert!(entry.uncompressed_offset >= end && entry.uncompressed_size <= blob.chunk_size);
        end = entry.uncompressed_offset + u64::from(entry.uncompressed_size);
    }
    assert!(end <= blob.uncompressed_size, "a chunk leaves the device");
    if checked {
        assert!(array.batches.len() + array.zran.len() <= usize::try_from(contexts).unwrap_or(usize::MAX));
    }
    Ok(())
}
