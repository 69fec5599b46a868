//! A converted image whose first reads lie together: what an access trace touches is moved, in its order, into one blob
//! more, the start blob. All else stays where it is, so the other blobs are shared with the image it came from.

mod files;
mod start;
mod touched;
mod tree;

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use erofs_format::blob_table::{BlobEntry, BlobFeatures, BlobId};
use erofs_format::{Blob, ChunkInfo, Compressor, DigestAlgo, FormatError, Image};
use skimmer_fetcher::BlobRef;
use skimmer_fetcher::digest::Digest;
use skimmer_fetcher::layout::Layout;
use zerocopy::{FromZeros, little_endian as le};

use self::files::BlobFiles;
use self::touched::Touched;
use crate::bootstrap::{self, Plan, PublishedBlob};
use crate::ociinput::SourceImage;
use crate::pack::{Packed, usize_from};
use crate::package::{Parts, package};
use crate::report::Dedup;
use crate::{Compression, MkfsError, Options};

/// What is moved of a chunk that the trace touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pieces {
    /// The blocks that are touched, packed: the smallest start blob. The kernel mounts it; other RAFS loaders, which
    /// expect one size for all chunks, refuse the image.
    Blocks,
    /// All of it, as a chunk of its own, as RAFS has it.
    Chunks,
}

/// One read of an access trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// Id of the blob.
    pub blob: [u8; 32],
    /// First byte on its device.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

/// The image to optimize: a converted one, with its blobs in a layout.
pub struct Converted<'c> {
    /// Its name, for messages.
    pub name: &'c str,
    /// Where its blobs are.
    pub layout: &'c Layout,
    /// Its data blobs.
    pub blobs: &'c [BlobRef],
    /// Its bootstrap.
    pub bootstrap: &'c [u8],
    /// Its config, JSON.
    pub config: &'c [u8],
    /// The annotations of its manifest.
    pub annotations: Option<HashMap<String, String>>,
}

/// What came of it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Optimized {
    /// Digest of the new manifest.
    pub manifest: String,
    /// Its tag.
    pub tag: Option<String>,
    /// sha256 of the new bootstrap.
    pub bootstrap: String,
    /// Id of the start blob.
    pub start_blob: String,
    /// Chunks in it.
    pub chunks: usize,
    /// Its size as it is stored.
    pub stored_bytes: u64,
    /// Its size on the device.
    pub device_bytes: u64,
    /// Bytes that the reads of the trace asked for, each chunk's own length at most.
    pub read_bytes: u64,
    /// Reads of the trace that are of no blob of the image.
    pub strange_reads: usize,
    /// Wall clock time.
    pub elapsed_seconds: f64,
}

/// Writes the optimized image into `output`, under the tag that `options` gives. Only that and the platform's mark are
/// taken from the options; everything else is as the image has it.
///
/// # Errors
/// When the image breaks a rule, was made by a builder whose blobs have another form or is optimized in blocks already,
/// or the trace names nothing of it.
pub fn optimize(
    source: &Converted<'_>,
    trace: &[Touch],
    form: Pieces,
    output: &Layout,
    options: &Options,
) -> Result<Optimized, MkfsError> {
    let started = Instant::now();
    let bad = |reason: String| MkfsError::image(source.name, reason);
    let damaged = |error: FormatError| bad(format!("its bootstrap is damaged: {error}"));
    let image = Image::parse(source.bootstrap).map_err(damaged)?;
    image.check().map_err(damaged)?;
    let mut options = options.clone();
    options.chunk_size = image.chunk_size();
    take_algorithms(&image, &mut options).map_err(&bad)?;

    let maps: Vec<Vec<ChunkInfo>> = (0..image.blobs().len())
        .map(|slot| image.chunk_map(slot).map_err(damaged))
        .collect::<Result<_, _>>()?;
    let touched = Touched::of(&image, &maps, trace, form).map_err(damaged)?;
    if touched.pieces.is_empty() {
        let reason = "no read of the trace is of its blobs: was it recorded with this very image?";
        return Err(bad(reason.to_owned()));
    }

    let mut files = BlobFiles::new(source);
    let (start, moved) =
        start::write(&mut files, image.blobs(), &maps, &touched.pieces, form, output, &options)?;

    let mut prefetch = Vec::new();
    let (tree, chunks) = tree::read(&image, &moved, &mut prefetch).map_err(damaged)?;
    options.prefetch = prefetch;
    let packed = Packed { blobs: Vec::new(), files: chunks, dedup: Dedup::default(), data_bytes: 0 };
    let mut counts: Vec<usize> = image.blobs().iter().map(|blob| usize_from(blob.chunk_count)).collect();
    let start_chunks = start.chunks.len();
    counts.push(start_chunks);
    let plan = Plan::new(&tree, &packed, &counts)?;
    let mut blobs: Vec<(BlobRef, PublishedBlob)> = Vec::with_capacity(plan.blobs.len());
    let mut start = Some(start);
    let (mut stored_bytes, mut device_bytes, mut id) = (0, 0, String::new());
    for used in &plan.blobs {
        let Some(blob) = image.blobs().get(used.number) else {
            let Some(start) = start.take() else { continue };
            let (reference, chunks, entry) = start.publish()?;
            let published = PublishedBlob { id: BlobId(*reference.digest.as_bytes()), chunks, entry };
            (stored_bytes, device_bytes) = (reference.size, published.entry.uncompressed_size.get());
            id = published.id.to_string();
            blobs.push((reference, published));
            continue;
        };
        let (reference, chunks) = files.whole(&image, blob, output)?;
        blobs.push((reference, PublishedBlob { id: blob.id, chunks, entry: entry_of(blob) }));
    }
    let bytes = bootstrap::write(&tree, &plan, &packed, &blobs, &options)?;
    let used: HashSet<usize> = plan.blobs.iter().map(|blob| blob.number).collect();
    let (config, layer_has_blob) = history(source, image.blobs().len(), &used).map_err(&bad)?;
    let original = SourceImage { annotations: source.annotations.clone(), config, layers: Vec::new() };
    let parts = Parts { source: Some(&original), blobs: &blobs, layer_has_blob: &layer_has_blob };
    let manifest = package(output, &bytes, &parts, &options)?;
    Ok(Optimized {
        manifest: manifest.digest.to_string(),
        tag: options.tag.clone(),
        bootstrap: Digest::of(&bytes).hex(),
        start_blob: id,
        chunks: start_chunks,
        stored_bytes,
        device_bytes,
        read_bytes: touched.bytes,
        strange_reads: touched.strange,
        elapsed_seconds: started.elapsed().as_secs_f64(),
    })
}

