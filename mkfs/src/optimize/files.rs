//! The stored blobs of the image that is optimized.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::sync::Arc;

use erofs_format::blob_table::BlobId;
use erofs_format::compression_info::{CiArray, CiHeader, HEADER_SIZE};
use erofs_format::{Blob, ChunkInfo, FormatError, Image};
use skimmer_fetcher::BlobRef;
use skimmer_fetcher::chunk::verify;
use skimmer_fetcher::layout::Layout;
use zerocopy::FromBytes;

use super::Converted;
use crate::MkfsError;
use crate::blob::StoredChunk;
use crate::device::chunk_spec;
use crate::pack::usize_from;

/// Most chunks that are kept: a trace comes back to the same few.
const KEPT: usize = 32;

/// The blobs, opened as they are needed.
pub(super) struct BlobFiles<'s> {
    source: &'s Converted<'s>,
    open: HashMap<BlobId, std::fs::File>,
    /// The chunks read last.
    kept: VecDeque<Kept>,
}

/// A chunk of a blob, by its CI index.
struct Kept {
    blob: BlobId,
    index: u32,
    data: Arc<Vec<u8>>,
}

impl<'s> BlobFiles<'s> {
    pub(super) fn new(source: &'s Converted<'s>) -> Self {
        Self { source, open: HashMap::new(), kept: VecDeque::with_capacity(KEPT) }
    }

    fn reference(&self, blob: &Blob) -> Result<BlobRef, MkfsError> {
        let found = self.source.blobs.iter().find(|found| *found.digest.as_bytes() == blob.id.0);
        found.copied().ok_or_else(|| {
            MkfsError::image(self.source.name, format!("its manifest does not list blob {}", blob.id))
        })
    }

    fn read(&mut self, blob: &Blob, offset: u64, len: usize) -> Result<Vec<u8>, MkfsError> {
        let reference = self.reference(blob)?;
        let file = match self.open.entry(blob.id) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(self.source.layout.open_blob(&reference)?)
            }
        };
        let mut bytes = vec![0; len];
        let read = file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(&mut bytes));
        let path = self.source.layout.blob_path(&reference.digest);
        read.map(|()| bytes).map_err(|error| MkfsError::io("read", path, error))
    }

    /// The bytes of one chunk, verified.
    pub(super) fn data(&mut self, blob: &Blob, chunk: &ChunkInfo) -> Result<Arc<Vec<u8>>, MkfsError> {
        let is_this = |kept: &&Kept| kept.blob == blob.id && kept.index == chunk.index;
        if let Some(kept) = self.kept.iter().find(is_this) {
            return Ok(Arc::clone(&kept.data));
        }
        let spec = chunk_spec(blob, chunk);
        let stored = self.read(blob, chunk.compressed_offset, usize_from(chunk.compressed_size))?;
        let checked = spec.check().and_then(|()| verify(&spec, &stored, vec![0; usize_from(spec.len)]));
        let verified = checked.map_err(|error| MkfsError::Device {
            blob: blob.id.to_string(),
            reason: format!("chunk {} at offset {}: {error}", chunk.index, chunk.compressed_offset),
        })?;
        let data = Arc::new(verified.into_inner());
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(Kept { blob: blob.id, index: chunk.index, data: Arc::clone(&data) });
        Ok(data)
    }

    /// Puts a blob that stays into the output; gives all of its chunks.
    pub(super) fn whole(
        &mut self,
        image: &Image<'_>,
        blob: &Blob,
        output: &Layout,
    ) -> Result<(BlobRef, Vec<StoredChunk>), MkfsError> {
        let reference = self.reference(blob)?;
        let wrong = |error: FormatError| MkfsError::Device {
            blob: blob.id.to_string(),
            reason: format!("compression info: {error}"),
        };
        let ci_len = usize::try_from(blob.ci_compressed_size).unwrap_or(usize::MAX);
        let array = self.read(blob, blob.ci_offset, ci_len)?;
        let header_len = usize::try_from(HEADER_SIZE).unwrap_or(usize::MAX);
        let header = self.read(blob, blob.ci_offset + blob.ci_compressed_size, header_len)?;
        let header = CiHeader::read_from_bytes(&header).map_err(|_| MkfsError::Device {
            blob: blob.id.to_string(),
            reason: "its last bytes are no header".to_owned(),
        })?;
        header.check(blob).map_err(wrong)?;
        let array = CiArray::decode(&array, &header, blob).map_err(wrong)?;
        let chunks = (0u32..).zip(&array.entries).map(|(index, entry)| {
            // Only chunks that the tree uses need a digest, and those are in the table.
            let known = image.chunk(blob.index, index);
            StoredChunk {
                digest: known.map_or([0; 32], |known| known.digest),
                device_offset: entry.uncompressed_offset,
                stored_offset: entry.compressed_offset,
                len: entry.uncompressed_size,
                stored_len: entry.compressed_size,
                crc32: known.map_or(0, |known| known.crc32.get()),
            }
        });
        let chunks = chunks.collect();
        if output.root() != self.source.layout.root() && !output.has_blob(&reference)? {
            let mut from = self.source.layout.open_blob(&reference)?;
            let mut to = output.blob_writer()?;
            let copied = io::copy(&mut from, &mut to);
            copied.map_err(|error| MkfsError::io("copy a blob into", output.root(), error))?;
            to.finish_as(&reference)?;
        }
        Ok((reference, chunks))
    }
}
