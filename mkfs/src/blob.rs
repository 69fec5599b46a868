//! One data blob in its plain form: chunks without gaps, the CI array, the CI header. Its id is the sha256 of the file.

use std::io::{self, BufWriter, Write};

use erofs_format::blob_table::{BlobEntry, BlobFeatures};
use erofs_format::compression_info::{CiEntry, CiFlags, CiHeader, CiV1, HEADER_SIZE};
use erofs_format::layout::{BLOCK, MAX_BLOB_SIZE, MAX_CHUNKS, MAX_DEVICE_SIZE};
use erofs_format::{Compressor, DigestAlgo};
use skimmer_fetcher::BlobRef;
use skimmer_fetcher::layout::{BlobWriter as LayoutWriter, Layout};
use zerocopy::{FromZeros, IntoBytes, little_endian as le};

use crate::pool::Encoded;
use crate::{Compression, Digest, MkfsError, Options};

/// One chunk as a blob holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredChunk {
    pub(crate) digest: [u8; 32],
    pub(crate) device_offset: u64,
    pub(crate) stored_offset: u64,
    pub(crate) len: u32,
    pub(crate) stored_len: u32,
    pub(crate) crc32: u32,
}

impl StoredChunk {
    /// V1 compression info has no flag for it: the sizes differ or they do not.
    pub(crate) fn is_compressed(&self) -> bool {
        self.len != self.stored_len
    }
}

/// A blob whose bytes are complete. It is not in the destination yet: dropped, it leaves nothing there.
#[derive(Debug)]
pub(crate) struct Blob {
    pub(crate) chunks: Vec<StoredChunk>,
    /// The blob table entry, id and index left out.
    pub(crate) entry: BlobEntry,
    writer: LayoutWriter,
}

impl Blob {
    /// Puts the blob into the destination under its digest, which is its id.
    pub(crate) fn publish(self) -> Result<(BlobRef, Vec<StoredChunk>, BlobEntry), MkfsError> {
        Ok((self.writer.finish()?, self.chunks, self.entry))
    }
}

/// The compression info of a blob, uncompressed, with its header: what nydus calls `blob.meta`, but for the padding.
pub(crate) fn compression_info(chunks: &[StoredChunk], entry: &BlobEntry) -> (Vec<u8>, CiHeader) {
    let mut bytes = Vec::with_capacity(chunks.len().saturating_mul(size_of::<CiV1>()));
    for chunk in chunks {
        let entry = CiEntry {
            uncompressed_offset: chunk.device_offset,
            uncompressed_size: chunk.len,
            compressed_offset: chunk.stored_offset,
            compressed_size: chunk.stored_len,
            flags: if chunk.is_compressed() { CiFlags::COMPRESSED } else { CiFlags::empty() },
            data: 0,
        };
        let entry =
            CiV1::encode(&entry).expect("BlobWriter::push keeps all numbers within the form's limits");
        bytes.extend_from_slice(entry.as_bytes());
    }
    (bytes, CiHeader::for_entry(entry))
}

/// Writes chunks to a temporary file in the destination.
pub(crate) struct BlobWriter {
    out: BufWriter<LayoutWriter>,
    layout: Layout,
    chunks: Vec<StoredChunk>,
    stored: u64,
    device: u64,
    compressor: Compressor,
    digest: DigestAlgo,
    chunk_size: u32,
}

impl BlobWriter {
    pub(crate) fn create(layout: &Layout, options: &Options) -> Result<Self, MkfsError> {
        Ok(Self {
            out: BufWriter::with_capacity(1 << 18, layout.blob_writer()?),
            layout: layout.clone(),
            chunks: Vec::new(),
            stored: 0,
            device: 0,
            compressor: options.compression.into(),
            digest: options.digest.into(),
            chunk_size: options.chunk_size,
        })
    }

    /// Appends a chunk; returns its CI index.
    pub(crate) fn push(&mut self, chunk: &Encoded) -> Result<u32, MkfsError> {
        let remedy = "choose a larger chunk size or split the layer";
        let index = u32::try_from(self.chunks.len()).unwrap_or(u32::MAX);
        let stored = chunk.compressed.as_deref().unwrap_or(&chunk.data);
        let stored_len = u32::try_from(stored.len())
            .map_err(|_| MkfsError::Compress { reason: format!("{} bytes came out", stored.len()) })?;
        let entry = StoredChunk {
            digest: chunk.key.digest,
            device_offset: self.device,
            stored_offset: self.stored,
            len: chunk.key.len,
            stored_len,
            crc32: chunk.crc32,
        };
        // Neither sum wraps: both are checked against 2^44 and 2^40 after every chunk.
        self.device += u64::from(entry.len).next_multiple_of(BLOCK);
        self.stored += u64::from(stored_len);
        for (what, found, limit) in [
            ("chunks in one layer", u64::from(index) + 1, u64::from(MAX_CHUNKS)),
            ("bytes of file data in one layer", self.device, MAX_DEVICE_SIZE),
            // The compression info (16 bytes per chunk, header) is part of the file.
            ("stored bytes in one layer", self.stored, MAX_BLOB_SIZE - (1 << 29)),
        ] {
            if found > limit {
                return Err(MkfsError::Limit { what, found, limit, remedy });
            }
        }
        self.out.write_all(stored).map_err(|e| write_error(&self.layout, e))?;
        self.chunks.push(entry);
        Ok(index)
    }

    pub(crate) fn finish(self) -> Result<Blob, MkfsError> {
        self.finish_with(BlobFeatures::empty())
    }

    /// Ends the blob, with these features beside those of the plain form.
    pub(crate) fn finish_with(self, features: BlobFeatures) -> Result<Blob, MkfsError> {
        let Self { mut out, layout, chunks, stored, device, compressor, digest, chunk_size } = self;
        let ci_bytes = u64::try_from(chunks.len()).unwrap_or(u64::MAX) * 16;
        let mut entry = BlobEntry::new_zeroed();
        entry.chunk_size = le::U32::new(chunk_size);
        entry.chunk_count = le::U32::new(u32::try_from(chunks.len()).expect("push allows fewer than 2^24"));
        entry.compression_algo = le::U32::new(compressor.code());
        entry.digest_algo = le::U32::new(digest.code());
        entry.features = le::U32::new(BlobFeatures::PLAIN.union(features).bits());
        entry.compressed_size = le::U64::new(stored + ci_bytes + HEADER_SIZE);
        entry.uncompressed_size = le::U64::new(device);
        entry.ci_compressor = le::U32::new(Compressor::None.code());
        entry.ci_offset = le::U64::new(stored);
        entry.ci_compressed_size = le::U64::new(ci_bytes);
        entry.ci_uncompressed_size = le::U64::new(ci_bytes);
        let (array, header) = compression_info(&chunks, &entry);
        let written = out.write_all(&array).and_then(|()| out.write_all(header.as_bytes()));
        written.map_err(|e| write_error(&layout, e))?;
        let writer = out.into_inner().map_err(|e| write_error(&layout, e.into_error()))?;
        Ok(Blob { chunks, entry, writer })
    }
}

fn write_error(layout: &Layout, source: io::Error) -> MkfsError {
    MkfsError::io("write a blob into", layout.root(), source)
}

impl From<Compression> for Compressor {
    fn from(compression: Compression) -> Self {
        match compression {
            Compression::None => Self::None,
            Compression::Zstd { .. } => Self::Zstd,
        }
    }
}

impl From<Digest> for DigestAlgo {
    fn from(digest: Digest) -> Self {
        match digest {
            Digest::Sha256 => Self::Sha256,
            Digest::Blake3 => Self::Blake3,
        }
    }
}