/// What the new blob has to share with the old ones.
fn take_algorithms(image: &Image<'_>, options: &mut Options) -> Result<(), String> {
    let first = image.blobs().first().ok_or("it has no data")?;
    for blob in image.blobs() {
        if blob.features.contains(BlobFeatures::FINE_INDEXES) {
            return Err("is optimized already; record and optimize the image that it came from".to_owned());
        }
        let plain = blob.features.difference(BlobFeatures::SEPARATED_PREFETCH_FILES) == BlobFeatures::PLAIN;
        if !plain || blob.ci_compressor != Compressor::None {
            let remedy = "was made by another builder; convert the original image with skimmer first";
            return Err(format!("blob {} {remedy}", blob.id));
        }
        if (blob.compressor, blob.digest) != (first.compressor, first.digest) {
            return Err(format!("blobs {} and {} are compressed or hashed differently", first.id, blob.id));
        }
    }
    options.compression = match first.compressor {
        Compressor::None => Compression::None,
        // The level says nothing about what is stored already.
        Compressor::Zstd => Compression::Zstd { level: 3 },
        other => {
            return Err(format!("its chunks are compressed with {other}, which this builder does not write"));
        }
    };
    options.digest = match first.digest {
        DigestAlgo::Blake3 => crate::Digest::Blake3,
        DigestAlgo::Sha256 => crate::Digest::Sha256,
    };
    Ok(())
}

/// The blob's entry in the table, id and index left out.
fn entry_of(blob: &Blob) -> BlobEntry {
    let mut entry = BlobEntry::new_zeroed();
    entry.chunk_size = le::U32::new(blob.chunk_size);
    entry.chunk_count = le::U32::new(blob.chunk_count);
    entry.compression_algo = le::U32::new(blob.compressor.code());
    entry.digest_algo = le::U32::new(blob.digest.code());
    entry.features = le::U32::new(blob.features.bits());
    entry.compressed_size = le::U64::new(blob.compressed_size);
    entry.uncompressed_size = le::U64::new(blob.uncompressed_size);
    entry.ci_compressor = le::U32::new(blob.ci_compressor.code());
    entry.ci_offset = le::U64::new(blob.ci_offset);
    entry.ci_compressed_size = le::U64::new(blob.ci_compressed_size);
    entry.ci_uncompressed_size = le::U64::new(blob.ci_uncompressed_size);
    entry
}

/// The config without the step of the old bootstrap and with one for the start blob, and which of its steps with a
/// layer still have a blob.
fn history(
    source: &Converted<'_>,
    blobs: usize,
    used: &HashSet<usize>,
) -> Result<(serde_json::Map<String, serde_json::Value>, Vec<bool>), String> {
    let mut config: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(source.config)
        .map_err(|error| format!("its config is not a JSON object: {error}"))?;
    if let Some(steps) = config.get_mut("history").and_then(serde_json::Value::as_array_mut) {
        steps.pop();
        steps.push(serde_json::json!({ "created_by": "skimmer optimize", "comment": "start blob" }));
    }
    Ok((config, (0..=blobs).map(|number| used.contains(&number)).collect()))
}
